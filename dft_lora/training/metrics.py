"""The metrics of a step: sums over its supervised tokens, divided once at its end."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..data.batches import Batch
from ..loss import TokenScores
from ..model.accelerator import accelerator


class Totals(NamedTuple):
    """Sums over the supervised tokens of a step: plain metrics, independent of the objective."""

    loss: float
    nll: float
    probability: float
    entropy: float
    top1: float
    end_probability: float
    ends: float
    """Examples: each has one end token, its last."""
    scored: float
    tokens: float
    positions: float
    """Tokens and padding."""
    skipped_rows: float
    skip_bound: float
    """Sum over micro-batches: a bound of the error that `train.skip_rows` causes in the summed gradient."""


class Sums:
    """The running `Totals` of one rank, on its device, and each micro-batch's own loss."""

    def __init__(self, device: torch.device):
        self.values = _zeros(len(Totals._fields), device)
        self.parts: list[tuple[torch.Tensor, tuple[str, ...]]] = []

    def add(self, loss: torch.Tensor, scores: TokenScores, batch: Batch) -> None:
        logp_M, is_end_M = scores.logp.detach().to(self.values), scores.is_end
        p_M = logp_M.exp()
        parts = (
            loss.detach(),
            -logp_M.sum(),
            p_M.sum(),
            scores.entropy.sum(),
            scores.is_top1.sum(),
            (p_M * is_end_M).sum(),
            is_end_M.sum(),
        )
        counts = [logp_M.numel(), batch.tokens, batch.positions, scores.skipped_rows, scores.skip_bound]
        self.values += torch.cat(
            [torch.stack([part.to(self.values) for part in parts]), self.values.new_tensor(counts)]
        )
        self.parts.append((loss.detach(), batch.ids))

    def suspects(self) -> list[str]:
        """Examples of the micro-batches whose loss is not finite; [] if the sum is finite."""
        if math.isfinite(self.values[0]):
            return []
        return [name for loss, ids in self.parts if not math.isfinite(loss) for name in ids]


class ExampleLogps:
    """log p of the tokens of each example by its id, and their values with a value head; on the CPU."""

    def __init__(self, device: torch.device):
        self.values = _zeros(0, device)  # nothing is summed over ranks
        self.by_id: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def add(self, scores: TokenScores, batch: Batch) -> None:
        example_M, value_M = scores.need("sequence"), scores.signals.get("value")
        for place, name in enumerate(batch.ids):
            chosen_M = example_M == place
            value_T = None if value_M is None else value_M[chosen_M].cpu()
            self.by_id[name] = scores.logp[chosen_M].cpu(), value_T


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    """Zeros to sum into, in the device's widest floating-point numbers."""
    return torch.zeros(count, dtype=accelerator(device).widest_float, device=device)


def finite(value: float) -> float | None:
    """A number for JSON, which has neither NaN nor infinity: None for those."""
    return value if math.isfinite(value) else None
