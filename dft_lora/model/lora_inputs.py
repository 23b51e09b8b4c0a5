"""LoRA in float32 over a 16-bit base, without keeping float32 copies of its inputs.

peft casts the input of every adapted layer to float32, and autograd keeps each copy for the gradient of A:
q, k and v keep the same tensor three times over, and an MLP's down projection its widest. Kept in 16 bits and
cast again in the backward pass they are tensors that are there anyway; every product stays the same, to the
bit. On a Qwen2 of D = 512 this is a third of all activations (docs/measurements/lowres.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _Widened(torch.autograd.Function):
    """x in 16 bits, A in float32: linear(x.float(), A), and x is what is saved.

    Both passes switch autocast off: it would return 16 bits from the one and mix dtypes in the other.
    """

    @staticmethod
    def forward(ctx, x, weight_RD):
        ctx.save_for_backward(x, weight_RD)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(weight_RD.dtype), weight_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight_RD = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            g_x = (g @ weight_RD).to(x.dtype) if ctx.needs_input_grad[0] else None
            g_NR, x_ND = g.flatten(0, -2), x.flatten(0, -2)
            return g_x, g_NR.t() @ x_ND.to(weight_RD.dtype) if ctx.needs_input_grad[1] else None


class WideLinear(torch.nn.Linear):
    """A linear layer of LoRA that widens its input itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype or self.bias is not None:
            return super().forward(x.to(self.weight.dtype))
        return _Widened.apply(x, self.weight)


def keep_inputs_narrow(model: Any) -> None:
    """Let the float32 LoRA layers of a peft model keep 16-bit inputs; the weights stay where they are."""
    from peft.tuners.lora import LoraLayer

    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.cast_input_dtype_enabled = False
        for name, first in layer.lora_A.items():
            with torch.device("meta"):
                wide = WideLinear(first.in_features, first.out_features, bias=first.bias is not None)
            wide.weight, wide.bias = first.weight, first.bias
            layer.lora_A[name] = wide
