"""Memory and time of one pass, measured on the learner itself, and how they grow with its size.

Memory peaks either when the loss has its workspace on top of everything that the forward pass saved, or in
the backward pass:

    peak(N, M) = resident + max(saved(N) + workspace(M) + scores * M, backward(N))

for N positions, M of them supervised. `saved` and `backward` are straight lines through two passes, of one
and two rows where that costs little: none of the attention kernels in use keeps an [L, L] matrix per head. On
CUDA the allocator counts the bytes. On a CPU the live tensors are counted, which is what a GPU's allocator
would see for the same dtypes, so a run can be fitted to a GPU that this machine does not have.

Shapes (docs/shapes.md): N positions of a micro-batch, M supervised ones, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.batches import Batch, Group, examples_of, ungrouped
from ..data.packing import Packed
from ..data.templates import Example
from ..errors import RunError
from ..loss import chunk_rows
from ..model.accelerator import accelerator
from ..model.head import bare
from ..model.memory import MIB, LiveTensors, Memory
from .checkpoints import random_state, set_random_state
from .faults import ran_out_of_memory
from .learner import Learner
from .metrics import Sums
from .ranks import Ranks

CONTEXT = 600 * MIB
"""What CUDA, cuBLAS and the driver take besides tensors."""
USABLE = 0.94
"""Share of the rest that tensors may fill; the allocator loses some to fragmentation."""
MOST_ROWS = 32
PROBE = 256
"""Tokens of the longer of the short probes; the shorter one has half as many."""


@dataclass(frozen=True)
class LinearFit:
    """y = at_zero + slope * N."""

    at_zero: float
    slope: float

    @classmethod
    def through(cls, a: tuple[float, float], b: tuple[float, float]) -> LinearFit:
        slope = (b[1] - a[1]) / (b[0] - a[0])
        return cls(a[1] - slope * a[0], slope)

    def __call__(self, N: float) -> float:
        return self.at_zero + self.slope * N


@dataclass(frozen=True)
class ProbePass:
    """One forward and backward pass: bytes on top of what is resident."""

    N: int
    M: int
    saved: int
    loss_peak: int
    backward_peak: int
    seconds: float

    @property
    def peak(self) -> int:
        return max(self.loss_peak, self.backward_peak)


@dataclass(frozen=True)
class MemoryFit:
    """Bytes on top of what is resident, as a function of a micro-batch's size."""

    saved: LinearFit
    backward: LinearFit
    scores: float
    """Bytes per supervised token that the loss keeps besides its workspace: J and vectors of length M."""
    row_bytes: int
    """One row of the loss workspace: V * bytes per logit."""
    rows: int
    """Rows of the workspace, unless fewer tokens are supervised."""

    def workspace(self, M: float) -> float:
        return min(self.rows, M) * self.row_bytes

    def peak(self, N: float, M: float) -> float:
        return max(self.saved(N) + self.workspace(M) + self.scores * M, self.backward(N))

    def predicted(self, N: int, M: int) -> ProbePass:
        """The pass of a micro-batch that was not run. It has no time."""
        saved = self.saved(N)
        loss_peak = saved + self.workspace(M) + self.scores * M
        return ProbePass(N, M, int(saved), int(loss_peak), int(self.backward(N)), math.nan)

    def with_chunk(self, chunk_bytes: int | None) -> MemoryFit:
        return self if chunk_bytes is None else replace(self, rows=max(1, chunk_bytes // self.row_bytes))


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches that a run can choose from: the longest group, with N positions, over and over.

    M of its tokens are supervised. A group counts as `each` in `micro_batch_size`, which is at most `most`; a
    micro-batch has one group at least.
    """

    N: int
    M: int
    each: int
    most: int

    @property
    def sizes(self) -> list[int]:
        """The values of `micro_batch_size` that differ, in ascending order."""
        return [min(self.each, self.most), *range(2 * self.each, self.most + 1, self.each)]

    def peak(self, size: int, fit: MemoryFit) -> float:
        """Bytes of the pass of a micro-batch of `size`."""
        groups = max(1, size // self.each)
        return fit.peak(groups * self.N, groups * self.M)

    def within(self, room: float, fit: MemoryFit) -> int:
        """The largest `micro_batch_size` whose pass takes at most `room` bytes; 0 for none."""
        return max([size for size in self.sizes if self.peak(size, fit) <= room], default=0)


def largest_micro_batch(learner: Learner, groups: Sequence[Group]) -> MicroBatches:
    """The choices of a run whose steps draw from `groups`."""
    one, arrange = longest_batch(learner, groups, 1), learner.arrange
    # A group counts as the rows that it takes, or as its examples.
    each = arrange.most_rows(groups) if isinstance(arrange, Packed) else len(one.ids)
    return MicroBatches(one.positions, one.supervised, each, min(MOST_ROWS, learner.recipe.train.batch_size))


def auto_micro_batch(learner: Learner, groups: Sequence[Group]) -> int:
    """Rows that fit this GPU, for `micro_batch_size: auto`; 1 where too little fits to measure it."""
    try:
        fit = measure(learner, groups, learner.checkpointing)
    except RunError:
        return 1  # the step itself retreats to smaller pieces, or says what may fit
    return largest_micro_batch(learner, groups).within(room_for_a_pass(learner), fit) or 1


def room_for_a_pass(learner: Learner) -> float:
    """Bytes that a pass may take on this device besides what is resident, less what is in use elsewhere."""
    device, resident = learner.ranks.device, resident_bytes(learner)
    later = 0 if any(p.grad is not None for p in learner.trainable) else resident["gradients"]
    later += 0 if learner.optimizer.state else resident["optimizer"]
    free = (accelerator(device).free_memory - later) * USABLE
    return min(usable_bytes(accelerator(device).total_memory, device, None) - sum(resident.values()), free)


def measure(learner: Learner, groups: Sequence[Group], checkpointing: bool) -> MemoryFit:
    """Fit of the two largest passes that memory allows, after a pass that allocates the gradients.

    Raises RunError where the two smallest do not fit.
    """
    random = random_state(learner.ranks.device)
    set_checkpointing(learner, checkpointing)
    batches = _batches(learner, groups)
    passes: list[ProbePass] = []

    def measure_next() -> None:
        if not passes:
            probe(learner, batches[0], gauged=False)
        passes.append(probe(learner, batches[len(passes)]))

    while len(passes) < len(batches) and not ran_out_of_memory(measure_next):
        pass
    learner.optimizer.zero_grad()
    set_random_state(random, learner.ranks.device)
    if len(passes) < 2:
        saving = "set " if checkpointing else "set train.gradient_checkpointing: true or "
        raise RunError(
            f"out of memory with one row of {batches[len(passes)].positions} tokens beside the base: {saving}"
            "a smaller train.loss_chunk_mb, or take a smaller model"
        )
    short, long = passes[-2:]
    weight_VD = learner.head.weight_VD
    V, chunk = len(weight_VD), learner.layout.chunk_bytes
    fit = MemoryFit(
        saved=LinearFit.through((short.N, short.saved), (long.N, long.saved)),
        backward=LinearFit.through((short.N, short.backward_peak), (long.N, long.backward_peak)),
        scores=0.0,
        row_bytes=V * weight_VD.element_size(),
        rows=chunk_rows(weight_VD, V, chunk),
    )
    return replace(fit, scores=max(0.0, long.loss_peak - long.saved - fit.workspace(long.M)) / max(1, long.M))


def _batches(learner: Learner, groups: Sequence[Group]) -> list[Batch]:
    """Growing micro-batches: two short rows; where it costs little, the run's longest, of one row and of two.

    In short rows the unpacked weights outweigh the activations and hide how the backward pass grows, and one
    row alone has no padding. On a CPU long rows take minutes.
    """
    longest = max(examples_of(groups), key=lambda example: len(example.ids))
    length = min(PROBE, len(longest.ids))
    batches = [
        learner.arrange(ungrouped([_cut(longest, size)]), 1, learner.pad_id)[0]
        for size in (length // 2, length)
    ]
    if learner.ranks.gauge is not None:
        for batch in (longest_batch(learner, groups, rows) for rows in (1, 2)):
            if batch.positions > batches[-1].positions:
                batches.append(batch)
    return batches


def probe(learner: Learner, batch: Batch, gauged: bool = True) -> ProbePass:
    """One forward and backward pass of the learner's own code, with its memory peaks."""
    device = learner.ranks.device
    signals = {*learner.objective.signals, *(["reference_logp"] if learner.keeps_reference else [])}
    blank = {name: torch.zeros(batch.labels_BL.shape) for name in signals}
    batch = replace(batch, signals_BL={**blank, **batch.signals_BL})  # memory does not depend on their values
    saved = 0
    with _gauge(learner.ranks) if gauged else nullcontext(_Nothing()) as memory:
        memory.reset()
        before = memory.now()

        def forward_is_done(*_):
            nonlocal saved
            saved = memory.now() - before

        hook = bare(learner.model).get_decoder().register_forward_hook(forward_is_done)
        started = time.perf_counter()
        try:
            if learner.objective.step_signals is not None:
                with torch.no_grad():  # what `example_logps` costs
                    learner.token_scores(learner.adapter_model, batch)
            with learner.no_sync():  # each rank measures for itself
                loss = learner.score(batch, Sums(device))
                loss_peak = memory.peak() - before
                memory.reset()
                learner.ranks.backward(loss / max(1, batch.supervised))
                backward_peak = memory.peak() - before
        finally:
            hook.remove()
        accelerator(device).synchronize()
        seconds = time.perf_counter() - started
    return ProbePass(batch.positions, batch.supervised, saved, loss_peak, backward_peak, seconds)


class _Nothing:
    """A gauge for passes that are only timed."""

    def now(self) -> int:
        return 0

    peak = reset = now


@contextmanager
def _gauge(ranks: Ranks) -> Iterator[Memory]:
    if ranks.gauge is not None:
        yield ranks.gauge
        return
    with LiveTensors() as memory:
        yield memory


def resident_bytes(learner: Learner) -> dict[str, int]:
    """What stays in memory between steps. Before the first update the optimizer's part is an estimate."""
    trainable = set(learner.trainable)
    adapter = sum(parameter.nbytes for parameter in trainable)
    states = [v for s in learner.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    bits8 = learner.recipe.train.optimizer != "adamw"
    return {
        "weights": _weight_bytes(learner.adapter_model) - adapter,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": sum(state.nbytes for state in states) or (adapter // 2 if bits8 else 2 * adapter),
    }


def _weight_bytes(model: Any) -> int:
    """Storages of parameters, buffers and 4-bit statistics, each counted once (tied weights share one)."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in (tensor, *_tensors_of(getattr(tensor, "quant_state", None))):
            storages[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """The tensors of a bitsandbytes quantization state and of the state nested in it."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax"):
            yield from _tensors_of(value)


def longest_batch(learner: Learner, groups: Sequence[Group], rows: int) -> Batch:
    """The largest micro-batch that the run can encounter: its longest groups together.

    Padding makes a group's rows as long as its longest example; in packed rows its tokens add up.
    """
    lengths = [[len(example.ids) for example in group] for group in groups]
    size, found = learner.recipe.train.batch_size, []
    for sizes in {tuple(map(max, lengths)), tuple(map(sum, lengths))}:  # the same for single examples
        order = sorted(range(len(groups)), key=sizes.__getitem__, reverse=True)
        found += learner.arrange([groups[i] for i in order[:size]], rows, learner.pad_id)
    return max(found, key=lambda batch: batch.positions)


def usable_bytes(memory: int, device: torch.device, budget: int | None) -> float:
    """Bytes of a device's memory that tensors may take."""
    on_gpu = accelerator(device).kind != "cpu" or budget is not None
    return (memory - CONTEXT) * USABLE if on_gpu else memory * USABLE


def _cut(example: Example, length: int) -> Example:
    return Example(example.id, example.ids[:length], min(example.prompt_length, length // 2))


def set_checkpointing(learner: Learner, on: bool) -> None:
    """Switch checkpointing on or off, unless the backend controls it."""
    if learner.set_checkpointing:
        learner.set_checkpointing(on)
