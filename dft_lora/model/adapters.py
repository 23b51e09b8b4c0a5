"""Several LoRA adapters in one batch: row i of a forward pass uses adapter i.

peft has this as `model(..., adapter_names=[...])`. We install the same pre-forward hooks ourselves, for two
reasons. peft removes its hooks after the forward but not when the forward raises (peft issue 3475, 0.21.2):
the next batch of the same size then silently mixes adapters. And it searches the whole model for its layers
on every call, so at every token (0.9 ms on a model of 28 LoRA layers, 0.05 ms here).

A LoRA layer over a linear one gets a forward pass of its own meanwhile: the same sums as peft's, without its
checks, which take longer than the products of a decoding step, and with each adapter's rows looked up once
per forward pass, not once per layer. DoRA, which peft refuses in a mixed batch, is applied to its rows.

In a decoding step of several adapters, a layer's adapters are stacked into one pair of matrices, and a mask
leaves each row its own part. It multiplies by zeros, but needs no more kernel calls than a single adapter: a
layer of 576 x 576 takes 0.12 ms instead of 0.21 for 8 rows of three adapters, and 0.38 ms instead of 0.47 for
64 (one core, bfloat16). Over 256 rows a layer of 640 x 2,048 would take 8.2 ms instead of 5.9, so batches
beyond STACKED, and prefills, pick the rows of each adapter.

Shapes (docs/shapes.md): N rows, D in, O out, R rank, S the adapters' ranks together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ModelError, did_you_mean
from .lora_inputs import NarrowLora

BASE = "__base__"  # peft's name for a row without an adapter

STACKED = 2**12
"""N * S up to which the adapters of a decoding step are stacked: 64 rows, four adapters of rank 16."""

Rows = Tensor | slice | None
"""Rows of a batch: their numbers, a range of them, or all."""
Stack = tuple[Tensor, Tensor, tuple[tuple[str, int], ...]]
"""A of several adapters [S, D], B times its scale [O, S], and each adapter's name and rank."""


class Places:
    """Which rows of a batch belong to which adapter, in one forward pass."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names, self.count, self.device = names, len(names), device
        self.adapters = tuple(sorted(set(names) - {BASE}))
        self.mixed = len(set(names)) > 1
        self._masks: dict[Any, Tensor] = {}

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """The rows of each adapter."""
        return {name: self._rows(name) for name in self.adapters}

    def _rows(self, name: str) -> Rows:
        rows = [row for row, its in enumerate(self.names) if its == name]
        if len(rows) == self.count:
            return None
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.device)

    def mask(self, ranks: tuple[tuple[str, int], ...]) -> Tensor:
        """1 in the columns of a row's own adapter, else 0: [N, 1, S]."""
        if ranks not in self._masks:
            own = {name: torch.tensor([[float(its == name)] for its in self.names]) for name, _ in ranks}
            mask_NS = torch.cat([own[name].expand(-1, rank) for name, rank in ranks], 1)
            self._masks[ranks] = mask_NS[:, None].to(self.device)
        return self._masks[ranks]


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
    stacks: dict[tuple[str, ...], Stack | None] = field(default_factory=dict)

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

    def forward(self, places: Places, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """The base's output plus scaling * B(A(x)) in the rows of each adapter.

        Computed in LoRA's dtype and rounded to the output's. Raises ModelError where the model has merged
        rows and positions before this layer, and the rows of an adapter cannot be told.
        """
        if places.mixed and len(x) != places.count:
            raise ModelError(
                f"this model hands an adapted layer {len(x)} rows of a batch of {places.count}, so adapters "
                "cannot be mixed in one batch; ask them one after the other"
            )
        output = self.base(x, *args, **keywords)
        if places.mixed and x.dim() == 3 and x.shape[1] == 1 and (stack := self.stack(places)):
            down_SD, up_OS, ranks = stack
            z_N1S = linear(x.to(down_SD.dtype), down_SD).mul_(places.mask(ranks))
            output += linear(z_N1S, up_OS).to(output.dtype)
            return output
        for name, rows in places.rows.items():
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

    def stack(self, places: Places) -> Stack | None:
        """Those of a batch's adapters that this layer has, as one.

        None for too many rows and adapters, if the layer has none, or if one is DoRA or has a bias.
        """
        mine = {name: self.loras[name] for name in places.adapters if name in self.loras}
        if places.count * sum(len(down_RD) for down_RD, _, _, _ in mine.values()) > STACKED:
            return None
        if places.adapters not in self.stacks:
            self.stacks.clear()  # one at a time: it is a copy of the adapters
            self.stacks[places.adapters] = None
            if mine and not any(name in self.doras or lora[2] is not None for name, lora in mine.items()):
                down_SD = torch.cat([down_RD for down_RD, _, _, _ in mine.values()])
                up_OS = torch.cat([up_OR * scaling for _, up_OR, _, scaling in mine.values()], 1)
                ranks = tuple((name, len(down_RD)) for name, (down_RD, _, _, _) in mine.items())
                self.stacks[places.adapters] = down_SD, up_OS, ranks
        return self.stacks[places.adapters]


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
    if layers:
        places = Places(names, next(layers[0].module.parameters()).device)

    def inject(layer, args, kwargs):
        return args, {**kwargs, "adapter_names": names}

    hooks, before = [], []
    try:
        for layer in layers:
            if layer.base is None:
                hooks.append(layer.module.register_forward_pre_hook(inject, with_kwargs=True))
            else:
                before.append((layer.own, layer.own.get("forward")))
                layer.own["forward"] = partial(layer.forward, places)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for own, forward in before:
            if forward is None:
                del own["forward"]
            else:
                own["forward"] = forward
