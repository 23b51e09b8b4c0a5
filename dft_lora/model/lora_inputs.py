"""LoRA in float32 over a 16-bit base, without float32 copies of whole activations.

peft casts the input of every adapted layer to float32, and autograd keeps each copy for the gradient of A: q,
k and v keep the same tensor three times, and an MLP's down projection keeps its widest one. Here the 16-bit
input is kept instead, a tensor that exists anyway, and cast again in the backward pass.

On a CPU both passes work in blocks of rows that stay in its cache. peft makes a dozen float32 tensors of the
size of a layer's input or output, each in fresh pages from the system: half of the time of a training step.

Over a 4-bit base the forward pass is bit-exactly peft's, and so is a backward pass of one block; with several
blocks the gradients of A and B are the same float32 sums in another order. Over a 16-bit base peft rounds the
sum of both outputs once, and this file each of them, so that an unpacked base gives the bits of a 4-bit one.

Shapes (docs/shapes.md): N positions, D input width of a layer, O output width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..loss.head import no_autocast
from .row_blocks import row_blocks


class _AddLora(torch.autograd.Function):
    """See `add_lora_output`; saves x as it is, and its product with A.

    Both passes disable autocast, which would return 16 bits in the one and mix dtypes in the other.
    """

    @staticmethod
    def forward(ctx, y, x, weight_RD, weight_OR, scaling):
        y_NO, x_ND = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        low_NR = weight_RD.new_empty(len(x_ND), len(weight_RD))
        with no_autocast(x.device):
            for rows in row_blocks(len(x_ND), max(x_ND.shape[1], y_NO.shape[1]), x.device):
                torch.mm(x_ND[rows].to(low_NR.dtype), weight_RD.t(), out=low_NR[rows])
                y_NO[rows] += (low_NR[rows] @ weight_OR.t()).mul_(scaling).to(y.dtype)
        ctx.save_for_backward(x, low_NR, weight_RD, weight_OR)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, low_NR, weight_RD, weight_OR = ctx.saved_tensors
        g_NO, x_ND = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        g_x = torch.empty_like(x_ND) if ctx.needs_input_grad[1] else None
        g_RD, g_OR = torch.zeros_like(weight_RD), torch.zeros_like(weight_OR)
        with no_autocast(g.device):
            for rows in row_blocks(len(x_ND), max(x_ND.shape[1], g_NO.shape[1]), x.device):
                wide_NO = g_NO[rows].to(low_NR.dtype) * ctx.scaling
                g_OR.addmm_(wide_NO.t(), low_NR[rows])
                g_low_NR = wide_NO @ weight_OR
                g_RD.addmm_(g_low_NR.t(), x_ND[rows].to(low_NR.dtype))
                if g_x is not None:
                    g_x[rows] = g_low_NR @ weight_RD
        return g, None if g_x is None else g_x.view_as(x), g_RD, g_OR, None


def add_lora_output(
    y: torch.Tensor, x: torch.Tensor, weight_RD: torch.Tensor, weight_OR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """y + (scaling * linear(linear(x.float(), A), B)).to(y.dtype), written to y."""
    return _AddLora.apply(y, x, weight_RD, weight_OR, scaling)


class NarrowLora:
    """What peft calls a variant of LoRA: it turns a layer's input and its base's output into its output."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any):
        x = module.lora_dropout[active_adapter](x)
        first, second = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        if result._is_view():  # of an 8-bit layer: autograd forbids to write to a view of its output
            result = result.clone()
        return add_lora_output(result, x, first, second, module.scaling[active_adapter])


def keep_inputs_narrow(model: Any) -> None:
    """Let the float32 LoRA layers of a peft model keep their 16-bit inputs. The weights are not changed.

    Layers that compute something else than plain LoRA (DoRA) stay as they are.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if layer.lora_variant:
            continue
        layer.cast_input_dtype_enabled = False
        for name in layer.lora_A:
            layer.lora_variant[name] = NarrowLora()
