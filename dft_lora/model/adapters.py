"""Several LoRA adapters in one batch: row i of a forward pass uses adapter i.

peft has this as `model(..., adapter_names=[...])`. We install the same pre-forward hooks ourselves, for two
reasons. peft removes its hooks after the forward but not when the forward raises (peft issue 3475, 0.21.2):
the next batch of the same size then silently mixes adapters. And it searches the whole model for its layers
on every call, so at every token (0.9 ms on a model of 28 LoRA layers, 0.05 ms here).

A plain LoRA layer is told that all rows take the base, and its adapters are added to its output here: the
same sums as peft's, but each adapter's rows are looked up once per forward pass, not once per layer. DoRA,
which peft refuses in a mixed batch, is applied to its rows in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, did_you_mean

BASE = "__base__"  # peft's name for a row without an adapter


def adapter_layers(model: nn.Module, names: Iterable[str | None] = ()) -> list[nn.Module]:
    """The layers of `model` that have adapters, [] for a bare base. Checks `names` (None: the base).

    Raises ModelError for an adapter that `model` does not have, and if its adapters are disabled or the model
    is in training mode: peft would then use the base for every row, or apply dropout.
    """
    known = getattr(model, "peft_config", {})
    for name in {name for name in names if name is not None}:
        if name not in known:
            has = ", ".join(known) or "none"
            raise ModelError(f"adapter {name!r} is not loaded (loaded: {has}){did_you_mean(name, known)}")
    if model.training:
        raise ModelError("the model is in training mode: call model.eval() before generating")
    if not known:
        return []
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)]
    if any(layer.disable_adapters for layer in layers):
        raise ModelError("the model's adapters are disabled: generate outside `disable_adapter()`")
    return layers


@contextmanager
def mixed(layers: Sequence[nn.Module], adapter_names: Sequence[str | None]) -> Iterator[None]:
    """While open, row i of every forward pass uses adapter `adapter_names[i]` (None: the bare base).

    `layers` come from `adapter_layers`. No hook outlives the `with` block, even if it raises.
    """
    names = [BASE if name is None else name for name in adapter_names]
    bases = [BASE] * len(names)
    places: dict[str, Tensor] = {}
    if layers:
        device = next(layers[0].parameters()).device
        for wanted in set(names) - {BASE}:
            rows = [row for row, name in enumerate(names) if name == wanted]
            places[wanted] = torch.tensor(rows, device=device)

    def inject(layer, args, kwargs):
        return args, {**kwargs, "adapter_names": bases if _is_plain(layer) else names}

    def add(layer, args, output):
        for name, rows in places.items():
            if name in layer.lora_A:
                _add_lora(layer, name, rows, args[0], output)
        return output

    hooks = []
    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(inject, with_kwargs=True))
            if places and _is_plain(layer):
                hooks.append(layer.register_forward_hook(add))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(layer: Any) -> bool:
    """A LoRA or DoRA over a linear layer; other variants of peft need more than a layer's input."""
    if not getattr(layer, "lora_A", None) or not all(layer.use_dora.get(name) for name in layer.lora_variant):
        return False
    return hasattr(layer.get_base_layer(), "in_features")


def _add_lora(layer: Any, name: str, rows: Tensor, x: Tensor, output: Tensor) -> None:
    """output[rows] += scaling * B(A(x[rows])), computed in LoRA's dtype and rounded to the output's."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    everyone = len(rows) == len(output)
    taken = (x if everyone else x[rows]).to(down.weight.dtype)
    if name in layer.lora_variant:  # DoRA scales the base's output too
        base = output if everyone else output[rows]
        made = layer.lora_variant[name].forward(layer, active_adapter=name, x=taken, result=base)
        output[rows] = made.to(output.dtype)
        return
    change = (up(down(taken)) * layer.scaling[name]).to(output.dtype)
    if everyone:
        output += change
    else:
        output[rows] += change
