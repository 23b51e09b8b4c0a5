"""What an optimizer step consists of: groups of examples, the same each time the same step is requested.

A resumed run requests the groups of a step again, so a source must be a pure function of the step and of the
contents of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ..data.batches import Group, step_indices


class StepSource(Protocol):
    """Provides the groups of each step: fixed examples, preference pairs, rollouts of the current policy."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What the metrics record about the groups of the latest step."""

    def upcoming(self, step: int) -> Sequence[Group]:
        """The known groups that step `step` and those after it may ask for; the same after `restore`."""

    def groups(self, step: int) -> list[Group]:
        """The groups of optimizer step `step` (from 0), over all ranks."""

    def kept(self, step: int) -> dict[str, Any]:
        """What a checkpoint must contain for step `step` and those after it; {} for nothing."""

    def restore(self, kept: dict[str, Any]) -> None:
        """Continue with what `kept` returned."""


@dataclass(frozen=True)
class FixedGroups:
    """Groups that are known before the run, `per_step` of them at a time, in an order given by the seed.

    Without a seed they are taken once, as they are.
    """

    known: Sequence[Group]
    per_step: int
    seed: int | None
    figures: ClassVar[Mapping[str, float]] = {}

    def groups(self, step: int) -> list[Group]:
        """See StepSource."""
        if self.seed is None:
            return list(self.known[step * self.per_step : (step + 1) * self.per_step])
        return [self.known[i] for i in step_indices(len(self.known), self.per_step, self.seed, step)]

    def upcoming(self, step: int) -> Sequence[Group]:
        """See StepSource. Without a seed, past groups do not come again."""
        return self.known if self.seed is not None else self.known[step * self.per_step :]

    def kept(self, step: int) -> dict[str, Any]:
        """See StepSource."""
        return {}

    def restore(self, kept: dict[str, Any]) -> None:
        """See StepSource."""
