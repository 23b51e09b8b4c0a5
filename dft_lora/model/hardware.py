"""The device that computes, and its dtype: chosen by capability, in one table (`RULES`).

LoRA, loss and optimizer are float32 everywhere. float16 needs loss scaling. bfloat16 on a CPU without
matrix units, or on a model of a few million parameters, is many times slower than float32 (15x measured
on the embedded base).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .accelerator import Accelerator, accelerator, default_device

SMALL = 50_000_000


@dataclass(frozen=True)
class Rule:
    """The dtype in which the base computes if `applies(accelerator, parameters, overflows)`."""

    where: str
    dtype: torch.dtype
    applies: Callable[[Accelerator, int, bool], bool]

    @property
    def consequence(self) -> str:
        scaled = ", loss scaled" if self.dtype == torch.float16 else ""
        return f"base {dtype_name(self.dtype)}{scaled}; LoRA, loss and optimizer float32"


def _on(*kinds: str, bfloat16: bool = True) -> Callable[[Accelerator, int, bool], bool]:
    return lambda device, *_: device.kind in kinds and (device.computes_bfloat16 or not bfloat16)


RULES = (  # the first that applies
    Rule("CUDA, compute capability >= 8", torch.bfloat16, _on("cuda")),
    Rule(
        "CUDA, older: Gemma, which overflows float16",
        torch.float32,
        lambda on, _, overflows: on.kind == "cuda" and overflows,
    ),
    Rule("CUDA, older (T4: 7.5)", torch.float16, _on("cuda", bfloat16=False)),
    Rule("XPU, or MPS from macOS 14 on", torch.bfloat16, _on("xpu", "mps")),
    Rule(
        "CPU, under 50 M parameters", torch.float32, lambda on, count, _: on.kind == "cpu" and count < SMALL
    ),
    Rule("CPU with AMX or AVX512-BF16", torch.bfloat16, _on("cpu")),
    Rule("CPU or accelerator, other", torch.float32, lambda *_: True),
)


@dataclass(frozen=True)
class Hardware:
    """The device of this process, its dtype, and the rule that chose it."""

    device: torch.device
    name: str
    dtype: torch.dtype
    rule: str

    @property
    def scales_loss(self) -> bool:
        return self.dtype == torch.float16


def choose(
    dtype: str = "auto", parameters: int = 0, device: torch.device | None = None, overflows: bool = False
) -> Hardware:
    """Device and compute dtype for a model with that many parameters; a dtype other than auto is final.

    `overflows`: its activations exceed the range of float16.
    """
    device = device or default_device()
    found = accelerator(device)
    if dtype != "auto":
        return Hardware(device, found.name, getattr(torch, dtype), f"model.dtype is {dtype}")
    rule = next(rule for rule in RULES if rule.applies(found, parameters, overflows))
    return Hardware(device, found.name, rule.dtype, rule.where)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16: the spelling of recipes and of recorded values."""
    return str(dtype).removeprefix("torch.")
