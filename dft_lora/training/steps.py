"""What an optimizer step consists of: groups of examples, the same each time the same step is requested.

A resumed run requests the groups of a step again, so a source must be a pure function of the step and of the
contents of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..data.batches import Group, step_indices


class StepSource(Protocol):
    """Provides the groups of each step: fixed examples, preference pairs, rollouts of the current policy."""

    def groups(self, step: int) -> list[Group]:
        """The groups of optimizer step `step` (from 0), over all ranks."""


@dataclass(frozen=True)
class FixedGroups:
    """Groups that are known before the run, `per_step` of them at a time, in an order given by the seed."""

    known: Sequence[Group]
    per_step: int
    seed: int

    def groups(self, step: int) -> list[Group]:
        """See StepSource."""
        return [self.known[i] for i in step_indices(len(self.known), self.per_step, self.seed, step)]
