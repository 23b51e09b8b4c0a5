"""`token_logps`: differentiable log-probabilities of target tokens, without the logits.

The computation it equals (`naive.py`):

    z = hidden @ weight.T + bias                # [N, V], a tensor that is never built
    z = softcap * tanh(logit_scale * z / softcap)
    logp = z.float().log_softmax(-1)[arange(N), targets][targets != -100]

One training step, whatever the objective:

    wanted = objective("asft")
    reference = None
    if wanted.needs & REFERENCE_NEEDS:          # the base model: adapter off, no second model
        with torch.no_grad():
            reference = token_logps(hidden_of_base, weight, targets, keep_jacobian=True)
    scores = token_logps(
        hidden, weight, targets, needs=wanted.needs, sequence=sequence_ids, reference=reference
    )
    loss = wanted(scores)                       # a sum; divide by the supervised tokens of the whole step

Shapes (docs/shapes.md): N positions, M supervised tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
from torch import Tensor

from .backward import RowJacobian
from .forward import Skip, score_rows
from .head import Head, no_autocast

REFERENCE_NEEDS = frozenset({"reference_logp", "reference_kl"})
STATISTICS = frozenset({"sum_p_squared", "top_k_entropy"})
NEEDS = REFERENCE_NEEDS | STATISTICS | {"sequence"}
FLOOR_ROWS, CEILING_ROWS = 512, 4096  # below 512 rows the GEMMs slow down (256: 1.08x, 128: 1.36x)
CHUNK_BYTES = {"cpu": 128 * 2**20}  # the workspace; on any other device:
DEVICE_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class TokenScores:
    """`logp`, differentiable, and related values, one entry per supervised token (M of them).

    Float32 (float64 for a float64 model). Only `logp`, `lse` and `reference_kl` carry gradients. Optional
    fields are None unless requested by name in `needs`, or given.
    """

    logp: Tensor
    """log p of the target token."""
    lse: Tensor
    """log sum exp of the logits; detached when rows were skipped (its gradient would need them)."""
    entropy: Tensor
    """Entropy of the predicted distribution, nats."""
    is_top1: Tensor
    """Whether the target is the most probable token; bool."""
    index: Tensor
    """Position of each supervised token among the N."""
    sum_p_squared: Tensor | None = None
    """Sum over the vocabulary of p^2."""
    top_k_entropy: Tensor | None = None
    """Entropy of the 20 most probable tokens, renormalised among themselves."""
    sequence: Tensor | None = None
    """The id of each token's sequence; an integer."""
    reference_logp: Tensor | None = None
    """logp of the same tokens under the reference (the base model)."""
    reference_kl: Tensor | None = None
    """KL(reference || model), differentiable."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """What the examples carry besides their tokens, by name; [M], each example's value at its tokens."""
    hidden: Tensor | None = None
    """With keep_jacobian: the supervised hidden states [M, D]."""
    jacobian: Tensor | None = None
    """With keep_jacobian: d logp / d hidden [M, D]."""
    skipped_rows: int = 0
    """Tokens that `skip` left out of the gradient."""
    skip_bound: float = 0.0
    """Upper bound of the Frobenius norm of what skipping removed from the gradient of `sum(w * logp)`."""

    @property
    def probability(self) -> Tensor:
        """p of the target token, detached."""
        return self.logp.detach().exp()

    @property
    def is_end(self) -> Tensor:
        """Whether a token is the last of its sequence, [M] bool; a sequence's tokens follow each other.

        Raises ValueError where the scores do not know the sequences.
        """
        sequence_M = self.need("sequence")
        return torch.cat([sequence_M[1:] != sequence_M[:-1], sequence_M[-1:] == sequence_M[-1:]])

    def need(self, field: str) -> Tensor:
        """An optional field. Raises ValueError naming it if it is absent."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"{field}: not among these scores; pass needs=objective.needs to token_logps")
        return value

    def replace(self, **fields) -> TokenScores:
        """A copy with some fields replaced."""
        return replace(self, **fields)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    skip: float = 0.0,
    token_weight: Callable[[Tensor], Tensor] | None = None,
    *,
    needs: Iterable[str] = (),
    sequence: Tensor | None = None,
    signals: Mapping[str, Tensor] | None = None,
    reference: TokenScores | None = None,
    keep_jacobian: bool = False,
    ignore_index: int = -100,
    check_values: bool = True,
) -> TokenScores:
    """Scores of the supervised tokens, differentiable with respect to everything that requires grad.

    hidden [N, D], weight [V, D], targets [N] (`ignore_index` where unsupervised), bias [V].
    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), tanh only with a softcap.

    needs: names of optional fields of TokenScores that the objective reads (`objective.needs`).
    signals: name -> [N], what the objective reads besides the scores (`objective.signals`). A signal
    `reference_logp` stands in for `reference` where only that is needed.
    sequence [N]: the id of each token's sequence. reference: the scores of the same targets under the base
    model; with its `keep_jacobian`, `reference_kl` becomes available for a frozen head without soft-cap.
    chunk_bytes: size of the workspace; an explicit value overrides the floor of 512 rows.
    skip, token_weight: leave tokens out of the gradient, the smallest first, while their share of the summed
    `2 * token_weight(logp) * (1 - p)` stays under `skip`; see `TokenScores.skip_bound`. token_weight is the
    objective's own detached weight, a function of logp alone (`objective.token_weight`).
    check_values: refuse targets outside [0, V) and non-finite hidden states. Without the check, results for
    such values are undefined.

    Cost: two GEMMs of 2 M D V flops; one if nothing requires grad, four with a trainable weight. Memory:
    J [M, D] and one workspace [chunk, V].

    Raises ValueError naming the argument that does not fit.
    """
    needs = frozenset(needs)
    head = Head(weight, bias, logit_scale, softcap)
    signals = signals or {}
    per_token = {"sequence": sequence} | {f"signals[{name!r}]": values for name, values in signals.items()}
    _check_shapes(hidden, head, targets, chunk_bytes, per_token)
    index = (targets != ignore_index).nonzero()[:, 0]
    everything = len(index) == len(targets)
    h_MD = hidden if everything else hidden.index_select(0, index)
    y_M = targets.index_select(0, index).long()
    if check_values:
        _check_values(h_MD, y_M, len(weight))
    kept = {"reference_logp"} & signals.keys()
    _check_modes(head, needs - kept, skip, token_weight, sequence, reference, index)

    wants_hidden = torch.is_grad_enabled() and hidden.requires_grad
    wants_grad = wants_hidden or (torch.is_grad_enabled() and head.trainable)
    rows = chunk_rows(hidden, len(weight), chunk_bytes)
    with no_autocast(hidden.device):
        done = score_rows(
            head,
            h_MD.detach(),
            y_M,
            rows,
            jacobian=wants_hidden or keep_jacobian,
            needs=needs & STATISTICS,
            skip=Skip(skip, token_weight) if skip and token_weight else None,
        )
        logp, lse = done.logp_M, done.lse_M
        if wants_grad:
            logp, lse = RowJacobian.apply(h_MD, *head.parameters, head, y_M, rows, done)
        kl = _reference_kl(h_MD, logp, reference) if reference and "reference_kl" in needs else None
    signals_M = {name: values.index_select(0, index).to(logp.dtype) for name, values in signals.items()}
    return TokenScores(
        logp=logp,
        lse=lse.detach() if skip else lse,
        entropy=done.entropy_M,
        is_top1=done.is_top1_M,
        index=index,
        sum_p_squared=done.sum_p_squared_M,
        top_k_entropy=done.top_k_entropy_M,
        sequence=None if sequence is None else sequence.index_select(0, index),
        signals=signals_M,
        reference_logp=signals_M.get("reference_logp") if reference is None else reference.logp.detach(),
        reference_kl=kl,
        hidden=h_MD.detach() if keep_jacobian else None,
        jacobian=done.jacobian_MD if keep_jacobian else None,
        skipped_rows=done.skipped_rows,
        skip_bound=done.skip_bound,
    )


def _reference_kl(h_MD: Tensor, logp_M: Tensor, reference: TokenScores) -> Tensor:
    """KL(reference || model) of two hidden states under one linear head, without its logits.

    lse is convex in h, so this KL is its Bregman divergence. Written with logp and J, nothing large cancels:
    KL = logp_ref - logp + (h - h_ref) . J_ref, of gradient J_ref - J. Bias and scale drop out.
    """
    moved_MD = h_MD.to(logp_M.dtype) - reference.need("hidden")
    return reference.logp - logp_M + (moved_MD * reference.need("jacobian")).sum(-1)


def chunk_rows(hidden: Tensor, V: int, chunk_bytes: int | None) -> int:
    """Rows per chunk: what fits into `chunk_bytes`; by default, enough to keep the GEMMs large."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // (V * hidden.element_size()))
    budget = CHUNK_BYTES.get(hidden.device.type, DEVICE_CHUNK_BYTES)
    return min(max(budget // (V * hidden.element_size()), FLOOR_ROWS), CEILING_ROWS)


def _check_shapes(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunk_bytes: int | None,
    per_token: Mapping[str, Tensor | None],
) -> None:
    """Checks shapes, devices, dtypes and plain numbers; `per_token` values are [N], of any dtype."""
    weight = head.weight_VD
    if hidden.ndim != 2:
        raise ValueError(f"hidden: must be [N, D], got {list(hidden.shape)}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: must be floating point, got {hidden.dtype}")
    N, D = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != D or weight.shape[0] < 2:
        raise ValueError(f"weight: must be [V >= 2, {D}] to fit hidden, got {list(weight.shape)}")
    V = len(weight)
    if list(targets.shape) != [N]:
        raise ValueError(f"targets: must be [{N}] to fit hidden, got {list(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: must be integers, got {targets.dtype}")
    if head.bias_V is not None and list(head.bias_V.shape) != [V]:
        raise ValueError(f"bias: must be [{V}] to fit weight, got {list(head.bias_V.shape)}")
    for name, tensor in per_token.items():
        if tensor is not None and list(tensor.shape) != [N]:
            raise ValueError(f"{name}: must be [{N}] to fit hidden, got {list(tensor.shape)}")
    trained = {"weight": weight, "bias": head.bias_V}
    for name, tensor in {**trained, "targets": targets, **per_token}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: is on {tensor.device}, hidden on {hidden.device}")
        if tensor is not None and name in trained and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name}: is {tensor.dtype}, hidden is {hidden.dtype}")
    if not isfinite(head.logit_scale) or head.logit_scale == 0:
        raise ValueError(f"logit_scale: must be finite and not zero, got {head.logit_scale}")
    if head.softcap is not None and not (isfinite(head.softcap) and head.softcap > 0):
        raise ValueError(f"softcap: must be positive, got {head.softcap}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: must be at least 1, got {chunk_bytes}")


def _check_values(h_MD: Tensor, y_M: Tensor, V: int) -> None:
    """Checks the values themselves, at the cost of one synchronisation on a GPU."""
    if len(y_M) == 0:
        return
    low, high = int(y_M.min()), int(y_M.max())
    if low < 0 or high >= V:
        raise ValueError(f"targets: must lie in [0, {V}), got {low if low < 0 else high}")
    if not bool(torch.isfinite(h_MD.detach()).all()):
        raise ValueError("hidden: contains NaN or infinite values")


def _check_modes(
    head: Head,
    needs: frozenset[str],
    skip: float,
    token_weight: Callable[[Tensor], Tensor] | None,
    sequence: Tensor | None,
    reference: TokenScores | None,
    index: Tensor,
) -> None:
    """Refuses combinations that cannot be exact."""
    if not 0 <= skip < 1:
        raise ValueError(f"skip: must lie in [0, 1), got {skip}")
    if skip and token_weight is None:
        raise ValueError("token_weight: skip needs the objective's detached weight (objective.token_weight)")
    if skip and head.trainable:
        raise ValueError("skip: needs a frozen head; its error bound does not cover the head's own gradient")
    for name in needs - NEEDS:
        raise ValueError(f"needs: {name!r} is not one of {', '.join(sorted(NEEDS))}")
    if "sequence" in needs and sequence is None:
        raise ValueError("sequence: the objective needs the sequence id of each token")
    if needs & REFERENCE_NEEDS and reference is None:
        raise ValueError("reference: the objective needs the scores of the base model")
    if reference is not None and not torch.equal(reference.index, index):
        raise ValueError("reference: its supervised positions differ from those of targets")
    if reference and "reference_kl" in needs:
        if reference.jacobian is None:
            raise ValueError("reference: score it with keep_jacobian=True, the objective needs its KL")
        if head.softcap is not None:
            raise ValueError("softcap: KL to the reference is exact only for a head without soft-cap")
        if head.trainable:
            raise ValueError("weight: KL to the reference is exact only for a frozen head")
