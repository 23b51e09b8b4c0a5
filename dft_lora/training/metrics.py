"""The figures of a step: sums over its supervised tokens, divided once at its end."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..data.batches import Batch
from ..loss import TokenScores


class Totals(NamedTuple):
    """Sums over the supervised tokens of a step: the plain figures, whatever the objective."""

    loss: float
    nll: float
    probability: float
    entropy: float
    top1: float
    scored: float
    tokens: float
    positions: float
    """Tokens and padding."""
    skipped_rows: float
    skip_bound: float
    """Sum over micro-batches, so a bound of the error that `train.skip_rows` made in the summed gradient."""


class Sums:
    """The running `Totals` of one rank, on its device, and each micro-batch's own loss."""

    def __init__(self, device: torch.device):
        self.values = torch.zeros(len(Totals._fields), dtype=torch.float64, device=device)
        self.parts: list[tuple[torch.Tensor, tuple[str, ...]]] = []

    def add(self, loss: torch.Tensor, scores: TokenScores, batch: Batch) -> None:
        logp_M = scores.logp.detach().double()
        parts = (loss.detach(), -logp_M.sum(), logp_M.exp().sum(), scores.entropy.sum(), scores.is_top1.sum())
        counts = [logp_M.numel(), batch.tokens, batch.positions, scores.skipped_rows, scores.skip_bound]
        self.values += torch.cat(
            [torch.stack([part.double() for part in parts]), self.values.new_tensor(counts)]
        )
        self.parts.append((loss.detach(), batch.ids))

    def suspects(self) -> list[str]:
        """Examples of the micro-batches whose loss is not finite; [] while the sum is."""
        if math.isfinite(self.values[0]):
            return []
        return [name for loss, ids in self.parts if not math.isfinite(loss) for name in ids]


def finite(value: float) -> float | None:
    """A number for JSON, which knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None
