"""Rejection sampling: a model's own answers that were judged correct, as a fine-tuning set.

The data of RFT (arXiv 2308.01825) and RAFT, and of the row in which DFT is strongest (arXiv 2508.05629, about
140k verified own samples): what the base says is already probable under it, so DFT's weights are high.
"""

from __future__ import annotations

import json
from pathlib import Path

from .config import Recipe, digest
from .data.sources import load_problems
from .data.templates import Renderer
from .errors import RunError
from .model.generate import Request, generate
from .model.head import check_head
from .model.load import load_base, load_tokenizer
from .provenance import certificate
from .run_folder import read_json, write_json, write_text
from .tasks.judge import judge_many


def own_samples(recipe: Recipe, out: Path, *, samples: int = 4, max_new_tokens: int = 512) -> Path:
    """Write `out`, a .jsonl of problem, solution and answer: the base's correct answers to its training data.

    `samples` answers a problem at temperature 1; equal texts of a problem are kept once. Beside it lies
    `out` with the suffix .json: how it was made. A file made in the same way is used again.
    Raises RunError when not one answer was correct.
    """
    problems = [p for p in load_problems(recipe.data, recipe.train.seed).problems if p.answer is not None]
    how = {
        "model": recipe.model.model_dump(mode="json"),
        "problems": digest([[p.id, p.question, p.answer] for p in problems]),
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "seed": recipe.train.seed,
    }
    facts = out.with_suffix(".json")
    if out.is_file() and facts.is_file() and read_json(facts)["how"] == how:
        return out
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    model, _ = load_base(recipe.model, for_answers=True)
    check_head(model)
    asked = [(problem, sample) for problem in problems for sample in range(samples)]
    requests = [
        Request(
            prompt_ids=tuple(renderer.prompt_ids(problem.messages)),
            adapter=None,
            seed=recipe.train.seed * 1_000_003 + sample,
            max_new_tokens=max_new_tokens,
        )
        for problem, sample in asked
    ]
    completions = generate(model, requests, stop_ids=renderer.stop_ids, pad_id=renderer.pad_id)
    texts = [renderer.decode(completion.ids) for completion in completions]
    verdicts = judge_many((text, problem.answer) for text, (problem, _) in zip(texts, asked, strict=True))
    kept = {
        (problem.question, text): problem.answer
        for (problem, _), text, verdict, completion in zip(asked, texts, verdicts, completions, strict=True)
        if verdict.correct and completion.finished
    }
    if not kept:
        raise RunError(f"{recipe.model.name}: none of {len(asked)} answers was correct; nothing to train on")
    rows = [{"problem": q, "solution": text, "answer": answer} for (q, text), answer in kept.items()]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    counts = {"answers": len(asked), "correct": sum(v.correct for v in verdicts), "kept": len(rows)}
    write_json(facts, {"how": how, "counts": counts, "provenance": certificate()})
    return out
