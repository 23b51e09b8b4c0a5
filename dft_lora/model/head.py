"""The last hidden state and the head that turns it into logits, without patching the model.

The loss engine needs h_BLD and the head's weight, never [B, L, V] logits. A forward hook on the decoder
catches h while the unmodified model runs and computes no logits. Once, at the start, the logits of one
position prove that the head we read equals the head that the model applies.

Shapes (docs/shapes.md): B rows, L positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ModelError
from ..loss import Head


def bare(model: Any) -> Any:
    """The transformers model inside peft and DDP wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: Any) -> Head:
    """Read the head of a causal LM.

    Raises ModelError for a head that is not a single linear layer.
    """
    model = bare(model)
    linear = model.get_output_embeddings()
    kind = type(linear).__name__
    if (
        not isinstance(linear, torch.nn.Linear)
        or linear.weight.dim() != 2
        or kind.endswith(("4bit", "8bitLt"))
    ):
        raise ModelError(
            f"{type(model).__name__}: its output head is a {kind}, not a plain linear layer; "
            "exclude it from quantization"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, linear.bias, scale, float(softcap) if softcap else None)


def refuse_adapted_head(model: Any) -> None:
    """Raises ModelError if an adapter changes the head: the loss reads the head's weight without an adapter.

    The same holds for an embedding that shares its weight with the head: merging would change both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    core = bare(model)
    head, embedding = core.get_output_embeddings(), core.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is head.weight
    for module in (head, embedding) if tied else (head,):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            name = next(name for name, known in core.named_modules() if known is module)
            raise ModelError(
                f"adapter.target_modules: {name!r} is the output head or shares its weight, "
                "which cannot be adapted here; take it out"
            )


@contextmanager
def catch_hidden(model: Any) -> Iterator[list[Any]]:
    """While open, the list holds the last hidden state of the latest forward pass of `model`.

    Its second entry is the dtype of the autocast around that pass, None without one.
    """
    caught: list[Any] = []

    def keep(_module, _arguments, output):
        h_BLD = output[0] if isinstance(output, tuple) else output.last_hidden_state
        kind = h_BLD.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        caught[:] = [h_BLD, torch.get_autocast_dtype(kind) if casts else None]

    handle = bare(model).get_decoder().register_forward_hook(keep)
    try:
        yield caught
    finally:
        handle.remove()


def hidden_states(model: Any, **inputs: Any) -> torch.Tensor:
    """h_BLD of one forward pass, connected to the graph. The call goes through all wrappers of `model`.

    It requests the logits of no position. Even those of one position are not cheap: for the strided slice
    h[:, -1:] torch copies the weight for each row (bfloat16 CPU, B = 4, V = 151,936: 5 s and 600 MB).
    """
    with catch_hidden(model) as caught:
        model(**inputs, use_cache=False, logits_to_keep=inputs["input_ids"].new_empty(0))
        return caught[0]


def check_head(model: Any, tolerance: float = 0.05) -> Head:
    """The head of a model, checked on three tokens against the model's own logits.

    Raises ModelError if the model transforms its logits, or h, in a way that the head does not express.
    """
    core = bare(model)
    if "logits_to_keep" not in inspect.signature(core.forward).parameters:
        raise ModelError(
            f"{type(core).__name__}: its forward takes no logits_to_keep, so it is not supported"
        )
    head = head_of(model)
    probe_BL = torch.arange(3, device=head.weight_VD.device)[None] + 5
    with torch.no_grad(), catch_hidden(model) as caught:
        theirs_BV = core(input_ids=probe_BL, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        ours_BV = head.logits(caught[0][:, -1])
    error = float((ours_BV - theirs_BV).abs().max() / theirs_BV.abs().max().clamp_min(1e-6))
    if not error <= tolerance:
        raise ModelError(
            f"{type(core).__name__}: its logits are not its head applied to its last hidden state "
            f"(relative difference {error:.2g}); this head is not supported"
        )
    return head
