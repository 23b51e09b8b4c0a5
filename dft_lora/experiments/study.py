"""The runs behind an experiment's claims, trained and evaluated when a claim first needs them.

A `Study` says what the runs of one base have in common; `Runs` makes them. Every objective runs at its own
best learning rate, chosen on a validation set and reported on the test sets. Run folders are reused, so a
stopped experiment resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe, load_recipe, setting
from ..evaluation.base_run import base_run
from ..evaluation.evaluate import evaluate
from ..evaluation.sharpening import entropy_matched
from ..evaluation.task_results import TaskResults
from ..runs.folder import RunFolder
from .own_samples import own_samples
from .sweep import train_once

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """One base, its problems, and the settings of all runs on it."""

    recipe: str
    """A shipped recipe, which the fields of `settings` change."""
    settings: Fields
    rates: tuple[float, ...]
    """Learning rates that every objective tries."""
    tasks: tuple[str, ...]
    """Test sets: the first resembles the training set, the second is harder."""
    validation: str
    problems: int
    """At most this many problems of each test set."""
    groups: Mapping[str, Fields]
    """Folder of runs -> the fields they change. `own`, on the base's own samples, is not listed."""
    own_problems: int
    own_samples: int = 4
    own_tokens: int = 96
    objectives: Mapping[str, Fields] = field(default_factory=dict)
    """Kind of run -> the section `objective`, where that is more than the kind's name."""
    swept: tuple[str, ...] = ()
    """Kinds that choose a learning rate of their own; the others take that of `dft`. Empty: all kinds do."""
    facts_rate: float | None = None
    """The learning rate on new facts, if it is not to be chosen there."""
    seeds_per_rate: int | None = None
    """Of the seeds, how many are trained at every learning rate; by default all."""
    facts_task: str = "codebook"
    validation_problems: int | None = None
    """At most this many problems of the validation set; by default all."""
    finalists: int = 1
    """Of the learning rates, this many of the first seed's best are compared again, with all seeds."""
    once: tuple[str, ...] = ()
    """Kinds and groups of runs with the first seed only; `checkpoints` is the group that finds the peak."""


class Runs:
    """The runs of a study, below `out`."""

    def __init__(self, study: Study, out: Path, seeds: Sequence[int]):
        self.study, self.out, self.seeds = study, out, seeds
        self._rates: dict[tuple[str, str, int], float] = {}

    def recipe(self, group: str, kind: str, rate: float, seed: int, **more: Any) -> Recipe:
        """The recipe of one run. Its seed determines the data's order and the adapter's initial weights."""
        name = f"{kind}-{rate:g}"
        fields = {
            **self.study.settings,
            **more,
            **self.study.objectives.get(kind, {"objective.name": kind}),
            "train.learning_rate": rate,
            "train.seed": seed,
            "name": name,
            "output": str(self.out / group / f"seed-{seed}" / name),
        }
        return load_recipe(self.study.recipe, [setting(field, value) for field, value in fields.items()])

    def trained(self, group: str, kind: str, rate: float, seeds: int | None = None) -> list[RunFolder]:
        """One run per seed. `group` names a folder and further changes; see Study."""
        return [self._train(group, kind, rate, seed) for seed in self.seeds[: self.count(group, kind, seeds)]]

    def count(self, group: str, kind: str = "", seeds: int | None = None) -> int:
        """How many seeds such runs have, of the first `seeds`."""
        return 1 if {group, kind} & set(self.study.once) else len(self.seeds[:seeds])

    def rate(self, kind: str, group: str = "main") -> float:
        """The learning rate with the best sampled accuracy on the validation set; the lower one of a tie.

        Kinds that have one seed take the first seed's best.
        """
        if group == "facts" and self.study.facts_rate is not None:
            return self.study.facts_rate
        seeds = self.count(group, kind)
        if self.study.swept and kind not in self.study.swept:
            kind = "dft"
        if (kind, group, seeds) not in self._rates:
            tried = self.tried(kind, group, seeds)
            compared = max(map(len, tried.values()))
            means = {rate: np.mean(by_seed) for rate, by_seed in tried.items() if len(by_seed) == compared}
            self._rates[kind, group, seeds] = max(means, key=lambda rate: (means[rate], -rate))
        return self._rates[kind, group, seeds]

    def tried(self, kind: str, group: str = "main", seeds: int | None = None) -> dict[float, list[float]]:
        """Sampled accuracy on the validation set by learning rate: of the first seed, and of the finalists
        with the others of the first `seeds`.
        """
        tried = self._validated(group, kind, self.study.rates, 1)
        if self.study.finalists > 1:
            best = sorted(tried, key=lambda rate: (-tried[rate][0], rate))[: self.study.finalists]
            tried |= self._validated(group, kind, best, seeds)
        return tried

    def _validated(
        self, group: str, kind: str, rates: Sequence[float], seeds: int | None
    ) -> dict[float, list[float]]:
        task = self.study.facts_task if group == "facts" else self.study.validation
        trained = {rate: self.trained(group, kind, rate, seeds) for rate in rates}
        every = [folder.path for folders in trained.values() for folder in folders]
        evaluate(every, [task], limit=self.study.validation_problems)
        return {
            rate: [float(TaskResults.read(folder, task).correct_PS.mean()) for folder in folders]
            for rate, folders in trained.items()
        }

    def best(self, kind: str, group: str = "main") -> list[RunFolder]:
        """One evaluated run per seed, at the kind's best learning rate on the group's data."""
        return self.at(kind, self.rate(kind, "facts" if group == "facts" else "main"), group)

    def at(self, kind: str, rate: float, group: str = "main", seeds: int | None = None) -> list[RunFolder]:
        """One evaluated run per seed, or for the first `seeds` of them, at this learning rate."""
        tasks = [self.study.facts_task] if group == "facts" else self.study.tasks
        return self.evaluated(self.trained(group, kind, rate, seeds), tasks)

    @cached_property
    def base(self) -> list[RunFolder]:
        """The untrained base, repeated once per seed."""
        folder = RunFolder(self.out / "main" / "base")
        if not folder.begun:
            base_run(self.recipe("main", "dft", self.study.rates[0], self.seeds[0]), folder.path)
        return self.evaluated([folder]) * len(self.seeds)

    @cached_property
    def own_samples(self) -> Path:
        """The base's own verified answers to its training problems."""
        problems = {"data.sample": self.study.own_problems}
        return own_samples(
            self.recipe("own", "dft", self.rate("dft"), self.seeds[0], **problems),
            self.out / "own-samples.jsonl",
            samples=self.study.own_samples,
            max_new_tokens=self.study.own_tokens,
            overwrite=True,
        )

    @cached_property
    def sft_at_dft_entropy(self) -> list[RunFolder]:
        """SFT's runs, each at the temperature at which it has the entropy of DFT's run of that seed."""
        matched = [
            entropy_matched(
                sft, dft, self.out / "entropy-matched" / f"seed-{seed}" / "sft", self.study.tasks[0]
            )
            for seed, sft, dft in zip(self.seeds, self.best("sft"), self.best("dft"), strict=True)
        ]
        for folder in matched:  # one at a time, since each has its own temperature
            self.evaluated([folder])
        return matched

    def evaluated(self, folders: list[RunFolder], tasks: Sequence[str] = ()) -> list[RunFolder]:
        """The same folders, after they have been evaluated on the tasks; by default the test sets."""
        tasks = tasks or self.study.tasks
        limit = None if self.study.facts_task in tasks else self.study.problems
        evaluate([folder.path for folder in folders], tasks, limit=limit)
        return folders

    def _train(self, group: str, kind: str, rate: float, seed: int) -> RunFolder:
        more = {"data.source": str(self.own_samples)} if group == "own" else self.study.groups[group]
        return train_once(self.recipe(group, kind, rate, seed, **more))
