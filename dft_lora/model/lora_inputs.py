"""LoRA in float32 over a 16-bit base, without keeping float32 copies of its inputs.

peft casts the input of every adapted layer to float32, and autograd keeps each copy for the gradient of A: q,
k and v keep the same tensor three times, and an MLP's down projection keeps its widest one. Here the 16-bit
input is kept instead, a tensor that exists anyway, and cast again in the backward pass. All products stay
bit-exactly the same. On a Qwen2 with D = 512 this saves a third of all activations
(docs/measurements/lowres.md).

Shapes (docs/shapes.md): N positions, D input width of a layer, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _Widened(torch.autograd.Function):
    """linear(x.float(), A) for x in 16 bits and A in float32; saves the 16-bit x.

    Both passes disable autocast, which would return 16 bits in the one and mix dtypes in the other.
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
    """A LoRA layer that casts its input to its own dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype or self.bias is not None:
            return super().forward(x.to(self.weight.dtype))
        return _Widened.apply(x, self.weight)


def keep_inputs_narrow(model: Any) -> None:
    """Let the float32 LoRA layers of a peft model keep their 16-bit inputs. The weights are not changed."""
    from peft.tuners.lora import LoraLayer

    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.cast_input_dtype_enabled = False
        for name, first in layer.lora_A.items():
            with torch.device("meta"):
                wide = WideLinear(first.in_features, first.out_features, bias=first.bias is not None)
            wide.weight, wide.bias = first.weight, first.bias
            layer.lora_A[name] = wide
