"""The pass of `row_statistics.py` as one Triton kernel: two reads and one write of each logit, nothing else.

Pass 1 is an online max, sum and entropy; pass 2 writes exp(u - max) in place. Importing this module needs
Triton, so `forward.py` imports it on CUDA only. TRITON_INTERPRET=1 runs it on CPU tensors, for the tests.

Shapes (docs/shapes.md): C rows of a chunk, V vocabulary. u = z - cap(shift).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Head
from .row_statistics import HALF_GAIN, RowSums

BLOCK = 4096


@triton.jit
def _load(u_ptr, bias_ptr, offset, y, V, shift, origin, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """A block of u, -1e30 at the target and beyond V, and the soft-cap's slope."""
    u = tl.load(u_ptr + offset, mask=offset < V, other=0.0).to(tl.float32)
    slope = tl.full(u.shape, 1.0, tl.float32)
    if BIAS:
        u += tl.load(bias_ptr + offset, mask=offset < V, other=0.0)
    if CAP:
        t = 2 * tl.sigmoid(2 * (u + shift) / cap) - 1
        u = cap * t - origin
        slope = 1 - t * t
    return tl.where((offset < V) & (offset != y), u, -1e30), slope


@triton.jit
def _rows(
    u_ptr, stride, y_ptr, shift_ptr, origin_ptr, bias_ptr, max_ptr, sum_ptr, dot_ptr, square_ptr, V, cap,
    gain, BIAS: tl.constexpr, CAP: tl.constexpr, WRITE: tl.constexpr, GAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u_ptr += row * stride
    y = tl.load(y_ptr + row)
    shift = tl.load(shift_ptr + row).to(tl.float32)
    origin = tl.load(origin_ptr + row)
    cap = tl.cast(cap, tl.float32)
    m, s, d, q = -1e30, 0.0, 0.0, 0.0  # max; sums of e, e * (u - m) and e^2, where e = exp(u - m)
    for start in range(0, V, BLOCK):
        u, _ = _load(u_ptr, bias_ptr, start + tl.arange(0, BLOCK), y, V, shift, origin, cap, BIAS, CAP)
        larger = tl.maximum(m, tl.max(u, axis=0))
        e = tl.exp(u - larger)
        rescale = tl.exp(m - larger)
        d = rescale * (d + s * (m - larger)) + tl.sum(e * (u - larger), axis=0)
        s = rescale * s + tl.sum(e, axis=0)
        q = rescale * rescale * q + tl.sum(e * e, axis=0)
        m = larger
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    tl.store(dot_ptr + row, d)
    tl.store(square_ptr + row, q)
    if WRITE:
        factor = tl.cast(gain, tl.float32) / s if GAIN else 1.0
        for start in range(0, V, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            u, slope = _load(u_ptr, bias_ptr, offset, y, V, shift, origin, cap, BIAS, CAP)
            e = tl.exp(u - m) * slope * factor
            tl.store(u_ptr + offset, e.to(u_ptr.dtype.element_ty), mask=offset < V)


def row_sums_(
    u_CV: Tensor, shift_C: Tensor, y_C: Tensor, head: Head, *, write: bool, needs: frozenset[str]
) -> RowSums:
    """The kernel's version of the pass in `row_statistics.py`, without the top-k."""
    C, V = u_CV.shape
    max_C, sum_C, dot_C, square_C = u_CV.new_empty(4, C, dtype=torch.float32)
    bias_V = None if head.bias_V is None else head.logit_scale * head.bias_V.float()
    with torch.cuda.device_of(u_CV):  # Triton launches on the current device, wherever the tensors are
        _rows[(C,)](
            u_CV, u_CV.stride(0), y_C, shift_C, head.cap(shift_C.float()),
            max_C if bias_V is None else bias_V, max_C, sum_C, dot_C, square_C, V, float(head.softcap or 1.0),
            HALF_GAIN, BIAS=bias_V is not None, CAP=head.softcap is not None, WRITE=write,
            GAIN=u_CV.dtype == torch.float16, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return RowSums(max_C, sum_C, dot_C, square_C if "sum_p_squared" in needs else None, None)
