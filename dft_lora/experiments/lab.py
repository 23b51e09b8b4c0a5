"""The objective lab: every objective in every regime, with equal tries and seeds: `dft-lora experiment lab`.

docs/lab-protocol.md is the protocol, written before the first run; the tables below are its data. In each
regime an objective gets TRIES settings of rate and own number. They are compared on a validation set with a
seed of their own; the best is trained anew with the seeds of the experiment and tested on other problems.

A part (`--only NAME`) is one regime. OUT/lab.json is written after every objective, SFT and DFT first, so a
stopped lab shows what it has; run it again to continue. Two regimes may run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.evaluate import evaluate
from ..evaluation.sharpening import entropy_matched
from ..evaluation.task_results import TaskResults
from ..runs.folder import RunFolder
from .advice import before_training
from .claims import Read, any_of_four, contrast, greedy, sampled
from .own_samples import own_samples
from .parts import in_parts
from .real import table
from .study import Fields, Runs, Study

TRIES = 4
TUNING_SEED = 100
TINY_RATES, REAL_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (2e-4, 5e-4, 1e-3, 2e-3)

Numbers = Mapping[str, float]


def _own(name: str, field_: str = "", *values: float, **fixed: float) -> tuple[str, tuple[Numbers, ...]]:
    """An objective and the values of its own number that are tried, at most two."""
    return name, tuple({**fixed, field_: value} for value in values) or (fixed,)


CANDIDATES: dict[str, tuple[str, tuple[Numbers, ...]]] = {
    "sft": _own("sft"),
    "dft": _own("dft"),
    "dft with a floor": _own("dft", "floor", 0.05, 0.2),
    "dft, nll on the end": _own("dft", end=1.0),
    "power, annealed": _own("power", "anneal", 0.3, 0.6, a=1.0),
    "knee": _own("knee", "tau", 0.1, 0.3),
    "relative": _own("relative"),
    "eaft": _own("eaft"),
    "iw-sft": _own("iw-sft", "high", 2.0, 16.0),
    "threshold": _own("threshold", "tau", 0.1, 0.2),
    "asft": _own("asft", "lam", 0.03, 0.1),
    "power": _own("power", "a", 0.3, 0.7),
    "deft": _own("deft"),
    "cadft": _own("cadft"),
    "infosft": _own("infosft", "ceiling", 0.8, 0.93),
    "chord-phi": _own("chord-phi"),
    "prift": _own("prift"),
    "gift": _own("gift", "beta", 5.0, 20.0),
    "psft": _own("psft", "clip", 0.28, 1.0),
    "iw-sft-token": _own("iw-sft-token", "high", 1.8, 4.0),
    "focal": _own("focal", "gamma", 1.0, 2.0),
    "dft-sentence": _own("dft-sentence"),
    "dft-geometric": _own("dft-geometric"),
}
"""Label -> objective, and one or two settings of its own numbers. The order is that of the runs."""

CORE = tuple(CANDIDATES)[:11]
"""The labels that every regime had at first; a full table of all of them takes too long in each."""

EVERYWHERE = (*CORE, "power")
"""`power` was added when it led the four regimes of all labels (docs/lab-protocol.md, Deviations)."""


def tries(label: str, rates: Sequence[float]) -> list[tuple[str, float]]:
    """TRIES pairs (kind of run, rate): every rate, or the two in the middle with both own numbers."""
    kinds = list(kinds_of(label))
    chosen = rates if len(kinds) == 1 else rates[1:-1]
    return [(kind, rate) for kind in kinds for rate in chosen]


def kinds_of(label: str) -> dict[str, Fields]:
    """Kind of run -> its section `objective`, for every setting of a label's own numbers."""
    name, settings = CANDIDATES[label]
    return {
        " ".join([label, *(f"{key}={value:g}" for key, value in numbers.items())]): {
            "objective.name": name,
            **{f"objective.{key}": value for key, value in numbers.items()},
        }
        for numbers in settings
    }


@dataclass(frozen=True)
class Regime:
    """A situation in which objectives are compared. `tuning`: what changes where settings are chosen."""

    why: str
    settings: Fields
    recipe: str = "tiny_sft"
    tasks: tuple[str, ...] = ("arithmetic",)
    validation: str = "arithmetic-validation"
    rates: tuple[float, ...] = TINY_RATES
    labels: tuple[str, ...] = tuple(CANDIDATES)
    tuning: Fields = field(default_factory=dict)
    own: bool = False

    def study(self) -> Study:
        """The same regime as a study."""
        return Study(
            recipe=self.recipe,
            settings={"evaluate.samples": 4, **self.settings},
            rates=self.rates,
            tasks=self.tasks,
            validation=self.validation,
            validation_problems=60,
            problems=100,
            groups={"main": {}, "tuning": self.tuning},
            own_problems=480,
            objectives={kind: fields for label in self.labels for kind, fields in kinds_of(label).items()},
        )


def tiny(why: str, **more: Any) -> Regime:
    """A regime on the embedded base: 40 steps of 16 examples."""
    size = {"train.batch_size": 16, "train.micro_batch_size": 16, "train.max_steps": 40}
    return Regime(why, {**size, **more.pop("settings", {})}, **more)


def few(examples: int, why: str) -> Regime:
    """A regime of so many examples without wrong steps, drawn anew for each seed."""
    return tiny(why, settings={"data.split": "train-clean", "data.sample": examples}, labels=EVERYWHERE)


REGIMES: dict[str, Regime] = {
    "strong prior": tiny(
        "arithmetic that the base mostly writes already, no wrong steps",
        settings={"data.split": "train-clean"},
    ),
    "8 % wrong steps": tiny("the same with some wrong labels", settings={"data.split": "train"}),
    "foreign format": tiny(
        "the same in words and with an end that the base gives almost no probability",
        settings={"data.split": "train-boxed"},
    ),
    "no prior": tiny(
        "made-up codes; settings are chosen on other codes",
        settings={"data.source": "codebook", "train.max_steps": 160},
        tasks=("codebook",),
        validation="codebook-validation",
        tuning={"data.source": "codebook-validation"},
    ),
    "half-known": Regime(
        "a real base, word problems that it solves at times",
        {"train.max_steps": 24},
        recipe="smollm2-135m_sft",
        tasks=("word-problems",),
        validation="word-problems-validation",
        rates=REAL_RATES,
        labels=EVERYWHERE,
    ),
    "25 % wrong steps": tiny("many wrong labels", settings={"data.split": "train-noisy"}, labels=EVERYWHERE),
    "50 examples": few(50, "few examples, each seen about 13 times"),
    "200 examples": few(200, "each seen about 3 times"),
    "1,000 examples": few(1000, "each seen once at most"),
    "own samples": tiny("the base's own correct answers", own=True, labels=EVERYWHERE),
}
"""The order is that of the runs. Forgetting is measured in all of them, on text unrelated to any task."""

MODES: dict[str, Callable[..., Read]] = {"sampled": sampled, "greedy": greedy, "pass@4": any_of_four}


class LabRuns(Runs):
    """The runs of a regime."""

    own = False

    @cached_property
    def own_samples(self) -> Path:
        """The base's own verified answers; the same for every objective."""
        recipe = self.recipe("own", "sft", self.study.rates[0], 0, **{"data.sample": self.study.own_problems})
        out = self.out / "own-samples.jsonl"
        return own_samples(
            recipe,
            out,
            samples=self.study.own_samples,
            max_new_tokens=self.study.own_tokens,
            overwrite=True,
        )

    @property
    def group(self) -> str:
        return "own" if self.own else "main"

    def tried_settings(self, label: str) -> dict[tuple[str, float], float]:
        """(kind, rate) -> sampled accuracy on the validation set, with the tuning seed."""
        group, task = "own" if self.own else "tuning", self.study.validation
        folders = {
            (kind, rate): self._train(group, kind, rate, TUNING_SEED)
            for kind, rate in tries(label, self.study.rates)
        }
        evaluate([folder.path for folder in folders.values()], [task], limit=self.study.validation_problems)
        return {at: float(TaskResults.read(f, task).correct_PS.mean()) for at, f in folders.items()}

    def chosen(self, label: str) -> tuple[str, float]:
        """The best setting; of a tie the lower rate, then the first own number."""
        found = self.tried_settings(label)
        return max(found, key=lambda at: (found[at], -at[1]))

    def final(self, label: str) -> list[RunFolder]:
        """One tested run per seed, at the label's chosen setting."""
        if label not in self._final:
            kind, rate = self.chosen(label)
            self._final[label] = self.evaluated(self.trained(self.group, kind, rate))
        return self._final[label]

    @cached_property
    def _final(self) -> dict[str, list[RunFolder]]:
        return {}


class OwnRuns(LabRuns):
    """The same, trained on the base's own samples."""

    own = True


def tried(runs: LabRuns, label: str) -> list[dict[str, Any]]:
    """Every setting that was tried, with its accuracy on the validation set."""
    return [
        {"kind": kind, "learning_rate": rate, "accuracy": share}
        for (kind, rate), share in runs.tried_settings(label).items()
    ]


def tested(runs: LabRuns, label: str) -> dict[str, Any]:
    """A label's line in a regime: its setting, results, contrasts with SFT and DFT, and cost."""
    folders, tasks = runs.final(label), runs.study.tasks
    metrics = [folder.metrics() for folder in folders]
    kind, rate = runs.chosen(label)
    line = {
        "kind": kind,
        "learning_rate": rate,
        **table(folders, runs),
        "pass@4": float(np.mean([any_of_four(*tasks)(folder).mean() for folder in folders])),
        "p_end": float(np.mean([lines[-1]["p_end"] for lines in metrics])),
        "seconds_per_step": float(np.median([step["seconds"] for lines in metrics for step in lines])),
        "against": {
            rival: {
                mode: contrast(f"{label} - {rival}, {mode}", runs.final(rival), folders, read(*tasks))
                for mode, read in MODES.items()
            }
            for rival in ("sft", "dft")
            if rival != label
        },
    }
    if label != "sft":
        line["at_equal_entropy"] = against_sft_at_equal_entropy(runs, label)
    return line


def against_sft_at_equal_entropy(runs: LabRuns, label: str) -> dict[str, Any]:
    """Sampled accuracy minus that of SFT at the temperature that gives it the same entropy; first seed."""
    tasks, ours = runs.study.tasks, runs.final(label)[0]
    matched = entropy_matched(runs.final("sft")[0], ours, runs.out / "entropy-matched" / label, tasks[0])
    runs.evaluated([matched])
    temperature = matched.run()["entropy_matched"]["temperature"]
    return contrast(f"{label} - SFT at its entropy", [matched], [ours], sampled(*tasks)) | {
        "temperature": temperature
    }


def parts_of(name: str, runs: LabRuns) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Advice before any run; then each objective's tries and its test."""
    first = runs.study.rates[0]
    source = {"data.source": str(runs.own_samples)} if runs.own else {}
    yield "diagnosis", lambda: before_training(runs.recipe("main", "sft", first, runs.seeds[0], **source))
    for label in REGIMES[name].labels:
        yield f"tries/{label}", partial(tried, runs, label)
        yield f"test/{label}", partial(tested, runs, label)


def run(out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Write OUT/lab.json and yield a line for each part. Parts that are done are kept.

    Raises RequestError for an unknown regime.
    """
    studies = {name: regime.study for name, regime in REGIMES.items()}
    names = only or list(studies)
    for name in names:
        kind = OwnRuns if name in REGIMES and REGIMES[name].own else LabRuns
        yield from in_parts("lab", out, seeds, [name], studies, parts_of, kind)
