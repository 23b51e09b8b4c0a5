"""The backward pass: a product with the row Jacobian; a trainable head also recomputes the logits.

Shapes (docs/shapes.md): M supervised tokens, C rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forward import RowScores, chunk_probabilities_
from .head import Head, accumulator, no_autocast


class RowJacobian(torch.autograd.Function):
    """Connects what `score_rows` computed to the graph of the hidden states and of a trainable head.

    Forward computes nothing. It saves J [M, D], the targets and the raw target logits for backward, and the
    hidden states for a trainable head. A frozen weight is a plain reference, not a saved tensor, so that
    activation offloading never copies it; only a gradient through `lse` reads it (M of its rows).
    """

    @staticmethod
    def forward(ctx, h_MD, weight_VD, bias_V, head: Head, y_M, rows: int, done: RowScores):
        ctx.head, ctx.rows = head, rows
        h_MD = h_MD if head.trainable else None
        ctx.save_for_backward(done.jacobian_MD, y_M, done.raw_M, h_MD, *trained(head))
        ctx.set_materialize_grads(False)
        return done.logp_M.clone(), done.lse_M.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp_M, g_lse_M):
        jacobian_MD, y_M, raw_M, h_MD, *_ = ctx.saved_tensors
        head, none = ctx.head, torch.zeros_like(raw_M)
        g_logp_M = none if g_logp_M is None else g_logp_M
        with no_autocast(raw_M.device):
            g_h_MD = None
            if ctx.needs_input_grad[0]:
                g_h_MD = jacobian_MD * (g_logp_M if g_lse_M is None else g_logp_M - g_lse_M)[:, None]
                if g_lse_M is not None:
                    g_h_MD += head.target_rows(y_M, raw_M).mul_(g_lse_M[:, None])
                g_h_MD = g_h_MD.to(jacobian_MD.dtype)
            g_head = (None,) * 2
            if h_MD is not None:
                g_lse_M = none if g_lse_M is None else g_lse_M
                g_head = head_gradients(head, h_MD, y_M, ctx.rows, g_logp_M, g_lse_M)
        return g_h_MD, *g_head, None, None, None, None


def trained(head: Head) -> list[Tensor]:
    """The head's tensors that require grad. They are saved so that autograd notices an in-place change."""
    return [tensor for tensor in head.parameters if tensor is not None and tensor.requires_grad]


def head_gradients(
    head: Head, h_MD: Tensor, y_M: Tensor, rows: int, g_logp_M: Tensor, g_lse_M: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a trainable (weight, bias): recomputes the logits of each chunk, plus one GEMM for W.

    The gradient of W needs the loss, which is not known yet when the logits are first computed. A trainable W
    therefore costs four GEMMs in all, where a fixed objective would take three: the price of allowing any
    objective. Sums over chunks are float32.
    """
    dtype, s = accumulator(h_MD.dtype), head.logit_scale
    g_weight_VD, g_bias_V = (
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
        own_C = head.slope(target.raw_C) * (q_C * g_logp_M[c] + p_C * g_lse_M[c])
        peak = other_C.abs().max().clamp_min(torch.finfo(dtype).tiny)  # keeps a 16-bit product in range
        weight_C1 = (other_C / peak / others.gain_C)[:, None]
        if g_weight_VD is not None:
            g_weight_VD.addcmul_((e_CV.t() @ (weight_C1 * h_CD).to(h_CD.dtype)).to(dtype), peak)
            g_weight_VD.index_add_(0, y_C, own_C[:, None] * h_CD)
        if g_bias_V is not None:
            g_bias_V.addcmul_((e_CV.t() @ weight_C1.to(h_CD.dtype))[:, 0].to(dtype), peak)
            g_bias_V.index_add_(0, y_C, own_C)
    return tuple(
        None if g is None or tensor is None else g.to(tensor.dtype)
        for g, tensor in zip((g_weight_VD, g_bias_V), head.parameters, strict=True)
    )
