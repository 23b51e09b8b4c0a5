"""One pass over the logits of a chunk: statistics of the entries other than the target, exp in place.

Everything is computed for j != target. The target's entry is known exactly from a row dot product and is
joined afterwards, so 1 - p is never formed as a difference (float32 gradient error 1.6e-6 instead of 2.5e-5).

Shapes: C rows of a chunk, V vocabulary, K entries of a top-k. u = z - shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .head import Head, accumulator

EXCLUDED = -1e30  # finite, so that 0 * EXCLUDED is 0 and not NaN
HALF_GAIN = 256.0  # float16 holds 256 * q: above its subnormals, below its overflow once multiplied by W
TOP_K = 20


@cache
def kernel_missing() -> str:
    """Why the row pass runs in torch operations, not in the Triton kernel; empty where the kernel runs."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if find_spec("triton") else "triton is not installed"


@dataclass(frozen=True)
class OtherEntries:
    """What is known of the entries j != target of each row, relative to the row's shift."""

    max_C: Tensor  # max u_j
    lse_C: Tensor  # log sum exp u_j
    entropy_C: Tensor  # of q_j = P(j | j != target)
    gain_C: Tensor  # the workspace now holds gain * q_j * softcap'(j), and 0 at the target
    square_C: Tensor | None = None  # sum of q_j^2
    top_CK: Tensor | None = None  # the K largest u_j


def other_entries_(
    u_CV: Tensor, shift_C: Tensor, y_C: Tensor, head: Head, *, write: bool, needs: frozenset[str]
) -> OtherEntries:
    """Statistics of each row of `u_CV`, which then holds the probabilities if `write`, else rubbish.

    Goes block by block, so that a block's float32 copy stays in the cache of a CPU core: at V = 151,936 this
    halves the time of the pass.
    """
    if u_CV.is_cuda and u_CV.dtype != torch.float64 and "top_k_entropy" not in needs and not kernel_missing():
        from . import row_kernel

        return row_kernel.other_entries_(u_CV, shift_C, y_C, head, write=write, needs=needs)
    dtype, (C, V) = accumulator(u_CV.dtype), u_CV.shape
    block = max(1, (2**17 if u_CV.device.type == "cpu" else 2**25) // V)
    x_BV = u_CV.new_empty(min(block, C), V, dtype=dtype)
    e_BV = torch.empty_like(x_BV)
    bias_V = None if head.bias_V is None else head.scale * head.bias_V.to(dtype)
    blocks = []
    for u, shift, y in zip(u_CV.split(block), shift_C.split(block), y_C.split(block), strict=True):
        x, e, shift_B1 = x_BV[: len(u)], e_BV[: len(u)], shift[:, None].to(dtype)
        blocks.append(_block_(u, x, e, shift_B1, y[:, None], head, bias_V, write, needs))
    columns = (None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True))
    return OtherEntries(*columns)  # type: ignore[arg-type]


def _block_(u_BV, x_BV, e_BV, shift_B1, y_B1, head, bias_V, write, needs) -> tuple[Tensor | None, ...]:
    """The fields of OtherEntries for a block of rows; x and e are scratch."""
    x_BV.copy_(u_BV)
    if bias_V is not None:
        x_BV.add_(bias_V)
    if head.softcap is not None:
        x_BV.add_(shift_B1).div_(head.softcap).tanh_()
        slope_BV = 1 - x_BV * x_BV if write else None
        x_BV.mul_(head.softcap).sub_(shift_B1)
    x_BV.scatter_(1, y_B1, EXCLUDED)
    top_BK = x_BV.topk(min(TOP_K, x_BV.shape[1] - 1)).values if "top_k_entropy" in needs else None
    max_B = _over_row(torch.amax, x_BV)
    x_BV.sub_(max_B[:, None])
    torch.exp(x_BV, out=e_BV)
    sum_B = _over_row(torch.sum, e_BV)
    entropy_B = sum_B.log() - _dot(e_BV, x_BV) / sum_B
    square_B = _dot(e_BV, e_BV) / sum_B**2 if "sum_p_squared" in needs else None
    gain_B = sum_B
    if write:
        if head.softcap is not None:
            e_BV.mul_(slope_BV)
        if u_BV.dtype == torch.float16:
            gain_B = torch.full_like(sum_B, HALF_GAIN)
            e_BV.mul_((HALF_GAIN / sum_B)[:, None])
        u_BV.copy_(e_BV)
    return max_B, max_B + sum_B.log(), entropy_B, gain_B, square_B, top_BK


def _over_row(reduce, x_BV: Tensor) -> Tensor:
    """A reduction of each row; that of a single row as one flat reduction, which torch vectorises better."""
    return reduce(x_BV[0]).view(1) if len(x_BV) == 1 else reduce(x_BV, dim=-1)


def _dot(a_BV: Tensor, b_BV: Tensor) -> Tensor:
    return torch.dot(a_BV[0], b_BV[0]).view(1) if len(a_BV) == 1 else (a_BV * b_BV).sum(-1)
