"""Multiple choice on the real bases against published figures: `python -m dft_lora.bench choices`.

Each base is scored as nf4 and unpacked (`quantization: none`) on the first problems of each set that is at
hand, without examples in the prompt. The weights come from a 4-bit GGUF file either way, so nf4 quantizes
them a second time. A published figure is of 16-bit weights, mostly of the whole set, and often of another
prompt; PUBLISHED says which.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..data.templates import Renderer
from ..evaluation import statistics as st
from ..evaluation.choices import Texts, choice_examples, score_texts
from ..model.load import load_base, load_tokenizer
from ..runs.provenance import certificate, versions
from ..tasks import get_task
from ..tasks.base import Problem
from ..tasks.choice import LETTERS, normalised

CARD = "model card of SmolLM2-135M, before instruction tuning, no examples"
PUBLISHED: dict[tuple[str, str], tuple[float, str]] = {
    ("gemma-3-270m", "arc-challenge"): (0.290, "model card of Gemma 3 270M, 25 examples in the prompt"),
    ("smollm2-135m", "arc-challenge"): (
        0.2773,
        "lldois/SmolLM2-135M-Reasoning-SLERP-Champion on the Hub: the Instruct release, lm-eval, no examples",
    ),
    ("smollm2-135m", "openbookqa"): (0.346, CARD),
    ("smollm2-135m", "commonsenseqa-texts"): (0.339, CARD),
}
"""(base, set) -> accuracy and where it was published."""
HARNESS = {
    "arc-challenge": ("arc_challenge", "question"),
    "openbookqa": ("openbookqa", "question_stem"),
    "commonsenseqa": ("commonsense_qa", "question"),
}
"""Set -> lm-evaluation-harness's task, and the field of its rows that holds the question."""
SETS = ("arc-challenge", "openbookqa", "commonsenseqa", "commonsenseqa-texts")


def problems_of(name: str, limit: int) -> tuple[list[Problem], bool]:
    """The first problems of a set, and whether its figure is the length-normalised one.

    `commonsenseqa-texts` asks CommonsenseQA without its list of letters and scores the choices' texts, as
    SmolLM2's figures were made; the task `commonsenseqa` scores the letters, as lm-evaluation-harness does.
    """
    if name != "commonsenseqa-texts":
        task = get_task(name)
        return task.problems()[:limit], getattr(task, "normalise", False)
    lettered = get_task("commonsenseqa").problems()[:limit]
    with_texts = get_task("commonsenseqa-generative").problems()[:limit]
    asked = [f"{problem.question.splitlines()[0]}\nAnswer:" for problem in lettered]
    return [
        Problem.ask(p.id, question, answer=p.answer, choices=q.choices)
        for question, p, q in zip(asked, lettered, with_texts, strict=True)
    ], True


def scored(model: Any, renderer: Renderer, problems: Sequence[Problem]) -> list[list[float]]:
    """Summed log-probabilities of every problem's choices."""
    sets = [Texts(choice_examples(renderer, problem), None) for problem in problems]
    found: dict[int, list[float]] = {}
    for places, logps in score_texts(model, sets, pad_id=renderer.pad_id):
        found |= dict(zip(places, logps, strict=True))
    return [found[i] for i in range(len(problems))]


def chosen(logps: Sequence[Sequence[float]], problems: Sequence[Problem], by_length: bool) -> list[int]:
    """The place of the chosen choice of each problem, by sums or by sums per character."""
    rows = [normalised(a, p.choices) if by_length else a for a, p in zip(logps, problems, strict=True)]
    return [int(np.argmax(row)) for row in rows]


def harness_chosen(model: Any, renderer: Renderer, name: str, limit: int) -> dict[str, list[int]]:
    """What lm-evaluation-harness's own task chooses on the same rows and weights, by each of its rules.

    Only the place of the rows is changed: a local file with the Hub's fields.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task_name, field = HARNESS[name]
    lettered, with_texts = (get_task(n).problems()[:limit] for n in (name, f"{name}-generative"))
    rows = [
        {
            field: question_of(p),
            "choices": {"text": list(q.choices), "label": list(LETTERS[: len(q.choices)])},
            "answerKey": p.answer,
        }
        for p, q in zip(lettered, with_texts, strict=True)
    ]
    manager = TaskManager()
    with tempfile.TemporaryDirectory() as folder:
        file, task = Path(folder, "rows.jsonl"), Path(folder, "task.yaml")
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        local = {"path": "json", "name": None, "kwargs": {"data_files": {"test": str(file)}}}
        config = {
            "include": str(manager.task_index[task_name].yaml_path),
            **{f"dataset_{field}": value for field, value in local.items()},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        task.write_text(json.dumps(config))  # JSON is YAML too
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=renderer.tokenizer, batch_size=8),
            tasks=[str(task)],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"][task_name], key=lambda sample: sample["doc_id"])
    logps = [[float(resp[0]) for resp in sample["filtered_resps"]] for sample in samples]
    return {rule: chosen(logps, lettered, rule == "acc_norm") for rule in ("acc", "acc_norm")}


def question_of(problem: Problem) -> str:
    """The bare question of a scored problem: a field of the rows that lm-evaluation-harness reads."""
    return problem.question.removeprefix("Question: ").split("\nA. ")[0].removesuffix("\nAnswer:")


def measure(
    bases: Sequence[str],
    names: Sequence[str] = SETS,
    limit: int = 200,
    quantizations: Sequence[str] = ("nf4", "none"),
    harness: bool = False,
) -> Iterator[dict[str, Any]]:
    """Accuracy with its interval, by both rules, of every base, storage and set.

    Yields the result so far after each set, since the harness takes minutes for one.

    `harness`: also how many of our choices lm-evaluation-harness makes on the same unpacked weights.
    """
    asked = {name: problems_of(name, limit) for name in names}  # a missing set is an error at once
    rows: list[dict[str, Any]] = []
    made = certificate(peers=versions(("lm-eval",)))
    for base in bases:
        for quantization in quantizations:
            config = ModelConfig(name=base, quantization=quantization)  # type: ignore[arg-type]
            model, hardware = load_base(config, for_answers=True)
            renderer = Renderer(load_tokenizer(config), "raw")
            for name, (problems, by_length) in asked.items():
                began = time.perf_counter()
                logps = scored(model, renderer, problems)
                seconds = time.perf_counter() - began
                picks = {rule: chosen(logps, problems, rule == "acc_norm") for rule in ("acc", "acc_norm")}
                right = [LETTERS.index(problem.answer or "") for problem in problems]
                hits = {rule: np.equal(pick, right).astype(float) for rule, pick in picks.items()}
                rule = "acc_norm" if by_length else "acc"
                rows.append(
                    {
                        "base": base,
                        "quantization": quantization,
                        "dtype": str(hardware.dtype).removeprefix("torch."),
                        "set": name,
                        "problems": len(problems),
                        "rule": rule,
                        "accuracy": {rule: float(hit.mean()) for rule, hit in hits.items()},
                        "ci95": list(st.interval(hits[rule])),
                        "chance": float(np.mean([1 / len(p.choices) for p in problems])),
                        "published": PUBLISHED.get((base, name)),
                        "chosen": picks,
                        "seconds_per_problem": seconds / len(problems),
                    }
                )
                if harness and quantization == "none" and name in HARNESS:
                    theirs = harness_chosen(model, renderer, name, limit)
                    rows[-1]["equal_choices"] = {
                        rule: int(np.equal(theirs[rule], picks[rule]).sum()) for rule in theirs
                    }
                print(base, quantization, name, f"{rows[-1]['accuracy'][rule]:.3f}", file=sys.stderr)
                yield {"kind": "choices", "rows": rows, "provenance": made}
