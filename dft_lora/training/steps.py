"""What an optimizer step is made of: groups of examples, the same whenever the same step is asked for.

A run that resumes asks for the groups of a step again, so a source is a pure function of the step and of what
a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..data.batches import Group, step_indices


class StepSource(Protocol):
    """Gives the groups of each step: fixed examples, preference pairs, rollouts of the current policy."""

    def groups(self, step: int) -> list[Group]:
        """The groups of optimizer step `step` (from 0), over all ranks."""


@dataclass(frozen=True)
class FixedGroups:
    """Groups that are known before the run, `per_step` of them, in an order that the seed fixes."""

    known: Sequence[Group]
    per_step: int
    seed: int

    def groups(self, step: int) -> list[Group]:
        """See StepSource."""
        return [self.known[i] for i in step_indices(len(self.known), self.per_step, self.seed, step)]
