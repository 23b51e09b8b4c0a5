"""The protocol of an evaluation: what must be equal for answers to be comparable.

Reports and the page read recorded protocols, so this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..config import EvaluateConfig, digest
from ..data.templates import Renderer, shown
from ..tasks.base import Problem, Task

GREEDY = -1
"""The sample number of the greedy answer."""

FORGETTING = "other-text"
"""The name of an English text, unrelated to any task, that every run is scored on to measure forgetting."""

WEIGHTS = ("adapter", "base")
"""The fields of a protocol that name the weights; each run has its own."""


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal for new answers to be added to those on disk.

    Two runs are comparable when everything but their weights (`adapter`, `base`) is equal.
    """

    task: str
    problems: int
    problems_hash: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    template: str
    template_hash: str
    seed: int
    engine: str
    adapter: str | None
    """The digest of the adapter; None for the bare base."""
    base: str
    """The fingerprint of the base's weights."""
    file: str | None = None
    """sha256 of the content of an own test set."""
    shots: int = 0
    stop: tuple[str, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """The protocol as JSON values. Fields at their defaults are left out, as earlier versions did."""
        return {
            f.name: list(value) if isinstance(value, tuple) else value
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default or f.default is MISSING
        }

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The differences from a recorded protocol, each as text for an error message."""
        mine = self.recorded()
        differing = [
            f.name
            for f in fields(self)
            if f.name not in (*WEIGHTS, "engine") and other.get(f.name) != mine.get(f.name)
        ]
        if {"problems", "file"} & {*differing}:  # other problems have another hash
            differing = [name for name in differing if name != "problems_hash"]
        found = [f"{name}: {said(name, other)} -> {said(name, mine)}" for name in differing]
        if (engine := other.get("engine", self.engine)) != self.engine:
            found.append(f"engine: {engine!r} -> {self.engine!r}")
        if why := other_weights(other, self.adapter, self.base):
            found.append(why)
        return found

    @classmethod
    def of(
        cls,
        task: Task,
        problems: Sequence[Problem],
        settings: EvaluateConfig,
        renderer: Renderer,
        adapter: str | None,
        base: str,
    ) -> Protocol:
        """The protocol for a run with these weights on these problems.

        Where answers are chosen by log-likelihood, or solutions only scored, there are no samples, and no
        setting of sampling counts.
        """
        sampled = not task.by_likelihood and any(map(task.judges, problems))
        drawn = {
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_new_tokens": answer_limit(task, settings),
            "seed": settings.seed,
        }
        return cls(
            task=task.name,
            problems=len(problems),
            problems_hash=digest([_identity(problem) for problem in problems]),
            **(drawn if sampled else dict.fromkeys(drawn, 0)),
            template=renderer.template.name,
            template_hash=renderer.fingerprint,
            engine=settings.engine,
            adapter=adapter,
            base=base,
            file=task.file,
            shots=settings.shots,
            stop=settings.stop if sampled else (),
        )


def said(field: str, protocol: Mapping[str, Any]) -> str:
    """A field of a recorded protocol in an error message."""
    value = protocol.get(field, {"shots": 0, "stop": []}.get(field))
    if field == "template":
        return shown(str(value))
    return str(value)[:8] if field in ("file", "problems_hash", "template_hash") else repr(value)


def _identity(problem: Problem) -> list[Any]:
    """What makes two problems the same; of multiple choice also the choices."""
    turns = [dict(turn) for turn in problem.messages]
    choices = [list(problem.choices), problem.ending] if problem.choices else []
    return [problem.id, turns, problem.answer, *choices]


def other_weights(recorded: Mapping[str, Any], adapter: str | None, base: str) -> str | None:
    """Why these weights did not give the answers with the `recorded` protocol; None if they did."""
    if not set(WEIGHTS) <= set(recorded):
        return "they were made by an earlier version of dft-lora, which did not record the weights"
    if recorded["adapter"] != adapter:
        return "the run's adapter has changed since then"
    if recorded["base"] != base:
        return "the base's weights have changed since then"
    return None


def answer_limit(task: Task, settings: EvaluateConfig) -> int:
    """The most tokens of an answer: evaluate.max_new_tokens where it was set, else the task's own limit."""
    longest = settings.max_new_tokens
    if "max_new_tokens" in settings.model_fields_set:
        return longest
    return min(longest, task.max_new_tokens)
