"""Per-token log-probabilities that stay differentiable, from one chunked pass with two GEMMs.

For a frozen head the derivative of the target's log-probability is one D-vector per token,

    J_t = d logp_t / d h_t = (1 - p_t) * (W_t - sum over j != t of q_j W_j),    q_j = P_j / (1 - p_t)

(each W_j times logit scale and soft-cap slope). It does not depend on the loss, so it can be formed while the
logits are at hand; the backward pass is `g_logp * J + g_lse * (W_t - J)`, whatever the objective.
With a trainable head the gradient of the head needs the loss, and `trainable.py` visits the logits again.

Shapes: M supervised rows, C rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head import Head, Target, accumulator
from .rows import TOP_K, OtherEntries, other_entries_


@dataclass(frozen=True)
class Skip:
    """Drop rows of the second GEMM while their summed `2 w (1 - p)` stays under `budget` of the total."""

    budget: float
    token_weight: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """What one pass over the supervised rows returns; float32 (float64 for a float64 model) unless said."""

    logp_M: Tensor
    lse_M: Tensor
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
) -> Pass:
    """One pass over the rows in chunks of `rows`: one GEMM, two with the Jacobian."""
    dtype, M = accumulator(h_MD.dtype), len(h_MD)
    row_M = [h_MD.new_empty(M, dtype=dtype) for _ in range(3)]
    logp_M, lse_M, entropy_M = row_M
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
        logp_M[c], lse_M[c] = logp_C, target.logit_C - logp_C
        entropy_M[c] = q_C * (others.entropy_C - logq_C) - p_C * logp_C
        top1_M[c] = delta_C >= others.max_C
        if square_M is not None:
            square_M[c] = p_C**2 + q_C**2 * others.square_C
        if top_M is not None:
            top_M[c] = _top_k_entropy(torch.cat([others.top_CK, delta_C[:, None]], dim=1))
        if jacobian_MD is None:
            continue
        if skip is None:
            jacobian_MD[c] = _jacobian(head, u_CV, target.row_CD, q_C, others.gain_C)
        else:
            l1_C = 2 * skip.token_weight(logp_C).to(dtype) * q_C
            kept_K, dropped = _within_budget(l1_C, skip.budget)
            order_K = _front_(u_CV, kept_K)
            jacobian_MD[c] = 0
            jacobian_MD[c][order_K] = _jacobian(
                head, u_CV[: len(order_K)], target.row_CD[order_K], q_C[order_K], others.gain_C[order_K]
            ).to(h_MD.dtype)
            skipped += len(dropped)
            skipped_squares += (l1_C[dropped] ** 2).sum()
    bound = head.largest_row_norm() * float(skipped_squares.sqrt()) if skipped else 0.0
    return Pass(logp_M, lse_M, entropy_M, top1_M, square_M, top_M, jacobian_MD, skipped, bound)


def chunk_probabilities_(
    u_CV: Tensor, head: Head, h_CD: Tensor, y_C: Tensor, *, write: bool, needs: frozenset[str] = frozenset()
) -> tuple[Target, OtherEntries, Tensor]:
    """Logits of a chunk into the workspace, then their statistics; delta = z_t - shift comes third.

    The shift is the target's logit rounded to the workspace's dtype: what is subtracted must be the rounded
    value, and all sums are taken relative to it, or its rounding error would come back.
    """
    target = head.targets(h_CD, y_C)
    shift_C = target.raw_C.to(u_CV.dtype)
    head.shifted_logits_(u_CV, h_CD, shift_C)
    others = other_entries_(u_CV, shift_C, y_C, head, write=write, needs=needs)
    return target, others, target.logit_C - shift_C


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
    """(kept, dropped) rows: the smallest go while their sum stays under `budget` of the chunk's total."""
    ascending_C, order_C = l1_C.sort()
    n = int((ascending_C.cumsum(0) <= budget * l1_C.sum()).sum())
    return order_C[n:], order_C[:n]


def _front_(u_CV: Tensor, kept_K: Tensor) -> Tensor:
    """Move the kept rows to the front of the workspace; returns which row now lies at each place.

    Only kept rows beyond place K move, into places of dropped rows: at most half a workspace is copied.
    """
    K = len(kept_K)
    is_kept_C = torch.zeros(len(u_CV), dtype=torch.bool, device=u_CV.device)
    is_kept_C[kept_K] = True
    order_K = torch.arange(K, device=u_CV.device)
    free = (~is_kept_C[:K]).nonzero()[:, 0]
    late = is_kept_C[K:].nonzero()[:, 0] + K
    u_CV[free] = u_CV[late]
    order_K[free] = late
    return order_K


class RowJacobian(torch.autograd.Function):
    """Ties what `score_rows` computed to the graph of the hidden states and of a trainable head.

    Forward computes nothing. Saved for backward: J [M, D], targets and z_t [M]; with a trainable head the hidden
    states too. A frozen weight is kept as a plain reference, not as a saved tensor, so that activation offloading
    never copies it; only a gradient through `lse` reads it (M of its rows).
    """

    @staticmethod
    def forward(ctx, h_MD, weight_VD, bias_V, a_RD, b_VR, head: Head, y_M, rows: int, done: Pass):
        ctx.head, ctx.rows = head, rows
        ctx.save_for_backward(
            done.jacobian_MD, y_M, done.logp_M + done.lse_M, h_MD if head.trainable else None, *trained(head)
        )
        ctx.set_materialize_grads(False)
        return done.logp_M.clone(), done.lse_M.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp_M, g_lse_M):
        jacobian_MD, y_M, z_M, h_MD, *_ = ctx.saved_tensors
        head, none = ctx.head, torch.zeros_like(z_M)
        g_logp_M = none if g_logp_M is None else g_logp_M
        with torch.autocast(z_M.device.type, enabled=False):
            g_h_MD = None
            if ctx.needs_input_grad[0]:
                g_h_MD = jacobian_MD * (g_logp_M if g_lse_M is None else g_logp_M - g_lse_M)[:, None]
                if g_lse_M is not None:
                    g_h_MD += head.target_rows(y_M, z_M).mul_(g_lse_M[:, None])
                g_h_MD = g_h_MD.to(jacobian_MD.dtype)
            g_head = (None,) * 4
            if h_MD is not None:
                g_lse_M = none if g_lse_M is None else g_lse_M
                g_head = head_gradients(head, h_MD, y_M, ctx.rows, g_logp_M, g_lse_M)
        return g_h_MD, *g_head, None, None, None, None


def trained(head: Head) -> list[Tensor]:
    """The head's tensors that require grad; saved, so that autograd notices a change in place."""
    return [tensor for tensor in head.parameters if tensor is not None and tensor.requires_grad]


def head_gradients(
    head: Head, h_MD: Tensor, y_M: Tensor, rows: int, g_logp_M: Tensor, g_lse_M: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a trainable (weight, bias, A, B): the logits of each chunk once more, and one GEMM for W.

    Four GEMMs in all for a trainable W, against the floor of three of a fixed objective, and three for LoRA on
    a frozen W: the price for allowing any objective. Sums over chunks are float32.
    """
    dtype, s = accumulator(h_MD.dtype), head.scale
    g_W, g_bias, g_A, g_B = (
        torch.zeros_like(tensor, dtype=dtype) if tensor is not None and tensor.requires_grad else None
        for tensor in head.parameters
    )
    workspace_CV = h_MD.new_empty(min(rows, len(h_MD)), len(head.weight_VD))
    for start in range(0, len(h_MD), rows):
        c = slice(start, min(start + rows, len(h_MD)))
        h_CD, y_C, e_CV = h_MD[c], y_M[c], workspace_CV[: min(rows, len(h_MD) - start)]
        target, others, delta_C = chunk_probabilities_(e_CV, head, h_CD, y_C, write=True)
        p_C = torch.sigmoid(delta_C - others.lse_C)
        q_C = torch.sigmoid(others.lse_C - delta_C)
        # d loss / d (h @ W.T) is other_C * e / gain at j != target and own_C at the target
        other_C = s * q_C * (g_lse_M[c] - g_logp_M[c])
        own_C = s * head.slope(target.logit_C) * (q_C * g_logp_M[c] + p_C * g_lse_M[c])
        peak = other_C.abs().max().clamp_min(torch.finfo(dtype).tiny)  # keeps a 16-bit product in range
        weight_C1 = (other_C / peak / others.gain_C)[:, None]
        if g_W is not None:
            g_W.addcmul_((e_CV.t() @ (weight_C1 * h_CD).to(h_CD.dtype)).to(dtype), peak)
            g_W.index_add_(0, y_C, own_C[:, None] * h_CD)
        if g_bias is not None:
            g_bias.addcmul_((e_CV.t() @ weight_C1.to(h_CD.dtype))[:, 0].to(dtype), peak)
            g_bias.index_add_(0, y_C, own_C)
        if head.lora and (g_A is not None or g_B is not None):
            a_RD, b_VR, scaling = head.lora
            if g_B is not None:
                h_CR = (h_CD @ a_RD.t()).to(dtype) * scaling
                g_B.addcmul_((e_CV.t() @ (weight_C1 * h_CR).to(h_CD.dtype)).to(dtype), peak)
                g_B.index_add_(0, y_C, own_C[:, None] * h_CR)
            if g_A is not None:
                g_CR = (e_CV @ b_VR).to(dtype).mul_(weight_C1 * peak).add_(own_C[:, None] * b_VR[y_C])
                g_A.addmm_(g_CR.t(), h_CD.to(dtype), alpha=scaling)
    return tuple(
        None if g is None else g.to(tensor.dtype)
        for g, tensor in zip((g_W, g_bias, g_A, g_B), head.parameters, strict=True)
    )
