"""Memory and time of a run, measured before it: `dft-lora preflight RECIPE [--gpu-memory 16GB]`.

It builds the real model and runs it: forward and backward passes of a few small micro-batches with and
without checkpointing (`probe.py`), the run's longest micro-batch, and one optimizer update. For a target GPU
that is not here, the same passes run on shapes alone (`trace.py`): no weights are loaded, nothing is timed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..config import Recipe
from ..errors import RequestError, RunError
from ..model.accelerator import accelerator, default_device
from ..model.backends import prepare
from ..model.generation_memory import Bound
from ..model.hardware import dtype_name
from ..model.memory import MIB
from .faults import ran_out_of_memory
from .learner import Learner
from .plan import Plan, make_plan
from .probe import (
    MemoryFit,
    MicroBatches,
    ProbePass,
    largest_micro_batch,
    longest_batch,
    measure,
    probe,
    resident_bytes,
    room_for_a_pass,
    set_checkpointing,
    usable_bytes,
)
from .ranks import Ranks
from .steps import FixedGroups
from .trace import can_trace, traced

ENOUGH_ROWS = 4
"""From this many rows per micro-batch, more rows hardly help a GPU; checkpointing costs a third."""


def preflight(recipe: Recipe, budget: int | None = None) -> dict[str, Any]:
    """Measure a recipe on this machine; `budget`: bytes of the target GPU, None for this machine's own.

    Returns plain values in bytes and seconds. Raises a RequestError like `train`. Writes no file.
    """
    prepare(recipe)
    elsewhere = budget is not None and default_device().type == "cpu"
    if elsewhere and recipe.model.dtype == "auto":
        recipe = recipe.override(["model.dtype=bfloat16"])  # what the target GPU would use
    plan = make_plan(recipe)
    if elsewhere and can_trace(recipe):
        with traced(recipe, plan.objective, plan.renderer.pad_id) as learner:
            return measured(learner, plan, budget)
    return measured(Learner(recipe, plan.objective, plan.renderer.pad_id, Ranks(recipe)), plan, budget)


def measured(learner: Learner, plan: Plan, budget: int | None) -> dict[str, Any]:
    device = learner.ranks.device
    choices = (False, True) if learner.set_checkpointing else (learner.checkpointing,)
    fits = fits_of(learner, plan, choices)
    checkpointing = learner.checkpointing if learner.checkpointing in fits else not learner.checkpointing
    fit = fits[checkpointing]
    set_checkpointing(learner, checkpointing)
    worst = longest_batch(learner, plan.groups, learner.layout.micro_batch_size)
    passes: list[ProbePass] = []

    def measure_worst() -> None:
        for parameter in learner.trainable:  # counted as resident, not in the peak of the pass
            parameter.grad = torch.zeros_like(parameter)
        passes.append(probe(learner, worst))

    if fails := ran_out_of_memory(measure_worst):
        passes.append(fit.predicted(worst.positions, worst.supervised))
    real = passes[0]
    seconds = None
    if not fails:
        started = time.perf_counter()
        learner.update(0.0)
        update_seconds = time.perf_counter() - started
        if device.type != "meta":
            timed = probe(learner, worst, gauged=False)
            seconds = timed.seconds / worst.positions * _positions_per_step(learner, plan) + update_seconds
    learner.optimizer.zero_grad()
    resident = resident_bytes(learner)
    available = accelerator(device).total_memory if budget is None else budget
    answers = answering(learner, plan)
    most = max(real.peak, answers["bytes"]) if answers else real.peak
    limit = usable_bytes(available, device, budget)
    left = limit if budget is not None else sum(resident.values()) + room_for_a_pass(learner)
    allocator = "PyTorch's allocator" if learner.ranks.gauge is not None else "live tensors"
    counted = "traced tensors" if device.type == "meta" else allocator
    return {
        "device": "a GPU that is not here" if device.type == "meta" else learner.hardware.name,
        "counted": counted,
        "dtype": dtype_name(learner.hardware.dtype),
        "micro_batch_size": learner.layout.micro_batch_size,
        "gradient_checkpointing": checkpointing,
        "ran_out_of_memory": fails or checkpointing != learner.checkpointing,
        "peak_is": "predicted" if fails else "measured",
        "longest_micro_batch": list(worst.input_ids_BL.shape),
        "bytes": resident
        | {"activations": real.saved, "loss_workspace": int(fit.workspace(real.M))}
        | {"scores_and_backward": max(0, real.peak - real.saved - int(fit.workspace(real.M)))},
        "answers": answers,
        "peak": sum(resident.values()) + most,
        "predicted_peak": sum(resident.values()) + int(fit.peak(real.N, real.M)),
        "available": available,
        "in_use_elsewhere": int(limit - left),
        "headroom": int(left) - sum(resident.values()) - most,
        "seconds_a_step": seconds,
        "steps": plan.steps,
        "seconds_in_all": None if seconds is None else seconds * plan.steps,
        "proposal": propose(fits, sum(resident.values()), left, largest_micro_batch(learner, plan.groups)),
        "rollout_rows": answers and most_rows(learner, plan, left - sum(resident.values())),
        "fit": {"checkpointing" if on else "plain": asdict(fits[on]) for on in fits},
    }


def fits_of(learner: Learner, plan: Plan, choices: Sequence[bool]) -> dict[bool, MemoryFit]:
    """The fit without and with checkpointing, where it can be measured; RunError where none can."""
    fits: dict[bool, MemoryFit] = {}
    for on in choices:
        try:
            fits[on] = measure(learner, plan.groups, on)
        except RunError:
            if on == choices[-1] and not fits:
                raise
    return fits


def answering(learner: Learner, plan: Plan) -> dict[str, int] | None:
    """Rows, tokens of the longest, and a bound of the bytes of decoding a rollout; None for a run without."""
    if not plan.problems:
        return None
    rows, tokens = plan.rollouts.rows, max(len(example.ids) for example in plan.sized)
    return {"rows": rows, "tokens": tokens, "bytes": Bound(learner.adapter_model)(rows, tokens)}


def most_rows(learner: Learner, plan: Plan, room: float) -> int:
    """The most rows of a rollout, up to its own, that can be decoded within `room` bytes; 0 for none."""
    bound, tokens = Bound(learner.adapter_model), max(len(example.ids) for example in plan.sized)
    fitting = bound.rows(tokens, int(room))
    return min(plan.rollouts.rows, fitting) if bound(fitting, tokens) <= room else 0


def propose(
    fits: dict[bool, MemoryFit], resident: int, limit: float, choices: MicroBatches
) -> dict[str, Any] | None:
    """The fastest setting that keeps the longest micro-batch within `limit` bytes; None if there is none.

    First choice: no checkpointing, if that leaves room for four rows. Otherwise checkpointing with as many
    rows as fit, and a smaller loss chunk only if not even one group would fit. `fits` may contain only one
    of the two.
    """
    enough = min(ENOUGH_ROWS, choices.sizes[-1])
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
        best = choices.within(limit - resident, fit)
        if best >= least:
            return {
                "train.micro_batch_size": best,
                "train.gradient_checkpointing": checkpointing,
                "train.loss_chunk_mb": None if chunk is None else max(1, chunk // MIB),
                "predicted_peak": int(resident + choices.peak(best, fit)),
            }
    return None


def _positions_per_step(learner: Learner, plan: Plan, steps: int = 4) -> float:
    """Tokens and padding of an average step, from the first few steps."""
    settings = plan.recipe.train
    source = FixedGroups(plan.groups, settings.batch_size, settings.seed)
    total = 0
    for step in range(steps):
        mine = source.groups(step)[:: learner.ranks.world]
        batches = learner.arrange(mine, learner.layout.micro_batch_size, learner.pad_id)
        total += sum(batch.positions for batch in batches)
    return total / steps


def read_size(text: str) -> int:
    """`16GB`, `24 GiB` or `8000MB` in bytes; GB means GiB, as GPU vendors use it.

    Raises RequestError for anything else.
    """
    units = {"MB": 2**20, "MIB": 2**20, "GB": 2**30, "GIB": 2**30}
    read = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(MI?B|GI?B)\s*", text.upper())
    size = int(float(read[1]) * units[read[2]]) if read else 0
    if size <= 0:
        raise RequestError(f"--gpu-memory {text!r}: give a size above zero, such as 16GB or 8000MB")
    return size


def preflight_table(found: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    lines = [f"{name.replace('_', ' '):24} {size / MIB:10,.0f} MB" for name, size in found["bytes"].items()]
    if answers := found["answers"]:
        what = f"{answers['rows']} answers of {answers['tokens']} tokens"
        lines.append(f"{'decoding, at most':24} {answers['bytes'] / MIB:10,.0f} MB   ({what})")
    of = f"{found['available'] / MIB:,.0f} MB"
    if elsewhere := found["in_use_elsewhere"]:
        of += f", {elsewhere / MIB:,.0f} MB of it already in use"
    lines += [
        f"{'peak':24} {found['peak'] / MIB:10,.0f} MB   (fit: {found['predicted_peak'] / MIB:,.0f} MB)",
        f"{'headroom':24} {found['headroom'] / MIB:10,.0f} MB   of {of}",
    ]
    if found["seconds_a_step"] is not None:
        lines += [
            f"{'per step':24} {found['seconds_a_step']:10.1f} s{'   (without sampling)' if answers else ''}",
            f"{'whole run':24} {found['seconds_in_all'] / 3600:10.2f} h   ({found['steps']} steps)",
        ]
    lines += [
        f"{found['counted']} on {found['device']}, {found['dtype']}, longest micro-batch "
        f"{' x '.join(map(str, found['longest_micro_batch']))}",
    ]
    if found["ran_out_of_memory"]:
        which = "with" if found["gradient_checkpointing"] else "without"
        lines.append(
            f"the recipe as it is runs out of memory; the peak is {found['peak_is']}, {which} checkpointing"
        )
    proposal = found["proposal"]
    if proposal is None:
        return "\n".join([*lines, "nothing fits; use a shorter data.max_length or a smaller model"])
    rows = found["rollout_rows"]
    if rows == 0:
        return "\n".join([*lines, "not even one answer fits; use a shorter rollouts.max_new_tokens"])
    changes = [f"--set {k}={v}" for k, v in proposal.items() if k.startswith("train.") and v is not None]
    if rows is not None and rows < found["answers"]["rows"]:
        changes.append(f"--set rollouts.rows={rows}")
    peak = f"{proposal['predicted_peak'] / MIB:,.0f} MB"
    return "\n".join([*lines, f"fits: {' '.join(changes).lower()}   ({peak})"])
