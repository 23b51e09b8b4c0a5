"""Several LoRA adapters in one batch: row i of a forward pass uses adapter i.

peft has this as `model(..., adapter_names=[...])`. We install the same pre-forward hooks ourselves, for two
reasons. peft removes its hooks after the forward but not when the forward raises (peft issue 3475, 0.21.2):
the next batch of the same size then silently mixes adapters. And it searches the whole model for its layers
on every call, so at every token (0.9 ms on a model of 28 LoRA layers, 0.05 ms here).

A LoRA layer over a linear one gets a forward pass of its own meanwhile: the same sums as peft's, without its
checks, which take longer than the products of a decoding step, and with each adapter's rows looked up once
per forward pass, not once per layer. DoRA, which peft refuses in a mixed batch, is applied to its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ModelError, did_you_mean
from .lora_inputs import NarrowLora

BASE = "__base__"  # peft's name for a row without an adapter


Rows = Tensor | slice | None
"""Rows of a batch: their numbers, a range of them, or all."""


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A layer with adapters. What a decoding step needs of it is looked up once, not at every token."""

    module: Any
    own: dict[str, Any]
    """The module's `__dict__`: nn.Module's own way to set an attribute takes ten times as long."""
    base: Any
    """The linear layer below LoRA or DoRA; None for another kind of layer, which is left to peft."""
    loras: Mapping[str, tuple[Tensor, Tensor, Tensor | None, float]]
    """Adapter -> weight of A, weight and bias of B, and the scale of their product."""
    doras: Mapping[str, Any]

    @classmethod
    def of(cls, module: Any) -> AdaptedLayer:
        base, loras, doras = None, {}, {}
        if getattr(module, "lora_A", None) and hasattr(module.get_base_layer(), "in_features"):
            variants = module.lora_variant.items()
            doras = {name: variant for name, variant in variants if module.use_dora.get(name)}
            if all(name in doras or isinstance(variant, NarrowLora) for name, variant in variants):
                base = module.base_layer
                for name, down in module.lora_A.items():
                    up = module.lora_B[name]
                    loras[name] = down.weight, up.weight, up.bias, module.scaling[name]
        return cls(module, vars(module), base, loras, doras)

    def forward(
        self, rows_in_all: int, places: Mapping[str, Rows], x: Tensor, *args: Any, **keywords: Any
    ) -> Tensor:
        """The base's output plus scaling * B(A(x)) in the rows of each adapter.

        Computed in LoRA's dtype and rounded to the output's. Raises ModelError where the model has merged
        rows and positions before this layer, and the rows of an adapter cannot be told.
        """
        if len(x) != rows_in_all and any(rows is not None for rows in places.values()):
            raise ModelError(
                f"this model hands an adapted layer {len(x)} rows of a batch of {rows_in_all}, so adapters "
                "cannot be mixed in one batch; ask them one after the other"
            )
        output = self.base(x, *args, **keywords)
        for name, rows in places.items():
            if name not in self.loras:
                continue
            down_RD, up_OR, bias_O, scaling = self.loras[name]
            mine = output if rows is None else output[rows]
            taken = (x if rows is None else x[rows]).to(down_RD.dtype)
            if name in self.doras:  # it scales the base's output too
                mine.copy_(self.doras[name].forward(self.module, active_adapter=name, x=taken, result=mine))
            else:
                mine += linear(linear(taken, down_RD), up_OR, bias_O).mul_(scaling).to(output.dtype)
            if isinstance(rows, Tensor):  # `mine` is a copy
                output[rows] = mine
        return output


def adapter_layers(model: nn.Module, names: Iterable[str | None] = ()) -> list[AdaptedLayer]:
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
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ModelError("an adapter is merged into the base: call model.unmerge_adapter() before generating")
    return list(map(AdaptedLayer.of, layers))


@contextmanager
def mixed(layers: Sequence[AdaptedLayer], adapter_names: Sequence[str | None]) -> Iterator[None]:
    """While open, row i of every forward pass uses adapter `adapter_names[i]` (None: the bare base).

    `layers` come from `adapter_layers`. Nothing outlives the `with` block, even if it raises.
    """
    names = [BASE if name is None else name for name in adapter_names]
    places: dict[str, Rows] = {}
    if layers:
        device = next(layers[0].module.parameters()).device
        for wanted in dict.fromkeys(name for name in names if name != BASE):
            rows = [row for row, name in enumerate(names) if name == wanted]
            if len(rows) == len(names):
                places[wanted] = None
            elif rows[-1] - rows[0] == len(rows) - 1:
                places[wanted] = slice(rows[0], rows[-1] + 1)
            else:
                places[wanted] = torch.tensor(rows, device=device)

    def inject(layer, args, kwargs):
        return args, {**kwargs, "adapter_names": names}

    hooks, before = [], []
    try:
        for layer in layers:
            if layer.base is None:
                hooks.append(layer.module.register_forward_pre_hook(inject, with_kwargs=True))
            else:
                before.append((layer.own, layer.own.get("forward")))
                layer.own["forward"] = partial(layer.forward, len(names), places)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for own, forward in before:
            if forward is None:
                del own["forward"]
            else:
                own["forward"] = forward
