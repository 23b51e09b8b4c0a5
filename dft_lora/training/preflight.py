"""Memory and time of a run, known before it: `dft-lora preflight RECIPE [--gpu-memory 16GB]`.

The real model is built and does real work: forward and backward passes of a few small micro-batches with and
without checkpointing, the run's longest micro-batch, one update of the optimizer. A pass is at its worst
when the loss has its workspace on top of all that the forward pass saved, or in the backward pass:

    peak(T, M) = resident + max(saved(T) + workspace(M) + scores * M, backward(T))

for T positions, M of them supervised; `saved` and `backward` are straight lines through the small passes, for
no attention in use keeps an [L, L] matrix a head. On CUDA the allocator counts the bytes. On a CPU the live
tensors are counted, which is what a GPU's allocator would see of the same dtypes: so a run can be fitted to a
GPU that is not here.

Legend: T positions of a micro-batch, M supervised ones, V vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..config import Recipe
from ..data.batches import Batch, step_examples
from ..data.templates import Example
from ..errors import RequestError
from ..loss import chunk_rows
from ..model.backends import prepare
from ..model.head import bare
from ..model.memory import MIB, DeviceMemory, LiveTensors, Memory
from .checkpoints import random_state, set_random_state
from .figures import Sums

if TYPE_CHECKING:
    from .loop import Trainer

CONTEXT = 600 * MIB
"""What CUDA, cuBLAS and the driver hold beside tensors."""
USABLE = 0.94
"""Share of the rest that tensors may fill; the allocator loses some to fragments."""
ENOUGH_ROWS = 4
"""Rows of a micro-batch from which more of them hardly make a GPU faster; checkpointing costs a third."""
MOST_ROWS = 32
PROBE = 256
"""Tokens of the longer probe; the shorter has half of them."""


@dataclass(frozen=True)
class Line:
    """y = at_zero + slope * T."""

    at_zero: float
    slope: float

    @classmethod
    def through(cls, a: tuple[float, float], b: tuple[float, float]) -> Line:
        slope = (b[1] - a[1]) / (b[0] - a[0])
        return cls(a[1] - slope * a[0], slope)

    def __call__(self, T: float) -> float:
        return self.at_zero + self.slope * T


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: bytes above what is resident."""

    T: int
    M: int
    saved: int
    loss_peak: int
    backward_peak: int
    seconds: float

    @property
    def peak(self) -> int:
        return max(self.loss_peak, self.backward_peak)


@dataclass(frozen=True)
class Fit:
    """Bytes above what is resident, as a function of a micro-batch's size."""

    saved: Line
    backward: Line
    scores: float
    """Bytes a supervised token that the loss keeps beside its workspace: J and vectors of length M."""
    row_bytes: int
    """One row of the loss workspace: V * bytes a logit."""
    rows: int
    """Rows of the workspace, unless fewer are supervised."""

    def workspace(self, M: float) -> float:
        return min(self.rows, M) * self.row_bytes

    def peak(self, T: float, M: float) -> float:
        return max(self.saved(T) + self.workspace(M) + self.scores * M, self.backward(T))

    def with_chunk(self, chunk_bytes: int | None) -> Fit:
        return self if chunk_bytes is None else replace(self, rows=max(1, chunk_bytes // self.row_bytes))


def preflight(recipe: Recipe, budget: int | None = None) -> dict[str, Any]:
    """Measure a recipe on this machine; `budget`: bytes of the GPU to fit, this machine's own when None.

    Returns plain values, bytes and seconds. Raises a RequestError like `train`; no file is written.
    """
    from .loop import Trainer
    from .plan import make_plan
    from .ranks import Ranks

    prepare(recipe)
    if budget is not None and recipe.model.dtype == "auto" and not torch.cuda.is_available():
        recipe = recipe.override(["model.dtype=bfloat16"])  # what a GPU that is not here would take
    plan = make_plan(recipe)
    trainer = Trainer(plan, Ranks(recipe))
    device = trainer.ranks.device
    choices = (False, True) if trainer.set_checkpointing else (trainer.checkpointing,)
    fits = {on: measure(trainer, on) for on in choices}
    _checkpointing(trainer, trainer.checkpointing)
    worst = longest_batch(trainer, trainer.layout.micro_batch_size)
    real = run(trainer, worst)
    started = time.perf_counter()
    trainer.update(0.0)
    update_seconds = time.perf_counter() - started
    timed = run(trainer, worst, gauged=False)
    trainer.optimizer.zero_grad()
    resident = resident_bytes(trainer)
    fit = fits[trainer.checkpointing]
    available = budget or _memory_of_machine(device)
    positions = _positions_a_step(trainer)
    a_step = timed.seconds / worst.positions * positions + update_seconds
    return {
        "device": trainer.hardware.name,
        "counted": "CUDA allocator" if device.type == "cuda" else "live tensors",
        "dtype": str(trainer.hardware.dtype).removeprefix("torch."),
        "micro_batch_size": trainer.layout.micro_batch_size,
        "gradient_checkpointing": trainer.checkpointing,
        "longest_micro_batch": list(worst.input_ids_BL.shape),
        "bytes": resident
        | {"activations": real.saved, "loss_workspace": int(fit.workspace(real.M))}
        | {"scores_and_backward": max(0, real.peak - real.saved - int(fit.workspace(real.M)))},
        "peak": sum(resident.values()) + real.peak,
        "predicted_peak": sum(resident.values()) + int(fit.peak(real.T, real.M)),
        "available": available,
        "headroom": int(usable(available, device, budget)) - sum(resident.values()) - real.peak,
        "seconds_a_step": a_step,
        "steps": plan.steps,
        "seconds_in_all": a_step * plan.steps,
        "proposal": propose(fits, sum(resident.values()), usable(available, device, budget), real, trainer),
        "fit": {"checkpointing" if on else "plain": asdict(fits[on]) for on in fits},
    }


def usable(memory: int, device: torch.device, budget: int | None) -> float:
    """Bytes that tensors may take of a device's memory."""
    on_gpu = device.type == "cuda" or budget is not None
    return (memory - CONTEXT) * USABLE if on_gpu else memory * USABLE


def propose(
    fits: dict[bool, Fit], resident: int, limit: float, worst: Pass, trainer: Trainer
) -> dict[str, Any] | None:
    """The fastest setting that keeps the longest micro-batch within `limit` bytes; None when nothing does.

    First without checkpointing, if that leaves room for four rows; else with it, as many rows as fit; a
    smaller loss chunk only where one row would not fit otherwise. `fits` may hold one of the two alone.
    """
    rows = trainer.layout.micro_batch_size
    T, M = worst.T / rows, worst.M / rows
    most = min(MOST_ROWS, trainer.recipe.train.batch_size)
    enough = min(ENOUGH_ROWS, most)
    leanest = max(fits)  # with checkpointing, where that was measured
    whole = fits[leanest].rows * fits[leanest].row_bytes
    for checkpointing, least, chunk in (
        (False, enough, None),
        (leanest, 1, None),
        (leanest, 1, whole // 4),
        (leanest, 1, whole // 32),
    ):
        if checkpointing not in fits:
            continue
        fit = fits[checkpointing].with_chunk(chunk)
        fitting = [m for m in range(1, most + 1) if resident + fit.peak(m * T, m * M) <= limit]
        if fitting and fitting[-1] >= least:
            best = fitting[-1]
            return {
                "train.micro_batch_size": best,
                "train.gradient_checkpointing": checkpointing,
                "train.loss_chunk_mb": None if chunk is None else max(1, chunk // MIB),
                "predicted_peak": int(resident + fit.peak(best * T, best * M)),
            }
    return None


def auto_micro_batch(trainer: Trainer) -> int:
    """Rows that fit this GPU, for `micro_batch_size: auto` on CUDA."""
    fit = measure(trainer, trainer.checkpointing)
    worst = longest_batch(trainer, 1)
    resident = sum(resident_bytes(trainer).values())
    limit = usable(_memory_of_machine(trainer.ranks.device), trainer.ranks.device, None)
    most = min(MOST_ROWS, trainer.recipe.train.batch_size)
    T, M = worst.positions, worst.supervised
    return max([m for m in range(1, most + 1) if resident + fit.peak(m * T, m * M) <= limit], default=1)


def measure(trainer: Trainer, checkpointing: bool) -> Fit:
    """Two passes of one short row each, after one that makes the gradients."""
    random = random_state(trainer.ranks.device)
    _checkpointing(trainer, checkpointing)
    longest = max(trainer.plan.examples, key=lambda example: len(example.ids))
    length = min(PROBE, len(longest.ids))
    batches = [_batch(trainer, [_cut(longest, size)]) for size in (length // 2, length)]
    run(trainer, batches[0], gauged=False)
    short, long = (run(trainer, batch) for batch in batches)
    trainer.optimizer.zero_grad()
    set_random_state(random, trainer.ranks.device)
    weight_VD = trainer.head.weight_VD
    V, chunk = len(weight_VD), trainer.layout.chunk_bytes
    fit = Fit(
        saved=Line.through((short.T, short.saved), (long.T, long.saved)),
        backward=Line.through((short.T, short.backward_peak), (long.T, long.backward_peak)),
        scores=0.0,
        row_bytes=V * weight_VD.element_size(),
        rows=chunk_rows(weight_VD, V, 2**30, chunk),
    )
    return replace(fit, scores=max(0.0, long.loss_peak - long.saved - fit.workspace(long.M)) / max(1, long.M))


def run(trainer: Trainer, batch: Batch, gauged: bool = True) -> Pass:
    """One forward and backward pass of the trainer's own code, with its peaks."""
    device = trainer.ranks.device
    saved = 0
    with _gauge(device) if gauged else nullcontext(_Nothing()) as memory:
        memory.reset()
        before = memory.now()

        def forward_is_done(*_):
            nonlocal saved
            saved = memory.now() - before

        hook = bare(trainer.model).get_decoder().register_forward_hook(forward_is_done)
        started = time.perf_counter()
        try:
            loss = trainer.score(batch, Sums(device))
            loss_peak = memory.peak() - before
            memory.reset()
            trainer.ranks.backward(loss / max(1, batch.supervised))
            backward_peak = memory.peak() - before
        finally:
            hook.remove()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return Pass(batch.positions, batch.supervised, saved, loss_peak, backward_peak, seconds)


class _Nothing:
    """A gauge for passes that are only timed."""

    def now(self) -> int:
        return 0

    peak = reset = now


@contextmanager
def _gauge(device: torch.device) -> Iterator[Memory]:
    if device.type == "cuda":
        yield DeviceMemory(device)
        return
    with LiveTensors() as memory:
        yield memory


def resident_bytes(trainer: Trainer) -> dict[str, int]:
    """What stays from step to step. Before the first update the optimizer's part is its size to come."""
    trainable = set(trainer.trainable)
    adapter = sum(parameter.nbytes for parameter in trainable)
    states = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    bits8 = trainer.recipe.train.optimizer != "adamw"
    return {
        "weights": _weight_bytes(trainer.adapter_model) - adapter,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": sum(state.nbytes for state in states) or (adapter // 2 if bits8 else 2 * adapter),
    }


def _weight_bytes(model: Any) -> int:
    """Storages of parameters, buffers and 4-bit statistics, each once (tied weights are one)."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in (tensor, *_tensors_of(getattr(tensor, "quant_state", None))):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """The tensors of a bitsandbytes quantisation state and of the state nested in it."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax"):
            yield from _tensors_of(value)


def longest_batch(trainer: Trainer, rows: int) -> Batch:
    """The micro-batch of most positions that the run can meet: its longest examples, together."""
    longest = sorted(trainer.plan.examples, key=lambda example: len(example.ids), reverse=True)
    size = trainer.recipe.train.batch_size
    batches = trainer.arrange(longest[:size], rows, trainer.plan.renderer.pad_id)
    return max(batches, key=lambda batch: batch.positions)


def _positions_a_step(trainer: Trainer, steps: int = 4) -> float:
    """Tokens and padding of a mean step, from the first few."""
    settings, examples = trainer.recipe.train, trainer.plan.examples
    total = 0
    for step in range(steps):
        chosen = [examples[i] for i in step_examples(len(examples), settings.batch_size, settings.seed, step)]
        mine = chosen[:: trainer.ranks.world]
        batches = trainer.arrange(mine, trainer.layout.micro_batch_size, trainer.plan.renderer.pad_id)
        total += sum(batch.positions for batch in batches)
    return total / steps


def _batch(trainer: Trainer, examples: Sequence[Example]) -> Batch:
    return trainer.arrange(examples, len(examples), trainer.plan.renderer.pad_id)[0]


def _cut(example: Example, length: int) -> Example:
    return Example(example.id, example.ids[:length], min(example.prompt_length, length // 2))


def _checkpointing(trainer: Trainer, on: bool) -> None:
    """Switch checkpointing, unless it is the backend's own."""
    if trainer.set_checkpointing:
        trainer.set_checkpointing(on)


def _memory_of_machine(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_size(text: str) -> int:
    """`16GB`, `24 GiB` or `8000MB` in bytes; GB is read as GiB, as vendors of GPUs do.

    Raises RequestError for anything else.
    """
    units = {"MB": 2**20, "MIB": 2**20, "GB": 2**30, "GIB": 2**30}
    number = text.strip().upper().rstrip("GMIB").strip()
    unit = text.strip().upper()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise RequestError(f"--gpu-memory {text!r}: write it as 16GB") from None


def table(found: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"{name.replace('_', ' '):24} {size / MIB:10,.0f} MB" for name, size in found["bytes"].items()]
    lines += [
        f"{'peak':24} {found['peak'] / MIB:10,.0f} MB   (fit: {found['predicted_peak'] / MIB:,.0f} MB)",
        f"{'headroom':24} {found['headroom'] / MIB:10,.0f} MB   of {found['available'] / MIB:,.0f} MB",
        f"{'a step':24} {found['seconds_a_step']:10.1f} s",
        f"{'the whole run':24} {found['seconds_in_all'] / 3600:10.2f} h   ({found['steps']} steps)",
        f"{found['counted']} on {found['device']}, {found['dtype']}, longest micro-batch "
        f"{' x '.join(map(str, found['longest_micro_batch']))}",
    ]
    proposal = found["proposal"]
    if proposal is None:
        return "\n".join([*lines, "fits: nothing; a shorter data.max_length or a smaller model would"])
    changes = [f"--set {k}={v}" for k, v in proposal.items() if k.startswith("train.") and v is not None]
    peak = f"{proposal['predicted_peak'] / MIB:,.0f} MB"
    return "\n".join([*lines, f"fits: {' '.join(changes).lower()}   ({peak})"])
