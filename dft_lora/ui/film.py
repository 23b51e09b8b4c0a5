"""Moves through the kept checkpoints of runs: tokens, probabilities and answers at each step of training.

The adapters of checkpoints are loaded over the session's one base when they are asked for. Those of the
steps that were looked at last stay in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..data.templates import Example
from ..errors import RequestError
from ..evaluation.tokens import score
from ..runs.folder import RunFolder, step_name, steps_in
from ..tasks import get_task
from .session import Answer, Question, Session, Token

KEPT = 12  # adapters of checkpoints in memory
PROBLEMS = 24  # reference solutions whose tokens the histogram counts: enough for 0.1 % steps to show
BINS = 20
FIGURES = 512  # histograms that are remembered; a few numbers each


class Film:
    """The checkpoints of runs over the session's base. Step 0 is the base itself.

    Use it for one event at a time (`events.MODEL`): an adapter may be dropped when another one is loaded.
    """

    def __init__(self, session: Session, task: str = "arithmetic"):
        self.session, self.task = session, task
        self._loaded: OrderedDict[Path, str] = OrderedDict()
        self._counts: OrderedDict[tuple[Path, str], list[int]] = OrderedDict()
        self._examples: list[Example] | None = None

    @property
    def runs(self) -> dict[str, RunFolder]:
        """The page's runs and those trained on it, by column, that kept checkpoints of two steps or more."""
        added = {name: folder.whole for name, folder in self.session.added.items()}
        return {name: f for name, f in {**self.session.folders, **added}.items() if len(kept(f)) > 1}

    def steps(self, runs: Sequence[str]) -> list[int]:
        """The steps at which all `runs` kept a checkpoint, and 0. Raises RequestError for an unknown run."""
        known = self.runs
        for run in runs:
            if run not in known:
                raise RequestError(f"run {run!r:.60} has no kept checkpoints; choose one that has")
        common = [set(kept(known[run])) for run in runs]
        return [0, *sorted(set.intersection(*common))] if common else [0]

    def tokens(
        self, runs: Sequence[str], step: int, problem: str, ids: Sequence[int]
    ) -> dict[str, list[Token]]:
        """The tokens of an answer to `problem` under each run's checkpoint of this step."""
        names = self._names(runs, step)
        scored = self.session.tokens(problem, [(name, ids) for name in names.values()])
        return dict(zip(runs, scored, strict=True))

    def histograms(self, runs: Sequence[str], step: int) -> dict[str, list[int]]:
        """Tokens of PROBLEMS reference solutions in equal steps of probability, per run."""
        found = {}
        for run, name in self._names(runs, step).items():
            key = (self._place(run, step), self.task)
            if key not in self._counts:
                self._counts[key] = self._histogram(name)
                if len(self._counts) > FIGURES:
                    self._counts.popitem(last=False)
            found[run] = self._counts[key]
        return found

    def answers(self, runs: Sequence[str], step: int, question: Question) -> Iterator[list[Answer]]:
        """The answers of each run's checkpoint, as `Session.answers` streams them."""
        names = self._names(runs, step)
        for answers in self.session.answers(question, list(names.values())):
            for i, answer in enumerate(answers):  # by place: at step 0 all runs have the same name
                answer.run = runs[i // int(question.samples)]
            yield answers

    def _names(self, runs: Sequence[str], step: int) -> dict[str, str]:
        """run -> the column of the session that is its checkpoint; the base's at step 0."""
        if step not in self.steps(runs):
            raise RequestError(f"step {step!r:.20}: choose one of {', '.join(map(str, self.steps(runs)))}")
        return {run: self._name(run, step) for run in runs}

    def _place(self, run: str, step: int) -> Path:
        return self.runs[run].checkpoints / step_name(step) if step else Path()

    def _name(self, run: str, step: int) -> str:
        place = self._place(run, step)
        if place not in self._loaded:
            while len(self._loaded) >= KEPT:
                self.session.drop(self._loaded.popitem(last=False)[1])
            name = f"{run}@{step}"
            self.session.hold(name, place / "adapter" if step else None)
            self._loaded[place] = name
        self._loaded.move_to_end(place)
        return self._loaded[place]

    def _histogram(self, name: str) -> list[int]:
        session = self.session
        if self._examples is None:
            problems = get_task(self.task).problems()[:PROBLEMS]
            self._examples = [session.renderer.render(problem) for problem in problems if problem.solution]
        with session.lock:
            table = score(
                session.model,
                self._examples,
                pad_id=session.renderer.pad_id,
                adapter=session.held[name],
                head=session.head,
            )
        return np.histogram(table.p_M, BINS, (0, 1))[0].tolist()


def kept(folder: RunFolder) -> list[int]:
    """The steps of a run's checkpoints."""
    return list(steps_in(folder.checkpoints))
