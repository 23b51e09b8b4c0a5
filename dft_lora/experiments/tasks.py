"""DFT beyond mathematics: `dft-lora experiment tasks`.

SFT, plain DFT, DFT with a floor and EAFT on a commonsense set (OpenBookQA's training questions in
LLM-Adapters' words), each at its own best learning rate on held-out training questions. `diagnose` speaks
before any run. Every kind is tested on OpenBookQA and, without further training, on ARC-Challenge: in words,
as trained, and by log-likelihood. What was forgotten is measured on English prose and on word problems.

A part (`--only NAME`) is one base. OUT/tasks.json is written after each step; run it again to continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.evaluate import evaluate
from ..model.known import KNOWN
from .advice import before_training
from .claims import accuracy, contrast, greedy, sampled
from .parts import in_parts
from .real import by_rate, other_text_nll, table
from .study import Fields, Runs, Study

KINDS: dict[str, Fields] = {
    "plain dft": {"objective.name": "dft"},
    "dft": {"objective.name": "dft", "objective.floor": 0.1},
    "eaft": {"objective.name": "eaft"},
}
"""Kind of run, beside `sft` -> its objective. `dft` has the floor of the real bases' recipes."""

WRITTEN = ("openbookqa-generative", "arc-challenge-generative")
SCORED = ("openbookqa", "arc-challenge")
OTHER = "word-problems"


def commonsense_study(base: str) -> Study:
    """240 questions of OpenBookQA's training set on a real base."""
    return Study(
        recipe=f"{base}_sft",
        settings={
            "data.source": "openbookqa-validation",
            "train.max_steps": 30,
            "evaluate.samples": 2,
            "evaluate.max_new_tokens": 24,
        },
        rates=(5e-4, 1e-3),
        tasks=WRITTEN,
        validation="openbookqa-validation",
        validation_problems=100,
        problems=60,
        groups={"main": {}},
        own_problems=0,
        objectives=KINDS,
    )


STUDIES: dict[str, Callable[[], Study]] = {base: lambda base=base: commonsense_study(base) for base in KNOWN}  # type: ignore[misc]


def objectives(runs: Runs) -> dict[str, Any]:
    """Base and every kind: accuracy in words and by log-likelihood, against SFT, and what was forgotten."""
    found: dict[str, Any] = {}
    tasks = runs.study.tasks
    folders = {"base": runs.base, **{kind: runs.best(kind) for kind in ("sft", *KINDS)}}
    every = {run.path: None for some in folders.values() for run in some}
    evaluate(list(every), [*SCORED, OTHER], limit=runs.study.problems)
    for kind, some in folders.items():
        found[kind] = {
            **table(some, runs),
            "scored": accuracy(some, SCORED),
            "other_family": accuracy(some, [OTHER]),
        }
        if kind == "base":
            continue
        found[kind] |= {
            "learning_rate": runs.rate(kind),
            "p_end": sum(run.metrics()[-1]["p_end"] for run in some) / len(some),
            "against_sft": contrast(f"{kind} - SFT", folders["sft"], some, sampled(*tasks)),
            "against_sft_greedy": contrast(f"{kind} - SFT, greedy", folders["sft"], some, greedy(*tasks)),
            "against_sft_scored": contrast(f"{kind} - SFT, scored", folders["sft"], some, greedy(*SCORED)),
            "other_family_change": contrast(f"{kind} - base, {OTHER}", folders["base"], some, sampled(OTHER)),
            "other_text_change": other_text_nll(some) - other_text_nll(folders["base"]),
        }
    return found


def parts_of(name: str, runs: Runs) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The advice comes first, so no result is known when it is given."""
    recipe = runs.recipe("main", "plain dft", runs.study.rates[0], runs.seeds[0])
    yield "diagnosis", lambda: before_training(recipe)
    yield "rates", lambda: {kind: by_rate(runs.tried(kind)) for kind in ("sft", *KINDS)}
    yield "objectives", lambda: objectives(runs)


def run(out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Write OUT/tasks.json and yield a line for each part. Parts that are done are kept.

    Raises RequestError for an unknown part.
    """
    yield from in_parts("tasks", out, seeds, only, STUDIES, parts_of)
