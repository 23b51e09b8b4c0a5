"""What answers were made with: two evaluations can be added up or compared only where it agrees.

Reports and the page read recorded protocols, so this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config import EvaluateConfig, digest
from ..data.templates import Renderer
from ..tasks import get_task
from ..tasks.base import Problem

GREEDY = -1
"""The sample number of the greedy answer."""

FORGETTING = "other-text"
"""The name under which runs are scored on a text that has nothing to do with the task."""

WEIGHTS = ("adapter", "base")
"""The fields of a protocol that name the weights; each run has its own."""


@dataclass(frozen=True)
class Protocol:
    """All that must be equal for answers to be added to those on disk.

    All but the weights (`adapter`, `base`) must be equal for two runs to be comparable, too.
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
    """The digest of the adapter; None: the bare base."""
    base: str
    """The fingerprint of the base's weights."""

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from a recorded protocol, in words."""
        found = [
            f"{k}: {other.get(k)!r} -> {v!r}"
            for k, v in asdict(self).items()
            if k not in (*WEIGHTS, "engine") and other.get(k) != v
        ]
        if (engine := other.get("engine", self.engine)) != self.engine:
            found.append(f"engine: {engine!r} -> {self.engine!r}")
        if why := other_weights(other, self.adapter, self.base):
            found.append(why)
        return found

    @classmethod
    def of(
        cls,
        task: str,
        problems: Sequence[Problem],
        settings: EvaluateConfig,
        renderer: Renderer,
        adapter: str | None,
        base: str,
    ) -> Protocol:
        """The protocol under which a run with these weights answers these problems."""
        return cls(
            task=task,
            problems=len(problems),
            problems_hash=digest([[p.id, [dict(m) for m in p.messages], p.answer] for p in problems]),
            samples=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=answer_limit(task, settings),
            template=renderer.template.name,
            template_hash=renderer.fingerprint,
            seed=settings.seed,
            engine=settings.engine,
            adapter=adapter,
            base=base,
        )


def other_weights(recorded: Mapping[str, Any], adapter: str | None, base: str) -> str | None:
    """Why answers with the `recorded` protocol are not of these weights, in words; None where they are."""
    if not set(WEIGHTS) <= set(recorded):
        return "an earlier version of dft-lora made them and did not record the weights"
    if recorded["adapter"] != adapter:
        return "the run's adapter has changed since"
    if recorded["base"] != base:
        return "the base's weights have changed since"
    return None


def answer_limit(task: str, settings: EvaluateConfig) -> int:
    """Tokens of the longest answer: evaluate.max_new_tokens where it was set, else the task's own limit."""
    longest = settings.max_new_tokens
    if "max_new_tokens" in settings.model_fields_set:
        return longest
    return min(longest, get_task(task).max_new_tokens)
