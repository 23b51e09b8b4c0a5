"""The floor of a training step: its matrix products alone, each timed over and over on the same operands.

Recorded are the products of the layers, of LoRA and of the head, forward and backward, with their dtypes. A
4-bit layer counts as the product of the unpacked matrix. Those inside fused attention are not counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LEFT = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
"""Where the left operand stands; the right one follows."""
PACKED = "bitsandbytes::gemm_4bit"

Operand = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype."""


class MatrixProducts(TorchDispatchMode):
    """While open, counts the matrix products by their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Operand, Operand]] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation._schema.name
        if name in LEFT:
            first = LEFT[name]
            self.counts[_operand(arguments[first]), _operand(arguments[first + 1])] += 1
        elif name == PACKED:
            x, (O, K) = arguments[0], arguments[2]  # noqa: E741 (docs/shapes.md)
            self.counts[_operand(x.flatten(0, -2)), ((K, O), (1, K), x.dtype)] += 1
        return operation(*arguments, **(keywords or {}))

    def cpu_seconds(self, repeats: int = 3) -> float:
        """Processor seconds of all products, one after the other, into memory that exists already."""
        return sum(count * _seconds(*pair, repeats) for pair, count in self.counts.items())


def products_of(step: Callable[[], Any]) -> MatrixProducts:
    """Run a step and return its products."""
    with MatrixProducts() as products:
        step()
    return products


def _operand(tensor: torch.Tensor) -> Operand:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _seconds(left: Operand, right: Operand, repeats: int) -> float:
    a, b = (
        torch.empty_strided(shape, strides, dtype=dtype).fill_(0.01)
        for shape, strides, dtype in (left, right)
    )
    out = torch.matmul(a, b)
    started = time.process_time()
    for _ in range(repeats):
        torch.matmul(a, b, out=out)
    return (time.process_time() - started) / repeats
