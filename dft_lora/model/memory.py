"""How much memory a piece of work takes: what the machine sees, and what the tensors need.

ProcessMemory    resident set of this process (Linux): a CPU run as the machine sees it
DeviceMemory     PyTorch's allocator on a CUDA device
LiveTensors      bytes of the tensors alive, on a CPU: what a GPU's allocator would count
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MIB = 2**20


class Memory(Protocol):
    """A gauge of bytes; `peak` is the most since `reset`."""

    def now(self) -> int: ...
    def peak(self) -> int: ...
    def reset(self) -> None: ...


class ProcessMemory:
    """Resident memory. Freed pages go back to the system before each reading of `now`, as far as they can."""

    def now(self) -> int:
        import ctypes
        import gc

        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return self._field("VmRSS")

    def peak(self) -> int:
        return self._field("VmHWM")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here

    @staticmethod
    def _field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class DeviceMemory:
    """Allocated, not reserved: fragmentation and the CUDA context (about 0.5 GB) come on top."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class LiveTensors(TorchDispatchMode):
    """Within it, bytes of tensor storages made and not yet freed; tensors from before do not count.

    Every operation is looked at, those of the backward pass too, so the count is exact and the same on every
    machine; scratch space inside an operation is not seen. Costs some 20 microseconds an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = self._peak = 0
        self._alive: set[int] = set()

    def now(self) -> int:
        return self._now

    def peak(self) -> int:
        return self._peak

    def reset(self) -> None:
        self._peak = self._now

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        results = operation(*arguments, **keywords)
        # A view of a tensor, or one written in place, shares the storage of an input: nothing new.
        known = {_address(tensor) for tensor in tree_iter((arguments, keywords)) if _counts(tensor)}
        for tensor in tree_iter(results):
            if _counts(tensor) and _address(tensor) not in known | self._alive:
                self._add(tensor.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._alive.add(address)
        self._now += size
        self._peak = max(self._peak, self._now)
        weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size


def give_back_large_blocks(least: int = MIB) -> None:
    """Let glibc return every freed block of `least` bytes to the system, for this process.

    By itself it raises that size to 32 MB as blocks are freed, and activations then lie scattered over a heap
    full of holes: 511 MB for 296 MB of tensors (309 MB with this), for some page faults a step.
    """
    import ctypes

    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, least)  # M_MMAP_THRESHOLD


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "meta"


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors may take on `device` now; on a CPU what Linux calls available, else 8 GB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 2**33)


def memory_of(device: torch.device) -> Memory:
    """What the machine sees of work on `device`."""
    return DeviceMemory(device) if device.type == "cuda" else ProcessMemory()
