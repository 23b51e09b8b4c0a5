"""One chunked pass with two GEMMs: log-probabilities of the targets, and their derivatives.

For a frozen head the derivative of the target's log-probability is one D-vector per token,

    J_t = d logp_t / d h_t = (1 - p_t) * (W_t - sum over j != t of q_j W_j),    q_j = P_j / (1 - p_t)

(each W_j times logit scale and soft-cap slope). It does not depend on the loss, so it is computed while the
logits exist; the backward pass is `g_logp * J + g_lse * (W_t - J)`, whatever the objective.

Shapes (docs/shapes.md): M supervised tokens, C rows of a chunk, A of them active (not skipped), D hidden
width, V vocabulary, K entries of a top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head, Target, accumulator
from .row_statistics import HALF_GAIN, TOP_K, RowSums, row_sums_shapes, torch_row_sums_

log = logging.getLogger(__name__)


class OtherEntries(NamedTuple):
    """Statistics of the entries j != target of each row, relative to the row's capped shift."""

    max_C: Tensor  # max u_j
    lse_C: Tensor  # log sum exp u_j
    entropy_C: Tensor  # of q_j = P(j | j != target)
    gain_C: Tensor  # the workspace now holds gain * q_j * softcap'(j), and 0 at the target
    square_C: Tensor | None  # sum of q_j^2
    top_CK: Tensor | None  # the K largest u_j


@dataclass(frozen=True)
class Skip:
    """Drop rows of the second GEMM while their summed `2 w (1 - p)` stays under `budget` of the total."""

    budget: float
    token_weight: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowScores:
    """Results of one pass over the supervised tokens; float32 (float64 for a float64 model) unless noted."""

    logp_M: Tensor
    lse_M: Tensor
    raw_M: Tensor  # the target's logit before the soft-cap
    entropy_M: Tensor
    is_top1_M: Tensor  # bool
    sum_p_squared_M: Tensor | None
    top_k_entropy_M: Tensor | None
    jacobian_MD: Tensor | None  # the model's dtype
    skipped_rows: int = 0
    skip_bound: float = 0.0


@torch.no_grad()
def score_rows(
    head: Head,
    h_MD: Tensor,
    y_M: Tensor,
    rows: int,
    *,
    jacobian: bool,
    needs: frozenset[str],
    skip: Skip | None,
) -> RowScores:
    """One pass over the supervised tokens in chunks of `rows`: one GEMM, or two with the Jacobian."""
    dtype, M = accumulator(h_MD.dtype), len(h_MD)
    logp_M, lse_M, raw_M, entropy_M = (h_MD.new_empty(M, dtype=dtype) for _ in range(4))
    top1_M = torch.empty(M, dtype=torch.bool, device=h_MD.device)
    square_M = torch.empty_like(logp_M) if "sum_p_squared" in needs else None
    top_M = torch.empty_like(logp_M) if "top_k_entropy" in needs else None
    jacobian_MD = torch.empty_like(h_MD) if jacobian else None
    skipped, skipped_squares = 0, h_MD.new_zeros((), dtype=dtype)
    workspace_CV = h_MD.new_empty(min(rows, M), len(head.weight_VD))
    for start in range(0, M, rows):
        c = slice(start, min(start + rows, M))
        h_CD, y_C, u_CV = h_MD[c], y_M[c], workspace_CV[: c.stop - start]
        target, others, delta_C = chunk_probabilities_(u_CV, head, h_CD, y_C, write=jacobian, needs=needs)
        odds_C = others.lse_C - delta_C  # log((1 - p) / p)
        logp_C, logq_C = -_softplus(odds_C), -_softplus(-odds_C)
        p_C, q_C = logp_C.exp(), logq_C.exp()
        logp_M[c], lse_M[c], raw_M[c] = logp_C, target.logit_C - logp_C, target.raw_C
        entropy_M[c] = q_C * (others.entropy_C - logq_C) - p_C * logp_C
        top1_M[c] = delta_C >= others.max_C
        if square_M is not None and others.square_C is not None:
            square_M[c] = p_C**2 + q_C**2 * others.square_C
        if top_M is not None and others.top_CK is not None:
            top_M[c] = _top_k_entropy(torch.cat([others.top_CK, delta_C[:, None]], dim=1))
        if jacobian_MD is None:
            continue
        if skip is None:
            jacobian_MD[c] = _jacobian(head, u_CV, target.row_CD, q_C, others.gain_C)
        else:
            l1_C = 2 * skip.token_weight(logp_C).to(dtype) * q_C
            active_A, dropped = _within_budget(l1_C, skip.budget)
            order_A = _front_(u_CV, active_A)
            jacobian_MD[c] = 0
            jacobian_MD[c][order_A] = _jacobian(
                head, u_CV[: len(order_A)], target.row_CD[order_A], q_C[order_A], others.gain_C[order_A]
            ).to(h_MD.dtype)
            skipped += len(dropped)
            skipped_squares += (l1_C[dropped] ** 2).sum()
    bound = head.largest_row_norm() * float(skipped_squares.sqrt()) if skipped else 0.0
    return RowScores(logp_M, lse_M, raw_M, entropy_M, top1_M, square_M, top_M, jacobian_MD, skipped, bound)


def chunk_probabilities_(
    u_CV: Tensor, head: Head, h_CD: Tensor, y_C: Tensor, *, write: bool, needs: frozenset[str] = frozenset()
) -> tuple[Target, OtherEntries, Tensor]:
    """Writes a chunk's logits into the workspace; returns target, other entries, and z_t - cap(shift).

    The shift is the target's logit rounded to the workspace's dtype. The subtracted value must be the rounded
    one, and all sums are relative to it; otherwise its rounding error would come back. With a soft-cap they
    are relative to the capped shift: the shift itself is larger than any capped logit, and subtracting it
    would round them to its own unit.
    """
    target = head.targets(h_CD, y_C)
    shift_C = target.raw_C.to(u_CV.dtype)
    head.shifted_logits_(u_CV, h_CD, shift_C)
    others = other_entries_(u_CV, shift_C, y_C, head, write=write, needs=needs)
    return target, others, target.logit_C - head.cap(shift_C.to(target.logit_C.dtype))


def other_entries_(
    u_CV: Tensor, shift_C: Tensor, y_C: Tensor, head: Head, *, write: bool, needs: frozenset[str]
) -> OtherEntries:
    """Statistics of each row of `u_CV`; with `write`, it holds the probabilities afterwards."""
    row_sums_: Callable[..., RowSums] = torch_row_sums_
    if u_CV.dtype != torch.float64 and "top_k_entropy" not in needs:
        if u_CV.is_meta:  # memory is traced: what the kernel returns, without its work
            row_sums_ = row_sums_shapes
        elif u_CV.is_cuda and not kernel_missing():
            from .row_kernel import row_sums_
    max_C, sum_C, dot_C, square_C, top_CK = row_sums_(u_CV, shift_C, y_C, head, write=write, needs=needs)
    log_C = sum_C.log()
    return OtherEntries(
        max_C=max_C,
        lse_C=max_C + log_C,
        entropy_C=log_C - dot_C / sum_C,
        gain_C=torch.full_like(sum_C, HALF_GAIN) if u_CV.dtype == torch.float16 else sum_C,
        square_C=None if square_C is None else square_C / sum_C**2,
        top_CK=top_CK,
    )


@cache
def kernel_missing() -> str:
    """Why the row pass runs in torch operations, not in the Triton kernel; empty where the kernel runs."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not find_spec("triton"):
        return "triton is not installed"
    try:  # its first launch compiles a host module, which needs a C compiler and Python's headers
        from triton.runtime import driver

        driver.active.get_current_device()
    except Exception as error:
        why = f"triton does not start ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        log.warning("%s: the loss runs in torch operations, which are slower", why)
        return why
    return ""


def _jacobian(head: Head, e_CV: Tensor, row_CD: Tensor, q_C: Tensor, gain_C: Tensor) -> Tensor:
    return row_CD.sub(head.mix(e_CV).div_(gain_C[:, None])).mul_(q_C[:, None])


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full precision at both ends."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _top_k_entropy(u_CK: Tensor) -> Tensor:
    """Entropy of the k largest entries, renormalised among themselves."""
    logp_CK = u_CK.topk(min(TOP_K, u_CK.shape[1])).values.log_softmax(-1)
    return -(logp_CK.exp() * logp_CK).sum(-1)


def _within_budget(l1_C: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """(kept, dropped) rows: drops the smallest while their sum stays under `budget` of the chunk's total."""
    ascending_C, order_C = l1_C.sort()
    n = int((ascending_C.cumsum(0) <= budget * l1_C.sum()).sum())
    return order_C[n:], order_C[:n]


def _front_(u_CV: Tensor, active_A: Tensor) -> Tensor:
    """Move the active rows to the front of the workspace; returns which row now lies at each place.

    Only active rows beyond place A move, into the places of skipped rows: at most half a workspace is copied.
    On a CPU they move one by one: an indexed copy would take fresh pages for all of them, and cost more than
    the skip saves.
    """
    A = len(active_A)
    is_active_C = torch.zeros(len(u_CV), dtype=torch.bool, device=u_CV.device)
    is_active_C[active_A] = True
    order_A = torch.arange(A, device=u_CV.device)
    free = (~is_active_C[:A]).nonzero()[:, 0]
    late = is_active_C[A:].nonzero()[:, 0] + A
    if u_CV.is_cuda:
        u_CV[free] = u_CV[late]
    else:
        for to, source in zip(free.tolist(), late.tolist(), strict=True):
            u_CV[to].copy_(u_CV[source])
    order_A[free] = late
    return order_A
