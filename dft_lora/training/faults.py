"""What can go wrong during a run, each handled by a small mechanism: signals, bad numbers, memory.

StopSignals       SIGTERM or Ctrl-C: finish the step, save a checkpoint, exit
Skips             loss or gradient not finite: skip the step, give up after five in a row
Layout            out of memory: repeat the step in smaller pieces, at most three times
SaveClock         when the next checkpoint is due
"""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RunError
from ..model.accelerator import accelerator, default_device

LIMIT_IN_A_ROW = 5
RETREATS = 3
MINUTES_BETWEEN_SAVES = 5
LONG = 2048
"""Tokens of a row from which the MLP's activations outweigh the rest of a step."""

log = logging.getLogger(__name__)


class StopSignals:
    """While open, SIGTERM and SIGINT request a stop instead of stopping; a second SIGINT stops immediately.

    `number` is the signal that made the request. Outside the main thread this does nothing: Python delivers
    signals to the main thread only.
    """

    ASKING = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.ASKING}
        return self

    def __exit__(self, *_error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self.number is not None

    def _ask(self, number: int, _frame) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            # print() may be interrupted halfway by this very handler; a system call may not.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops immediately\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            # Not within a second: launchers forward a Ctrl-C that the terminal has already sent.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@dataclass
class Skips:
    """Steps that were skipped because the loss or a gradient was not finite."""

    total: int = 0
    in_a_row: int = 0
    """Does not count steps that the loss scaler skips as part of its normal operation."""

    def note(self, changed: bool, sound: bool, step: int, dtype: str, examples: Sequence[str]) -> None:
        """Count a step. Raises RunError with a diagnosis at the fifth unsound step in a row."""
        self.total += not changed
        if sound:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        shown = ", ".join(examples[:8]) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        log.warning("step %d skipped: loss or gradient is not finite (examples %s)", step, shown)
        if self.in_a_row == LIMIT_IN_A_ROW:
            raise RunError(
                f"loss or gradient was not finite in {LIMIT_IN_A_ROW} steps in a row, up to step {step}; "
                f"base in {dtype}, adapter in float32; the last step's examples: {shown}. Inspect these "
                "rows, lower train.learning_rate, or set model.dtype: float32 (or bfloat16, not float16)"
            )


@dataclass(frozen=True)
class Layout:
    """How a step is split into pieces. Every layout computes the same step, up to rounding."""

    micro_batch_size: int
    chunk_bytes: int | None = None
    """Workspace of the loss; None: the loss engine's default."""

    def smaller(self, rows: int, row_bytes: int, first: bool, least: int = 1) -> Layout | None:
        """The next smaller layout, None if there is none.

        The `first` time, halves the loss chunk, which has `rows` rows of `row_bytes` (even below the engine's
        floor). Then halves the micro-batch, which doubles accumulation. Once micro-batches have `least`
        examples, halves the chunk again, down to one row.
        """
        chunk = self.chunk_bytes or rows * row_bytes
        if not first and self.micro_batch_size > least:
            return Layout(max(least, math.ceil(self.micro_batch_size / 2)), chunk)
        halved = Layout(self.micro_batch_size, max(row_bytes, chunk // 2))
        return None if halved == self else halved


def out_of_memory_text(
    layout: Layout,
    sizes: Sequence[tuple[int, int]],
    passed: int,
    checkpointing: bool,
    mlp_tile: int | None = None,
) -> str:
    """What was tried, and what would fit.

    `sizes` are [B, L] of the step's micro-batches, shortest first; the first `passed` of them succeeded.
    """
    longest = max((length for _, length in sizes), default=0)
    tried = f"{layout.micro_batch_size} example(s) of up to {longest} tokens at a time"
    if layout.chunk_bytes:
        tried += f" and a loss chunk of {layout.chunk_bytes / 2**20:.1f} MB"
    fits = [] if checkpointing else ["train.gradient_checkpointing: true"]
    if layout.micro_batch_size > 1:
        fits.append(f"train.micro_batch_size: {max(1, layout.micro_batch_size // 2)}")
    if mlp_tile is None and longest > LONG:
        fits.append(f"train.mlp_tile: {LONG}")
    if went := max((length for _, length in sizes[:passed]), default=0):
        fits.append(f"data.max_length: {went} (rows of {went} tokens did fit)")
    else:
        fits.append(f"data.max_length: {longest // 2}")
    return f"out of memory with {tried}, after at most {RETREATS} retries; what may fit: {', '.join(fits)}"


def ran_out_of_memory(work: Callable[[], Any]) -> bool:
    """Run `work`; returns whether memory ran out. Other errors propagate."""
    try:
        work()
        return False
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Only outside the except clause are the frames released that held the tensors of the failed attempt.
    gc.collect()
    accelerator(default_device()).empty_cache()
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error, Python's, or the messages of its allocators, of the CUDA driver and of cuBLAS."""
    texts = (
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA out of memory",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "when calling `cublasCreate",
        "MPS backend out of memory",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(t in str(error) for t in texts)


class SaveClock:
    """When a checkpoint is due: every `steps` steps, or every five minutes if `steps` is None."""

    def __init__(self, steps: int | None):
        self.steps, self.last = steps, time.monotonic()

    def due(self, step: int) -> bool:
        if self.steps is not None:
            return step % self.steps == 0
        return time.monotonic() - self.last >= 60 * MINUTES_BETWEEN_SAVES

    def saved(self) -> None:
        self.last = time.monotonic()
