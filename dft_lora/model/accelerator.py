"""What the kit asks of a device: CUDA (ROCm too), XPU, Apple's MPS, or the CPU behind the same names.

Every other module asks here, so a new kind of accelerator costs one class. Triton kernels and the benchmarks
for GPUs stay with CUDA. Only the CPU has run; the others are rehearsed (docs/scaling.md).
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import RequestError

LONGEST_WAIT = timedelta(days=7)
"""Of one process for another, which may answer or sample for hours. NCCL's default is ten minutes."""


class Accelerator:
    """One device, through torch's module of its kind: `torch.cuda` and `torch.xpu` have the same names."""

    counts_memory = True
    """Whether the allocator knows the peak of its tensors."""

    def __init__(self, device: torch.device):
        self.device = device

    @cached_property
    def _torch(self) -> Any:
        return torch.get_device_module(self.device)

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def name(self) -> str:
        return self._torch.get_device_name(self.device)

    @property
    def computes_bfloat16(self) -> bool:
        """In its matrix units: on CUDA from compute capability 8 on."""
        if self.kind == "cuda":
            return torch.cuda.get_device_capability(self.device)[0] >= 8
        return self._torch.is_bf16_supported()

    @property
    def widest_float(self) -> torch.dtype:
        """float64 where such tensors can exist; else float32."""
        has_it = getattr(self._torch.get_device_properties(self.device), "has_fp64", True)  # XPU says
        return torch.float64 if has_it else torch.float32

    @property
    def quantizes(self) -> bool:
        """Whether bitsandbytes computes here with a base of 4 or 8 bits."""
        from bitsandbytes import supported_torch_devices

        return self.kind in supported_torch_devices

    @property
    def total_memory(self) -> int:
        """Bytes, in use or not."""
        return self._torch.get_device_properties(self.device).total_memory

    @property
    def free_memory(self) -> int:
        """Bytes for new tensors now: the device's free ones, and those that torch keeps for reuse."""
        kept = self._torch.memory_reserved(self.device) - self._torch.memory_allocated(self.device)
        return self._torch.mem_get_info(self.device)[0] + kept

    def allocated(self) -> int:
        """Bytes of tensors now, after all work that was queued."""
        self.synchronize()
        return self._torch.memory_allocated(self.device)

    def peak(self) -> int:
        """The most bytes since `reset_peak`: of tensors where `counts_memory`, else of the whole process."""
        self.synchronize()
        return self._torch.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        self._torch.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        """Wait for all work that was queued."""
        self._torch.synchronize(self.device)

    def empty_cache(self) -> None:
        """Give the allocator's unused memory back."""
        self._torch.empty_cache()

    def random_state(self) -> torch.Tensor:
        """The device's own generator, as bytes; empty on a CPU, whose generator is torch's."""
        return self._torch.get_rng_state(self.device)

    def set_random_state(self, state: torch.Tensor) -> None:
        self._torch.set_rng_state(state, self.device)


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory, now or at most since the last reset; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Cpu(Accelerator):
    """The host. Its peak is the resident memory of the process."""

    counts_memory = False
    quantizes = True
    widest_float = torch.float64

    @property
    def name(self) -> str:
        import platform

        try:
            with open("/proc/cpuinfo", encoding="utf-8") as lines:
                return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            return platform.processor() or platform.machine()

    @property
    def computes_bfloat16(self) -> bool:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()

    @property
    def total_memory(self) -> int:
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), self._container()[0])

    @property
    def free_memory(self) -> int:
        """What Linux says is available, or 8 GB; in a container, no more than is left of its limit."""
        facts = Path("/proc/meminfo")
        lines = facts.read_text().splitlines() if facts.is_file() else []
        free = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        limit, used = self._container()
        return min(1024 * int(next(free, 2**23)), max(0, limit - used))

    def _container(self, folder: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
        """Bytes that a container (cgroup 2) may use, and those in use without the file cache."""
        try:
            limit = int((folder / "memory.max").read_text())  # "max" without a limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return limit, int((folder / "memory.current").read_text()) - int(stat["inactive_file"])
        except (OSError, ValueError, KeyError):
            return 2**62, 0

    def peak(self) -> int:
        with suppress(OSError, StopIteration):  # getrusage counts what the parent took before it started us
            return resident("VmHWM")
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def reset_peak(self) -> None:
        """Only where the system can (Linux)."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...

    def random_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_random_state(self, state: torch.Tensor) -> None: ...


class Mps(Cpu):
    """Apple's GPU. It shares the host's memory; torch counts the tensors there, but not their peak."""

    quantizes = Accelerator.quantizes
    widest_float = torch.float32

    @property
    def name(self) -> str:
        return f"{super().name} (MPS)"

    @property
    def computes_bfloat16(self) -> bool:
        return torch.backends.mps.is_macos_or_newer(14, 0)

    @property
    def total_memory(self) -> int:
        return self._torch.recommended_max_memory()

    @property
    def free_memory(self) -> int:
        return self.total_memory - self._torch.current_allocated_memory()

    def synchronize(self) -> None:
        self._torch.synchronize()

    def empty_cache(self) -> None:
        self._torch.empty_cache()

    def random_state(self) -> torch.Tensor:
        return self._torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        self._torch.set_rng_state(state)


KINDS: dict[str, type[Accelerator]] = {"cpu": Cpu, "meta": Cpu, "mps": Mps}
"""Device type -> its class; `Accelerator` for all others."""


def accelerator(device: torch.device) -> Accelerator:
    """The device behind the names of `Accelerator`."""
    return KINDS.get(device.type, Accelerator)(device)


def default_device() -> torch.device:
    """The process's own accelerator, else the CPU: under a launcher that of LOCAL_RANK, modulo those it
    sees; without one, torch's current device.

    The environment variable DFT_LORA_DEVICE=cpu leaves an accelerator alone. Raises RequestError for another.
    """
    if wanted := os.environ.get("DFT_LORA_DEVICE"):
        if wanted != "cpu":
            raise RequestError(
                f"DFT_LORA_DEVICE={wanted}: only 'cpu' is accepted; unset it to use an accelerator"
            )
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    index = torch.accelerator.current_device_index() if rank is None else int(rank)
    return torch.device(found.type, index % torch.accelerator.device_count())
