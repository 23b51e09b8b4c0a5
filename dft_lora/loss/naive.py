"""The naive twin of `token_logps`: autograd through the full [N, V] tensor. The tests compare against it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .token_logps import TokenScores


def naive_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sequence: Tensor | None = None,
    signals: Mapping[str, Tensor] | None = None,
    reference_hidden: Tensor | None = None,
    ignore_index: int = -100,
) -> TokenScores:
    """Every field of TokenScores, computed naively; `reference_hidden` [N, D] is the base model's."""
    index = (targets != ignore_index).nonzero()[:, 0]
    y_M1 = targets[index, None].long()
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def logits(h_ND: Tensor) -> Tensor:
        z_MV = h_ND[index] @ weight.t()
        z_MV = logit_scale * (z_MV if bias is None else z_MV + bias)
        return (z_MV if softcap is None else softcap * torch.tanh(z_MV / softcap)).to(dtype)

    z_MV = logits(hidden)
    logp_MV = z_MV.log_softmax(-1)
    p_MV = logp_MV.detach().exp()
    top_MK = z_MV.detach().topk(min(20, len(weight))).values.log_softmax(-1)
    scores = TokenScores(
        logp=logp_MV.gather(1, y_M1)[:, 0],
        lse=z_MV.logsumexp(-1),
        entropy=-(p_MV * logp_MV.detach()).sum(-1),
        is_top1=(z_MV.gather(1, y_M1) >= z_MV.amax(-1, keepdim=True))[:, 0],
        index=index,
        sum_p_squared=(p_MV**2).sum(-1),
        top_k_entropy=-(top_MK.exp() * top_MK).sum(-1),
        sequence=None if sequence is None else sequence[index],
        signals={name: values[index].to(dtype) for name, values in (signals or {}).items()},
    )
    if reference_hidden is None:
        return scores
    reference_MV = logits(reference_hidden).log_softmax(-1).detach()
    return scores.replace(
        reference_logp=reference_MV.gather(1, y_M1)[:, 0],
        reference_kl=(reference_MV.exp() * (reference_MV - logp_MV)).sum(-1),
    )
