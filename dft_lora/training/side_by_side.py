"""Several runs in training in turn, step by step, over one base in memory: what the page's Train tab shows.

Each is an ordinary run (`loop.Run`) with its own adapter, optimizer, random state and folder. It trains, bit
for bit, what `dft-lora train` trains from its recipe alone, and either of the two can resume the other.

    runs = SideBySide(recipes)
    while not runs.complete:
        figures = runs.step()
    runs.finish()               # or runs.save(), and later SideBySide(recipes, resume=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config import Recipe
from ..data.templates import Example
from ..errors import RequestError
from ..model.generate import Request, generate
from ..model.load import load_base, twin
from ..runs.folder import RunFolder
from .checkpoints import random_state, set_random_state
from .loop import Run
from .plan import make_plan
from .ranks import Ranks
from .resume_guard import at_commit
from .rollouts import ADAPTER

MAY_DIFFER = ("name", "output", "objective")


class SideBySide:
    """Runs over one base whose recipes differ only in MAY_DIFFER, so that they see the same batches.

    Raises a RequestError like `train`, also for recipes that differ elsewhere, before a model is loaded.
    """

    def __init__(self, recipes: Sequence[Recipe], *, resume: bool = False):
        shared = [recipe.model_dump(exclude=set(MAY_DIFFER)) for recipe in recipes]
        for name, value in shared[0].items():
            if any(other[name] != value for other in shared):
                raise RequestError(f"{name}: runs side by side differ only in their objective; make it equal")
        if recipes[0].model.backend != "plain" or recipes[0].train.shard:
            raise RequestError("model.backend, train.shard: runs side by side need plain, unsharded")
        recipes = [at_commit(recipe, resume) for recipe in recipes]
        plans = [make_plan(recipe) for recipe in recipes]
        if plans[0].problems:
            raise RequestError("objective.name: runs side by side learn from solutions; choose sft or dft")
        self.plan = plans[0]
        self.device = Ranks(recipes[0]).device
        self.base, hardware = load_base(recipes[0].model, self.device)
        self.runs: dict[str, Run] = {}
        self._random: dict[str, torch.Tensor] = {}
        for plan in plans:
            name = plan.recipe.name
            self.runs[name] = Run(plan, resume=resume, base=(twin(self.base), hardware))
            self._random[name] = random_state(self.device)

    @property
    def done(self) -> int:
        """Steps that every run has made."""
        return min(run.trainer.done for run in self.runs.values())

    @property
    def complete(self) -> bool:
        return all(run.complete for run in self.runs.values())

    def step(self) -> dict[str, dict[str, Any]]:
        """One optimizer step of each run, saved if due; returns each run's line of `metrics.jsonl`.

        A run that is ahead, because the other was killed before its checkpoint, waits.
        """
        step, figures = self.done, {}
        for name, run in self.runs.items():
            if run.trainer.done == step:
                with self._turn(name):
                    figures[name] = run.step()
                    run.save_if_due()
        return figures

    def save(self) -> None:
        """Save a checkpoint of each run that has made a step."""
        for name, run in self.runs.items():
            if run.trainer.done:
                with self._turn(name):
                    run.save_if_due(asked=True)

    def finish(self) -> list[RunFolder]:
        """Write the final adapters, after the last step."""
        return [run.finish() for run in self.runs.values()]

    def probabilities(self, example: Example) -> dict[str, list[float]]:
        """The probability of each supervised token of `example` under each run, as it is now."""
        found = {}
        for name, run in self.runs.items():
            learner = run.trainer.learner
            layout, retreats = learner.layout, [*learner.retreats]
            found[name] = learner.example_logps([example], run.trainer.done)[0][0].exp().tolist()
            learner.layout, learner.retreats = layout, retreats  # what a look needs is not the run's
        return found

    def answers(self, prompt_ids: Sequence[int], max_new_tokens: int) -> dict[str, str]:
        """Each run's greedy answer to a prompt, as it is now."""
        found = {}
        for name, run in self.runs.items():
            model = run.trainer.learner.adapter_model.eval()
            try:
                found[name] = self._answer(model, ADAPTER, prompt_ids, max_new_tokens)
            finally:
                model.train()
        return found

    def base_answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> str:
        """The greedy answer of the base."""
        return self._answer(self.base, None, prompt_ids, max_new_tokens)

    def _answer(self, model: Any, adapter: str | None, prompt_ids: Sequence[int], most: int) -> str:
        renderer = self.plan.renderer
        request = Request(tuple(prompt_ids), adapter, seed=0, temperature=0, max_new_tokens=most)
        (said,) = generate(model, [request], stop_ids=renderer.stop_ids, pad_id=renderer.pad_id)
        return renderer.decode(said.ids)

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """While open, the process's random state is that of one run, which keeps it for its next turn."""
        set_random_state(self._random[name], self.device)
        try:
            yield
        finally:
            self._random[name] = random_state(self.device)
