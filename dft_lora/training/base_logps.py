"""log p of a step's rows under the base, for objectives that compare with it (`iw-sft`, `dpo`, a KL).

They are computed when a step first needs them, by all ranks together, and kept as long as the examples are.
Checkpoints contain them (4 bytes per supervised token), since in another micro-batch they would differ in the
last bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..data.batches import Group, examples_of
from ..data.templates import Example

SIGNAL = "reference_logp"


class BaseLogps:
    """`score(examples)`: log p [T] of each example's supervised tokens; a pass that all ranks make together.

    `alike`: such a pass needs equally many examples from every rank.
    """

    def __init__(self, alike: bool):
        self.alike = alike
        self.known: WeakKeyDictionary[Example, array[float]] = WeakKeyDictionary()

    def marked(
        self, groups: Sequence[Group], score: Callable[[list[Example]], list[torch.Tensor]]
    ) -> list[Group]:
        """The groups, with the signal `reference_logp` of every example."""
        missing = [e for e in dict.fromkeys(examples_of(groups)) if e not in self.known]
        if missing and self.alike:
            missing = examples_of(groups)
        if missing:
            for example, logp_T in zip(missing, score(missing), strict=True):
                self.known.setdefault(example, array("f", logp_T.tolist()))
        return [
            tuple(
                replace(example, signals={**example.signals, SIGNAL: self.known[example]})
                for example in group
            )
            for group in groups
        ]

    def state(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What a checkpoint keeps of these groups; {} for nothing."""
        kept = [self.known.get(example, array("f")) for example in examples_of(groups)]
        if not any(kept):
            return {}
        joined = bytearray(b"".join(some.tobytes() for some in kept if some))
        return {
            "lengths": [len(some) for some in kept],
            "logp": torch.frombuffer(joined, dtype=torch.float32),
        }

    def restore(self, groups: Sequence[Group], state: dict[str, Any]) -> None:
        """The reverse of `state`, for the same groups."""
        if not state:
            return
        each = state["logp"].split(state["lengths"])
        for example, logp_T in zip(examples_of(groups), each, strict=True):
            if len(logp_T):
                self.known[example] = array("f", logp_T.tolist())
