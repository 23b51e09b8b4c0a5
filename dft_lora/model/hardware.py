"""The device that computes, and its dtype: chosen by capability, in one table (`RULES`).

LoRA, loss and optimizer are float32 everywhere. float16 needs loss scaling. bfloat16 on a CPU without
matrix units, or on a model of a few million parameters, is many times slower than float32 (15x measured
on the embedded base).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SMALL = 50_000_000


@dataclass(frozen=True)
class Rule:
    """The dtype in which the base computes if `applies(device, parameters)`."""

    where: str
    dtype: torch.dtype
    applies: Callable[[torch.device, int], bool]

    @property
    def consequence(self) -> str:
        scaled = ", loss scaled" if self.dtype == torch.float16 else ""
        return f"base {dtype_name(self.dtype)}{scaled}; LoRA, loss and optimizer float32"


def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8


def _matrix_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


RULES = (  # the first that applies
    Rule("CUDA, compute capability >= 8", torch.bfloat16, lambda on, _: on.type == "cuda" and _capable(on)),
    Rule("CUDA, older (T4: 7.5)", torch.float16, lambda on, _: on.type == "cuda"),
    Rule("CPU, under 50 M parameters", torch.float32, lambda _, parameters: parameters < SMALL),
    Rule("CPU with AMX or AVX512-BF16", torch.bfloat16, lambda *_: _matrix_units()),
    Rule("CPU, other", torch.float32, lambda *_: True),
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


def default_device() -> torch.device:
    """The process's own GPU (LOCAL_RANK under a launcher), else the CPU."""
    import os

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def choose(dtype: str = "auto", parameters: int = 0, device: torch.device | None = None) -> Hardware:
    """Device and compute dtype for a model with that many parameters; a dtype other than auto is final."""
    device = device or default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    if dtype != "auto":
        return Hardware(device, name, getattr(torch, dtype), f"model.dtype is {dtype}")
    rule = next(rule for rule in RULES if rule.applies(device, parameters))
    return Hardware(device, name, rule.dtype, rule.where)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16: the spelling of recipes and of recorded values."""
    return str(dtype).removeprefix("torch.")


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` start again from the memory in use; on a CPU, where the system can (Linux)."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Peak MB since the last reset: allocated memory on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
