"""Ours and every peer as one value each: DFT's loss, forward and backward to the hidden states.

Peers are imported late, where their variant runs; a missing one is reported by name, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..loss import naive_token_logps, objective, token_logps
from .inputs import Inputs

GEMM_ROWS = 512
DFT = objective("dft")


@dataclass(frozen=True)
class LossVariant:
    """`run(hidden, inputs)` leaves the gradient of the summed DFT loss in `hidden.grad`."""

    name: str
    run: Callable[[Tensor, Inputs], None]
    package: str | None = None
    needs_cuda: bool = False
    exact: bool = True  # False: no DFT gradient comes out, so its error is not measured

    def missing(self, device: str) -> str:
        """Why it cannot run here; empty when it can."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.needs_cuda and device == "cpu":
            return "needs a CUDA GPU"
        if self.run in (torch_sum, torch_none) and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} does not have it"
        return ""


def dft(logp: Tensor) -> Tensor:
    return -(logp.detach().exp() * logp).sum()


def supervised_rows(h_ND: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    return h_ND[x.supervised], x.targets_N[x.supervised]


def bare_gemms(h_ND: Tensor, x: Inputs) -> None:
    """The floor: logits, and a product of the same size back, in chunks of 512 supervised rows."""
    h_MD = h_ND.detach()[x.supervised]
    u_CV = h_MD.new_empty(GEMM_ROWS, len(x.weight_VD))
    g_MD = torch.empty_like(h_MD)
    for h_CD, g_CD in zip(h_MD.split(GEMM_ROWS), g_MD.split(GEMM_ROWS), strict=True):
        u = torch.mm(h_CD, x.weight_VD.t(), out=u_CV[: len(h_CD)])
        torch.mm(u, x.weight_VD, out=g_CD)


def ours(h_ND: Tensor, x: Inputs) -> None:
    DFT(token_logps(h_ND, x.weight_VD, x.targets_N)).backward()


def ours_unchecked(h_ND: Tensor, x: Inputs) -> None:
    DFT(token_logps(h_ND, x.weight_VD, x.targets_N, check_values=False)).backward()


def ours_skipping(h_ND: Tensor, x: Inputs) -> None:
    scores = token_logps(h_ND, x.weight_VD, x.targets_N, skip=1e-3, token_weight=DFT.token_weight)
    DFT(scores).backward()


def naive_all(h_ND: Tensor, x: Inputs) -> None:
    """What transformers does with labels: all rows, and a float32 copy of the logits."""
    z_NV = (h_ND @ x.weight_VD.t()).float()
    dft(-F.cross_entropy(z_NV, x.targets_N, reduction="none", ignore_index=-100)[x.supervised]).backward()


def naive_supervised(h_ND: Tensor, x: Inputs) -> None:
    DFT(naive_token_logps(h_ND, x.weight_VD, x.targets_N)).backward()


def checkpointed(h_ND: Tensor, x: Inputs) -> None:
    """Chunks of 256 supervised rows whose logits are recomputed in the backward pass."""

    def part(h_CD: Tensor, y_C: Tensor) -> Tensor:
        return dft(-F.cross_entropy((h_CD @ x.weight_VD.t()).float(), y_C, reduction="none"))

    h_MD, y_M = supervised_rows(h_ND, x)
    parts = zip(h_MD.split(256), y_M.split(256), strict=True)
    torch.stack([checkpoint(part, h, y, use_reentrant=False) for h, y in parts]).sum().backward()


def torch_sum(h_ND: Tensor, x: Inputs) -> None:
    """Plain cross-entropy: with a sum torch can keep the gradient, but knows no token weights."""
    h_MD, y_M = supervised_rows(h_ND, x)
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(h_MD, x.weight_VD, y_M, reduction="sum", options=options).backward()


def torch_none(h_ND: Tensor, x: Inputs) -> None:
    h_MD, y_M = supervised_rows(h_ND, x)
    options = torch.nn.LinearCrossEntropyOptions()
    dft(-F.linear_cross_entropy(h_MD, x.weight_VD, y_M, reduction="none", options=options)).backward()


def trl(h_MD: Tensor, y_M: Tensor, weight_VD: Tensor) -> Tensor:
    """TRL's per-token log-probabilities with the outputs its SFT trainer asks for."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    outputs = ("log_probs", "entropy", "is_top1")
    return ChunkedLogProbFunction.apply(h_MD, weight_VD, None, y_M, 1.0, width, None, 1.0, outputs)[0]


def trl_as_it_runs(h_ND: Tensor, x: Inputs) -> None:
    """Its fused head scores every position where Triton is missing, supervised ones on a GPU."""
    if h_ND.is_cuda:
        return trl_compacted(h_ND, x)
    logp_N = trl(h_ND, x.targets_N.clamp(min=0), x.weight_VD)
    dft(logp_N.masked_fill(x.targets_N == -100, 0)).backward()


def trl_compacted(h_ND: Tensor, x: Inputs) -> None:
    dft(trl(*supervised_rows(h_ND, x), x.weight_VD)).backward()


def liger(h_ND: Tensor, x: Inputs) -> None:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", use_token_scaling=True)
    loss(x.weight_VD, h_ND, x.targets_N).backward()


def apple(h_ND: Tensor, x: Inputs) -> None:
    from cut_cross_entropy import linear_cross_entropy

    h_MD, y_M = supervised_rows(h_ND, x)
    dft(-linear_cross_entropy(h_MD, x.weight_VD, y_M, reduction="none")).backward()


FLOOR = LossVariant("two bare GEMMs, 512 rows", bare_gemms, exact=False)
OURS = LossVariant("ours", ours)
VARIANTS = [
    FLOOR,
    OURS,
    LossVariant("ours, values unchecked", ours_unchecked),
    LossVariant("ours, skip 1e-3", ours_skipping),
    LossVariant("naive, all rows, float32 copy (transformers)", naive_all),
    LossVariant("naive, supervised rows", naive_supervised),
    LossVariant("checkpointed chunks of 256 rows", checkpointed),
    LossVariant("torch linear_cross_entropy, sum (plain CE)", torch_sum, exact=False),
    LossVariant("torch linear_cross_entropy, none, then DFT", torch_none),
    LossVariant("TRL fused head, DFT, as it runs", trl_as_it_runs, "trl"),
    LossVariant("TRL fused head, DFT, supervised rows", trl_compacted, "trl"),
    LossVariant("Liger fused linear CE, token scaling", liger, "liger_kernel", needs_cuda=True),
    LossVariant("Apple CCE, then DFT", apple, "cut_cross_entropy", needs_cuda=True),
]
