"""One pass over the logits of a chunk: sums over the entries other than the target, exp in place.

`row_kernel.py` does the same in one Triton kernel; `forward.py` chooses between them.

Everything is computed for j != target. The target's entry is known exactly from a row dot product and is
added afterwards, so 1 - p is never formed as a difference (float32 gradient error 1.6e-6 instead of 2.5e-5).

Shapes (docs/shapes.md): C rows of a chunk, F of them reduced together, V vocabulary, K entries of a top-k.
u = z - cap(shift).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head, accumulator

EXCLUDED = -1e30  # finite, so that 0 * EXCLUDED is 0 and not NaN
HALF_GAIN = 256.0  # float16 holds 256 * q: above its subnormals, below its overflow once multiplied by W
TOP_K = 20


class RowSums(NamedTuple):
    """What both passes return, over the entries j != target of each row; e_j = exp(u_j - max)."""

    max_C: Tensor
    sum_C: Tensor  # sum e_j
    dot_C: Tensor  # sum e_j (u_j - max)
    square_C: Tensor | None  # sum e_j^2
    top_CK: Tensor | None  # the K largest u_j


def torch_row_sums_(
    u_CV: Tensor, shift_C: Tensor, y_C: Tensor, head: Head, *, write: bool, needs: frozenset[str]
) -> RowSums:
    """The pass in torch operations.

    It works block by block, so that a block's float32 copies stay in the cache of a CPU core: at V = 151,936
    this halves the time of the pass. A block of one row is reduced as a vector, which torch does faster.
    """
    dtype, (C, V) = accumulator(u_CV.dtype), u_CV.shape
    block = max(1, (2**17 if u_CV.device.type == "cpu" else 2**25) // V)
    x_FV = u_CV.new_empty(min(block, C), V, dtype=dtype)
    e_FV = torch.empty_like(x_FV)
    max_C, sum_C, dot_C, square_C = x_FV.new_empty(4, C)
    top_CK = x_FV.new_empty(C, min(TOP_K, V - 1)) if "top_k_entropy" in needs else None
    bias_V = None if head.bias_V is None else head.logit_scale * head.bias_V.to(dtype)
    origin_C = head.cap(shift_C.to(dtype))
    for start in range(0, C, block):
        c = slice(start, min(start + block, C)) if block > 1 else start
        b = slice(0, min(block, C - start)) if block > 1 else 0
        u, x, e = u_CV[c], x_FV[b], e_FV[b]
        x.copy_(u)
        if bias_V is not None:
            x.add_(bias_V)
        if head.softcap is not None:
            shift = shift_C[c, None]
            x.add_(shift).div_(head.softcap).tanh_()
            slope = 1 - x * x if write else x
            x.mul_(head.softcap).sub_(origin_C[c, None])
        x.scatter_(-1, y_C[c, None], EXCLUDED)
        if top_CK is not None:
            top_CK[c] = x.topk(top_CK.shape[1]).values
        torch.amax(x, -1, out=max_C[c])
        x.sub_(max_C[c, None])
        torch.exp(x, out=e)
        sum_C[c] = e.sum(-1)
        dot_C[c] = _dot(e, x)
        if "sum_p_squared" in needs:
            square_C[c] = _dot(e, e)
        if write:
            if head.softcap is not None:
                e.mul_(slope)
            if u.dtype == torch.float16:
                e.mul_(HALF_GAIN / sum_C[c, None])
            u.copy_(e)
    return RowSums(max_C, sum_C, dot_C, square_C if "sum_p_squared" in needs else None, top_CK)


def row_sums_shapes(
    u_CV: Tensor, shift_C: Tensor, y_C: Tensor, head: Head, *, write: bool, needs: frozenset[str]
) -> RowSums:
    """The results of `row_kernel.row_sums_` without contents, for a workspace on the meta device."""
    max_C, sum_C, dot_C, square_C = u_CV.new_empty(4, len(u_CV), dtype=accumulator(u_CV.dtype))
    return RowSums(max_C, sum_C, dot_C, square_C if "sum_p_squared" in needs else None, None)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Along the last dimension."""
    return torch.dot(a, b) if a.ndim == 1 else (a * b).sum(-1)
