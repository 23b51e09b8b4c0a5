"""Which device computes, and in which dtype: decided by capability, in one table.

    device                              base computes in   LoRA, loss, optimizer
    CUDA, compute capability >= 8       bfloat16           float32
    CUDA, older (T4: 7.5)               float16, scaled    float32
    CPU, model under 50 M parameters    float32            float32
    CPU with AMX or AVX512-BF16         bfloat16           float32
    CPU, other                          float32            float32

float16 needs loss scaling. bfloat16 on a CPU without matrix units, or on a model of a few
million parameters, is many times slower than float32 (15x measured on the embedded base).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALL = 50_000_000


@dataclass(frozen=True)
class Hardware:
    """The device of this process and the rule that chose its dtype."""

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
    """Device and compute dtype for a model of so many parameters; a named dtype is obeyed."""
    device = device or default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    if dtype != "auto":
        return Hardware(device, name, getattr(torch, dtype), f"model.dtype is {dtype}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chosen = torch.bfloat16 if major >= 8 else torch.float16
        return Hardware(device, name, chosen, f"compute capability {major}.{minor}")
    if parameters < SMALL:
        return Hardware(device, name, torch.float32, f"CPU, under {SMALL // 10**6} M parameters")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return Hardware(device, name, torch.bfloat16, "CPU with bfloat16 matrix units")
    return Hardware(device, name, torch.float32, "CPU without bfloat16 matrix units")


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_mb(device: torch.device) -> float:
    """Peak MB so far: allocated on CUDA; resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
