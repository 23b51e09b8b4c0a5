"""How much memory a piece of work takes, as seen by the machine or by counting tensors.

ProcessMemory    resident memory of this process (Linux): a CPU run as the machine sees it
DeviceMemory     PyTorch's allocator on a GPU
LiveTensors      bytes of live tensors on a CPU: what a GPU's allocator would count
TracedTensors    the same for tensors without contents, on the meta device: work that is too large to run here
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .accelerator import accelerator, resident

MIB = 2**20


class Memory(Protocol):
    """A gauge in bytes; `peak` is the maximum since `reset`."""

    def now(self) -> int: ...
    def peak(self) -> int: ...
    def reset(self) -> None: ...


class ProcessMemory:
    """Resident memory. Each `now` first returns freed pages to the system, as far as possible."""

    def now(self) -> int:
        import ctypes
        import gc

        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return resident("VmRSS")

    def peak(self) -> int:
        return resident("VmHWM")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark


class DeviceMemory:
    """Allocated, not reserved, memory: fragmentation and the CUDA context (about 0.5 GB) come on top."""

    def __init__(self, device: torch.device):
        self.device = accelerator(device)

    def now(self) -> int:
        return self.device.allocated()

    def peak(self) -> int:
        return self.device.peak()

    def reset(self) -> None:
        self.device.reset_peak()


class LiveTensors(TorchDispatchMode):
    """While open, bytes of tensor storages that were created and not yet freed; older tensors do not count.

    It inspects every operation, those of the backward pass too, so the count is exact and the same on every
    machine. It does not see scratch space inside an operation. Costs some 20 microseconds per operation.
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
        results = self._run(operation, arguments, keywords)
        # A view, or a tensor written in place, shares the storage of an input: nothing new.
        known = {_address(tensor) for tensor in tree_iter((arguments, keywords)) if self._counts(tensor)}
        for tensor in tree_iter(results):
            new = self._counts(tensor) and (address := _address(tensor)) not in known
            if new and address not in self._alive:
                self._add(tensor.untyped_storage())
        return results

    def _run(self, operation: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return operation(*arguments, **keywords)

    def _counts(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type != "meta"

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._alive.add(address)
        self._now += size
        self._peak = max(self._peak, self._now)
        weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size


class TracedTensors(LiveTensors):
    """While open, bytes of tensors on the meta device, which have shapes but no contents.

    Token ids, masks and indices do have values here, because shapes depend on them (`nonzero`): every integer
    tensor that follows from integers on the CPU is also computed there. A number that is not known reads as
    0, and tensors that are not known compare as equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def _counts(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == "meta"

    def _run(self, operation: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        ops = torch.ops.aten
        known = self._is_known(arguments, keywords)
        if operation in (ops._local_scalar_dense.default, ops.equal.default):
            if known:
                return operation(*self._on_cpu(arguments))
            return operation is ops.equal.default or 0
        counts = operation in (ops._unique2.default, ops.bincount.default)
        if counts or (operation is ops.nonzero.default and known):  # shapes that depend on values
            real = operation(*self._on_cpu(arguments), **self._on_cpu(keywords))
            results = tree_map(lambda value: torch.empty_like(value, device="meta"), real)
            if known:
                self._values.update(zip(tree_iter(results), tree_iter(real), strict=True))
            return results
        results = operation(*arguments, **keywords)
        if operation.name() == "bitsandbytes::gemm_4bit":
            scratch = results.nbytes + _unpacked_bytes(arguments[0], arguments[2])
            self._peak = max(self._peak, self._now + scratch)
        self._remember(operation, arguments, keywords, results, known)
        return results

    def _is_known(self, arguments: Any, keywords: dict[str, Any]) -> bool:
        tensors = [value for value in tree_iter((arguments, keywords)) if isinstance(value, torch.Tensor)]
        return all(tensor.device.type == "cpu" or tensor in self._values for tensor in tensors)

    def _on_cpu(self, values: Any) -> Any:
        """`values` with the known values of tensors, and the CPU in place of the meta device."""

        def real(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                unknown = value.device.type == "meta" and value not in self._values
                return torch.zeros_like(value, device="cpu") if unknown else self._values.get(value, value)
            return torch.device("cpu") if value == torch.device("meta") else value

        return tree_map(real, values)

    def _remember(self, operation: Any, arguments: Any, keywords: Any, results: Any, known: bool) -> None:
        """Compute the values of integer results whose inputs are known; others are unknown from now on."""
        if not self._counts(results) or results.is_floating_point():
            return
        if known:
            self._values[results] = operation(*self._on_cpu(arguments), **self._on_cpu(keywords))
        else:
            self._values.pop(results, None)


def _unpacked_bytes(x: torch.Tensor, shape: Sequence[int]) -> int:
    """Scratch space of bitsandbytes' 4-bit product on CUDA from 1,537 rows on, and often from fewer.

    It unpacks the matrix to the dtype of `x`, and twice its scales (float32, one per 64 elements).
    """
    elements = shape[0] * shape[1]
    return elements * x.element_size() + 2 * 4 * elements // 64


SHORT = 2**33
"""Bytes of free memory below which a CPU run trades time for memory."""


def give_back_large_blocks(device: torch.device, least: int = MIB) -> None:
    """Where under SHORT bytes are free, make glibc return blocks of at least `least` bytes when freed.

    By default it keeps them, and activations are scattered over a heap full of holes: a step of SmolLM2-135M
    peaks at 2.3 GB instead of 1.7. But the next block then needs new pages: 1.3 million page faults a step,
    which takes 1.8 times as long (Gemma-3-270M: 2.3 and 2.2 GB, 1.5 times).
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and accelerator(device).free_memory < SHORT:
        mallopt(-3, least)  # M_MMAP_THRESHOLD


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def memory_of(device: torch.device) -> Memory:
    """The gauge for work on `device`, as the machine sees it."""
    return DeviceMemory(device) if accelerator(device).counts_memory else ProcessMemory()
