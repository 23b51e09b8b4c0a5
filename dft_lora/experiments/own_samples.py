"""Rejection sampling: a model's own answers that were judged correct, as a fine-tuning set.

RFT (arXiv 2308.01825) and RAFT train on such data, and so does the experiment in which DFT is strongest
(arXiv 2508.05629, about 140k verified samples): what a model samples is probable under it, so DFT's weights
are high.

The file is read back exactly as it was written: a row with its answer in a separate column is used unchanged
(`data/sources.py`), whatever the base ends its answers with.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..config import Recipe, digest
from ..data.sources import ANSWER, load_problems, readable
from ..data.templates import Renderer
from ..errors import DataError, RunError
from ..model.generate import Request, generate
from ..model.head import check_head
from ..model.load import load_base, load_tokenizer
from ..runs.folder import read_json, write_json, write_text
from ..runs.provenance import certificate
from ..tasks import judge_of
from ..tasks.base import Problem


def own_samples(recipe: Recipe, out: Path, *, samples: int = 4, max_new_tokens: int = 512) -> Path:
    """Write the base's correct answers to its training problems to `out`, a .jsonl file.

    Its columns are problem, solution and answer. Each problem gets `samples` answers at temperature 1;
    duplicate texts are kept once. A problem with several turns is written as a list of turns. A .json file
    beside `out` records how it was made; a file made in the same way is reused.

    Raises DataError when no row has a reference answer, RunError when none of the answers was correct.
    """
    problems = [p for p in load_problems(recipe.data, recipe.train.seed).problems if p.answer is not None]
    if not problems:
        raise DataError(
            f"data.source {recipe.data.source!r}: no row has a reference answer to judge samples by; "
            "name its column in data.answer"
        )
    how = {
        "model": recipe.model.model_dump(mode="json"),
        "template": recipe.data.template,
        "problems": digest([[p.id, _asked(p), p.answer] for p in problems]),
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "seed": recipe.train.seed,
    }
    record = out.with_suffix(".json")
    if out.is_file() and record.is_file() and read_json(record)["how"] == how:
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
    pairs = [(text, problem) for text, (problem, _) in zip(texts, asked, strict=True)]
    verdicts = judge_of(recipe.data.source).judge_many(pairs)
    kept = dict.fromkeys(
        json.dumps({"problem": _asked(problem), "solution": text, ANSWER: problem.answer}, ensure_ascii=False)
        for (problem, _), text, verdict, completion in zip(asked, texts, verdicts, completions, strict=True)
        if verdict.correct and completion.finished and readable(text)
    )
    if not kept:
        raise RunError(f"{recipe.model.name}: none of {len(asked)} answers was correct; nothing to train on")
    write_text(out, "".join(f"{line}\n" for line in kept))
    counts = {"answers": len(asked), "correct": sum(v.correct for v in verdicts), "kept": len(kept)}
    write_json(record, {"how": how, "counts": counts, "provenance": certificate()})
    return out


def _asked(problem: Problem) -> str | list[dict[str, str]]:
    """The problem as written to a row: the question, or the list of all turns if there are several."""
    turns = [dict(turn) for turn in problem.messages]
    return problem.question if len(turns) == 1 else turns
