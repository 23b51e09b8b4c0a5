"""DFT inside another trainer: after `patch(model)`, a causal LM given labels returns the chunked loss.

    with patch(model, objective="dft"):
        Trainer(model, ...).train()

Trainers wrap or replace `model.forward`: accelerate puts autocast around it, TRL sets one with a loss of its
own. So while a model is patched, every forward that is set on it is wrapped in a `Forward`; the outermost one
computes the loss, and those inside pass through. Undoing removes the wrappers, and a reference to one that
somebody has kept passes through as well.

Shapes (docs/shapes.md): B rows, L positions, N = B * L, M supervised tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import MethodType, SimpleNamespace
from typing import Any

import torch

from ..errors import RequestError
from ..loss import REFERENCE_NEEDS, Objective, ObjectiveError, TokenScores, token_logps
from ..loss import objective as make_objective
from ..model.head import bare, catch_hidden, check_head, head_of, refuse_adapted_head
from ..model.load import keep_differentiable

LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
"""What a forward pass without a loss does not take. The last one is TRL's: it asks for values per token."""


def patch(model: Any, objective: str | Objective | Callable = "dft", *, eval_logits: bool = False) -> Patch:
    """Patch a causal LM; undone by `Patch.undo()`, or at the end of a `with` block.

    model: a transformers causal LM, a peft model around one, or either of them inside DDP.
    objective: a name, an objective with its own numbers, or a function of the scores.
    eval_logits: in eval mode return the logits too, for a trainer's `compute_metrics`. Otherwise they are
    returned without labels, or for the positions that the caller names with `logits_to_keep`.

    The loss is the objective's sum over the supervised tokens, divided by `num_items_in_batch` if the trainer
    gives it (its count over all micro-batches), else by the supervised tokens of the batch. In eval mode it
    is the same.

    Raises RequestError for an objective that one forward pass cannot compute, or a model that is already
    patched, and ModelError for a head that the loss engine does not support.
    """
    core = bare(model)
    if isinstance(inspect.unwrap(core.forward, stop=lambda f: isinstance(f, Forward)), Forward):
        raise RequestError("model: already patched; undo the first patch before the second")
    try:
        wanted = make_objective(objective)
    except ObjectiveError as error:
        raise RequestError(str(error)) from None
    _refuse(wanted, model)
    return Patch(model, wanted, eval_logits)


def _refuse(wanted: Objective, model: Any) -> None:
    """Raises RequestError for an objective that needs more than one forward pass can know."""
    if wanted.divided_by != "tokens":
        raise RequestError(
            f"objective {wanted.name!r}: is divided by {wanted.divided_by}, but a trainer only counts "
            "tokens; use dft-lora train"
        )
    if wanted.signals or wanted.step_signals is not None:
        raise RequestError(
            f"objective {wanted.name!r}: weighs an example by signals of its whole optimizer step, which one "
            "forward pass does not see; use dft-lora train"
        )
    if wanted.toward is not None:
        raise RequestError(f"objective {wanted.name!r}: needs a teacher's adapter; use dft-lora train")
    if wanted.at(0.0) != wanted:
        raise RequestError(
            f"objective {wanted.name!r}: changes with the progress of the run, which a model does not know; "
            "use dft-lora train"
        )
    if wanted.needs & REFERENCE_NEEDS and not hasattr(_unwrapped(model), "disable_adapter"):
        raise RequestError(
            f"objective {wanted.name!r}: needs the base without its adapter; patch the peft model, after "
            "get_peft_model"
        )


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


class Patch:
    """A patched model. `undo()` restores it, as does the end of a `with` block."""

    def __init__(self, model: Any, wanted: Objective, eval_logits: bool):
        self.model, self.core = _unwrapped(model), bare(model)
        self.wanted, self.eval_logits = wanted, eval_logits
        self.inside = False
        core = self.core
        self.repacking = [m for m in core.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
        keep_differentiable(core)
        refuse_adapted_head(core)
        check_head(core)
        self.active = True
        core.__dict__["forward"] = Forward(core.forward, self)
        kind: Any = type(core)
        core.__class__ = _wrapping(kind)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def undo(self) -> None:
        """Restore the model. A second call does nothing."""
        if not self.active:
            return
        self.active = False
        core = self.core
        core.__class__ = type(core).__mro__[1]
        forward = core.__dict__.pop("forward").__wrapped__
        if forward != MethodType(type(core).forward, core):
            core.forward = forward
        for module in self.repacking:
            module.support_avx512bf16_for_cpu = True

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model: with labels the loss, otherwise what `forward` returns."""
        if self.inside or not self.active:
            return forward(*args, **kwargs)
        names = inspect.signature(type(self.core).forward).parameters
        given = dict(zip(list(names)[1:], args, strict=False)) | kwargs
        for_loss = {name: given.pop(name, None) for name in LOSS_ARGUMENTS}
        if for_loss["labels"] is None and for_loss["shift_labels"] is None:
            return forward(*args, **kwargs)
        self.inside = True
        try:
            return self.with_loss(forward, given, **for_loss)
        finally:
            self.inside = False

    def with_loss(
        self,
        forward: Callable[..., Any],
        given: dict[str, Any],
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        num_items_in_batch: Any,
        fused_lm_head: bool | None,
    ) -> Any:
        """The model's output with the loss, and without logits unless they are asked for."""
        as_tuple = given.pop("return_dict", None) is False
        if given.get("use_cache") is None:
            given["use_cache"] = False
        wants_logits = given.get("logits_to_keep") is not None or (
            self.eval_logits and not self.core.training
        )
        y_BL = labels[:, 1:] if shift_labels is None else shift_labels  # type: ignore[index]
        if not wants_logits:
            # a list: accelerate moves a tensor to the first GPU of a split model, and the last one is indexed
            given["logits_to_keep"] = []
        reference = None
        if self.wanted.needs & REFERENCE_NEEDS:
            with torch.no_grad(), self.model.disable_adapter():
                _, reference = self.score(forward, given, y_BL, keep_jacobian=True)
        output, scores = self.score(forward, given, y_BL, needs=self.wanted.needs, reference=reference)
        total = self.wanted(scores)
        count = len(scores.logp) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        aux = getattr(output, "aux_loss", None)
        if fused_lm_head:
            return _per_token(total, scores, y_BL, loss, aux)
        if aux is not None:  # of a mixture of experts; added as the model itself does
            loss = loss + self.core.router_aux_loss_coef * aux.to(loss.device)
        output = replace(output, loss=loss, logits=output.logits if wants_logits else None)
        return output.to_tuple() if as_tuple else output

    def score(
        self, forward: Callable[..., Any], given: dict[str, Any], y_BL: torch.Tensor, **more: Any
    ) -> tuple[Any, TokenScores]:
        """Run the model without a loss; returns its output, and the scores of its hidden states."""
        refuse_adapted_head(self.core)
        head = head_of(self.core)
        with catch_hidden(self.core) as caught:
            output = forward(**given, return_dict=True)
        h_BLD, autocast = caught
        dtype, device = autocast or head.weight_VD.dtype, head.weight_VD.device
        L = y_BL.shape[1]  # shifted labels are one shorter than the hidden states
        arguments = head.arguments() | {
            name: tensor.to(dtype)
            for name, tensor in (("weight", head.weight_VD), ("bias", head.bias_V))
            if tensor is not None
        }
        scores = token_logps(
            h_BLD[:, :L].flatten(0, 1).to(device, dtype),
            targets=y_BL.flatten().to(device),
            **arguments,
            sequence=_documents(given.get("position_ids"), h_BLD)[:, -L:].flatten().to(device),
            check_values=False,
            **more,
        )
        return output, scores


class Forward:
    """A model's forward with the loss around it. `inspect.signature` sees the forward's own parameters."""

    def __init__(self, forward: Callable[..., Any], patch: Patch):
        self.__wrapped__, self.patch = forward, patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patch.run(self.__wrapped__, args, kwargs)


@cache
def _wrapping(kind: Any) -> type:
    """`kind`, but that a forward set on an instance is wrapped as the present one is.

    A subclass for one instance, as torch's own parametrizations have: there is no other place from which to
    see an attribute being set.
    """

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward" and not isinstance(value, Forward):
            value = Forward(value, self.__dict__["forward"].patch)
        kind.__setattr__(self, name, value)

    def refuse_replicas(self: Any) -> None:
        raise RequestError(
            "a patched model cannot be copied to several GPUs by torch.nn.DataParallel, which transformers "
            "uses where it sees more than one: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
        )

    own = {"__setattr__": set_attribute, "_replicate_for_data_parallel": refuse_replicas}
    return type(kind.__name__, (kind,), {**own, "__module__": kind.__module__})


def _documents(position_ids: torch.Tensor | None, h_BLD: torch.Tensor) -> torch.Tensor:
    """An id for each document [B, L]: a row, or a part of a packed row from where positions restart."""
    B, L, _ = h_BLD.shape
    starts_BL = torch.zeros(B, L, dtype=torch.bool, device=h_BLD.device)
    starts_BL[:, 0] = True
    if position_ids is not None and position_ids.ndim == 2:
        starts_BL[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts_BL.flatten().cumsum(0).view(B, L)


def _per_token(
    total: torch.Tensor, scores: TokenScores, y_BL: torch.Tensor, loss: torch.Tensor, aux: Any
) -> SimpleNamespace:
    """What TRL 1.16 reads: it sums `-log_probs` over tokens, divides the sum and adds the auxiliary loss.

    So `log_probs` holds minus the objective's mean at each supervised token; their sum is the objective's.
    """
    mask_BL = (y_BL != -100).to(scores.index.device)

    def at_tokens(values_M: torch.Tensor) -> torch.Tensor:
        return values_M.new_zeros(mask_BL.shape).masked_scatter(mask_BL, values_M)

    return SimpleNamespace(
        loss=loss,
        log_probs=mask_BL * (-total / max(1, len(scores.logp))),
        entropy=at_tokens(scores.entropy),
        is_top1=at_tokens(scores.is_top1),
        label_mask=mask_BL,
        aux_loss=aux,
    )
