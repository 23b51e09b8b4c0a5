"""Row by row work in blocks that stay in a CPU's cache.

transformers' RMSNorm makes half a dozen float32 tensors of the size of its input, and autograd keeps one of
them. On a CPU each comes as fresh pages from the system, and they pass through main memory. `InBlocks` calls
the same module on a few rows at a time and keeps its 16-bit input alone; the backward pass calls it again.
Values and gradients stay bit-exactly the same, because rows do not interact.

Shapes (docs/shapes.md): N positions, D width of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**17
"""Of a block per thread: 512 KB in float32, half of a core's second-level cache."""


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of all rows: on a CPU blocks that fit in the cache, elsewhere one."""
    size = max(1, rows)
    if device.type == "cpu":
        size = max(64, torch.get_num_threads() * BLOCK_ELEMENTS // width)
    for start in range(0, rows, size):
        yield slice(start, start + size)


class _InBlocks(torch.autograd.Function):
    """module(x) for a frozen module that treats every row by itself; saves x alone."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        x_ND = x.reshape(-1, x.shape[-1])
        y_ND = torch.empty_like(x_ND)
        for rows in row_blocks(*x_ND.shape, x.device):
            y_ND[rows] = module(x_ND[rows])
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        x_ND, g_ND = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        g_x = torch.empty_like(x_ND)
        for rows in row_blocks(*x_ND.shape, x.device):
            part = x_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.module(part)
            (g_x[rows],) = torch.autograd.grad(y, part, g_ND[rows])
        return None, g_x.view(x.shape)


class InBlocks(torch.nn.Module):
    """A frozen module of rows, called on blocks of them."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _InBlocks.apply(self.module, x)


def norms_in_blocks(model: Any) -> None:
    """Let the frozen RMSNorms of a transformers model on a CPU work in blocks."""
    norms = [
        (name, module) for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")
    ]
    for name, norm in norms:
        if not any(parameter.requires_grad for parameter in norm.parameters()):
            model.set_submodule(name, InBlocks(norm))
