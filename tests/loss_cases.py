"""Heads, batches and the oracle shared by the tests of the loss engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dft_lora.loss import REFERENCE_NEEDS, TokenScores, naive_token_logps, token_logps

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.4},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 6.0},
}
ITEM = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Case:
    """One batch in float64; `tensors` are (hidden, weight, bias, reference hidden)."""

    tensors: tuple[Tensor, ...]
    targets: Tensor
    sequence: Tensor
    head: dict = field(default_factory=dict)

    @classmethod
    def make(cls, N=13, D=7, V=31, head="plain", supervised="some", seed=0, spread=2.0) -> Case:
        """Targets are drawn from the model itself, so that every probability occurs as often as it says."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        hidden, weight = spread * normal(N, D), normal(V, D) / D**0.5
        tensors = hidden, weight, normal(V), hidden + 0.3 * normal(N, D)
        targets = (hidden @ weight.T).softmax(-1).multinomial(1, generator=g)[:, 0]
        if supervised == "some":
            targets[torch.rand(N, generator=g) < 0.4] = -100
            targets[N // 2] = -100
        elif supervised == "none":
            targets[:] = -100
        return cls(tensors, targets, torch.arange(N) // 4, HEADS[head])

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, tensors=tuple(tensor.to(dtype) for tensor in self.tensors))

    def on(self, device: str) -> Case:
        moved = tuple(tensor.to(device) for tensor in self.tensors)
        return replace(
            self, tensors=moved, targets=self.targets.to(device), sequence=self.sequence.to(device)
        )

    def score(self, scorer, trained=("hidden",), **more) -> tuple[TokenScores, list[Tensor]]:
        """(scores, the leaves that require grad) by `token_logps` or `naive_token_logps`."""
        names = ("hidden", "weight", "bias")
        leaves = [tensor.detach().clone() for tensor in self.tensors]
        for name, leaf in zip(names, leaves[:3], strict=True):
            leaf.requires_grad_(name in trained)
        hidden, weight, bias, reference_hidden = leaves
        options = dict(self.head)
        options["bias"] = bias if options.get("bias") else None
        more = {"sequence": self.sequence, **more}
        if scorer is naive_token_logps:
            more["reference_hidden"] = reference_hidden
        elif "reference_logp" not in more.get("signals", ()) and REFERENCE_NEEDS & set(more.get("needs", ())):
            with torch.no_grad():
                more["reference"] = token_logps(
                    reference_hidden, weight, self.targets, keep_jacobian=True, **options
                )
        scores = scorer(hidden, weight, self.targets, **options, **more)
        return scores, [leaf for leaf in leaves if leaf.requires_grad]


def chunk_bytes(rows: int, V: int, dtype: torch.dtype) -> int:
    return rows * V * ITEM[dtype]


def distance(a: Tensor, truth: Tensor) -> float:
    """Relative error; absolute where the truth is zero."""
    norm = float(truth.detach().double().norm())
    return float((a.detach().double() - truth.detach().double()).norm()) / (norm or 1.0)
