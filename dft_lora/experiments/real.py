"""The claims on real bases, and which remedy makes DFT end its answers: `dft-lora experiment real`.

Plain DFT weights a token by its probability, so it does not learn a token that the base finds improbable: the
end token of a base model, or the words of a foreign format. Each remedy of REMEDIES is compared with SFT and
with plain DFT on both real bases, and on the embedded base with a foreign and with a known format.

A part (`--only NAME`) is one base. OUT/real.json is written after each claim, so a stopped experiment shows
what it has; run it again to continue, or with more seeds: the runs that are there are used again. Two parts
may run at the same time, with OMP_NUM_THREADS=1 each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.protocol import FORGETTING
from ..evaluation.task_results import TaskResults
from ..evaluation.token_table import TokenTable, tokens_file
from ..runs.folder import RunFolder
from ..tasks import available
from .advice import before_training
from .claims import FINDINGS, RIVALS, accuracy, contrast, greedy, kinds, sampled
from .findings import STUDY as EMBEDDED
from .parts import in_parts
from .study import Fields, Runs, Study

REMEDIES: dict[str, Fields] = {
    "plain dft": {"objective.name": "dft"},
    "dft": {"objective.name": "dft", "objective.floor": 0.1},
    "dft, nll on the end token": {"objective.name": "dft", "objective.end": 1.0},
    "dft, annealed from sft": {"objective.name": "power", "objective.a": 1.0, "objective.anneal": 0.3},
}
"""Kind of run -> its objective. `dft` is the one that the claims are about: DFT with a floor."""

FAR_BEHIND = ("plain dft", "dft, nll on the end token", "dft, annealed from sft")
"""On Gemma, by 19 to 40 points with the first seed. They have one seed."""

TASKS = ("word-problems", "word-problems-hard", "school-problems")


def real_study(base: str) -> Study:
    """The study of a real base; the set of human-written problems is left out where it cannot be had."""
    return Study(
        recipe=f"{base}_sft",
        settings={"train.save_steps": 10, "train.keep_checkpoints": 4, "evaluate.samples": 4},
        rates=(5e-5, 3e-4, 1e-3, 2e-3),
        tasks=tuple(task for task in TASKS if available(task)),
        validation="word-problems-validation",
        problems=60,
        validation_problems=60,
        groups={
            "main": {},
            "facts": {"data.source": "codebook", "train.max_steps": 120, "train.save_steps": 60},
        },
        own_problems=240,
        own_tokens=48,
        objectives=REMEDIES,
        swept=("sft", "dft", "iw-sft"),
        facts_rate=1e-3,
        seeds_per_rate=1,
        finalists=2,
        once=(*RIVALS[1:], "facts", "checkpoints", *FAR_BEHIND),
    )


def embedded_study(split: str) -> Study:
    """The study of the embedded base, on solutions that end as it knows, or as it has never seen."""
    return replace(
        EMBEDDED,
        settings={**EMBEDDED.settings, "data.split": split, "evaluate.max_new_tokens": 160},
        objectives=REMEDIES,
        swept=("sft", "dft"),
    )


STUDIES: dict[str, Callable[[], Study]] = {
    "tiny, known format": lambda: embedded_study("train"),
    "tiny, foreign format": lambda: embedded_study("train-boxed"),
    "gemma-3-270m": lambda: real_study("gemma-3-270m"),
    "smollm2-135m": lambda: real_study("smollm2-135m"),
}


def remedies(runs: Runs) -> dict[str, Any]:
    """Each remedy against SFT and against plain DFT: accuracy, answers that ended, p(end), forgetting.

    `first_set` is the contrast on the set that resembles the training problems alone.
    """
    found: dict[str, Any] = {}
    tasks = runs.study.tasks
    sft, plain = runs.best("sft"), runs.best("plain dft")
    for kind in ("sft", *runs.study.objectives):
        folders = runs.best(kind)
        found[kind] = {
            **table(folders, runs),
            "seeds": len(folders),
            "learning_rate": runs.rate(kind),
            "p_end": float(np.mean([folder.metrics()[-1]["p_end"] for folder in folders])),
            "against_sft": contrast(f"{kind} - SFT", sft, folders, sampled(*tasks)),
            "against_sft_greedy": contrast(f"{kind} - SFT, greedy", sft, folders, greedy(*tasks)),
            "against_plain": contrast(f"{kind} - plain DFT", plain, folders, sampled(*tasks)),
            "first_set": {
                "against_sft": contrast(f"{kind} - SFT, {tasks[0]}", sft, folders, sampled(tasks[0])),
                "against_sft_greedy": contrast(
                    f"{kind} - SFT, {tasks[0]}, greedy", sft, folders, greedy(tasks[0])
                ),
            },
        }
    return found


def ended(folders: Sequence[RunFolder], task: str) -> float:
    """The share of sampled answers that the model ended itself."""
    return float(np.mean([1 - TaskResults.read(folder, task).truncated for folder in folders]))


def other_text_nll(folders: Sequence[RunFolder]) -> float:
    """Mean NLL of English prose, in nats per token: a rise above the base's means forgetting."""
    return float(np.mean([TokenTable.load(tokens_file(f, FORGETTING)).nll_E.mean() for f in folders]))


def parts_of(name: str, runs: Runs) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The advice before any run; then what is found out about a base, in the order of its cost."""
    first = runs.study.rates[0]
    yield "diagnosis", lambda: before_training(runs.recipe("main", "sft", first, runs.seeds[0]))
    yield "remedies", lambda: remedies(runs)
    for kind in runs.study.swept:
        yield f"rates/{kind}", lambda kind=kind: by_rate(runs.tried(kind))  # type: ignore[misc]
    if name.startswith("tiny"):  # its claims are those of `experiment findings`
        return
    for claim, find in FINDINGS.items():
        yield f"claims/{claim}", lambda find=find: find(runs)  # type: ignore[misc]
    for kind, folders in kinds(runs).items():
        yield f"table/{kind}", lambda folders=folders: table(folders(), runs)  # type: ignore[misc]


def table(folders: Sequence[RunFolder], runs: Runs) -> dict[str, Any]:
    """A kind's line of the table."""
    return {
        "accuracy": accuracy(folders, runs.study.tasks),
        "ended": {task: ended(folders, task) for task in runs.study.tasks},
        "other_text_nll": other_text_nll(folders),
    }


def by_rate(tried: Mapping[float, list[float]]) -> dict[str, list[float]]:
    """Sampled accuracy on the validation set, one number per seed."""
    return {f"{rate:g}": by_seed for rate, by_seed in tried.items()}


def run(out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Write OUT/real.json and yield the verdicts, one line each. Parts that are done are kept.

    Raises RequestError for an unknown part.
    """
    yield from in_parts("real", out, seeds, only, STUDIES, parts_of)
