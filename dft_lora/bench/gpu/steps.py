"""Training steps in nf4: speed beside TRL, the memory ladder, memory predicted and real, retreat, unsloth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from ...config import load_recipe
from ...errors import MissingPart
from ...model.accelerator import accelerator
from ...model.head import bare
from ...model.memory import MIB
from ...training.learner import Learner
from ...training.loop import train
from ...training.plan import Plan
from ...training.preflight import measured
from ...training.probe import (
    MOST_ROWS,
    auto_micro_batch,
    longest_batch,
    probe,
    resident_bytes,
    usable_bytes,
)
from ...training.ranks import Ranks
from ...training.trace import traced
from ...training.trainer import Trainer
from ..train import COMPARISON, LADDER, StepVariant, Watch
from .lab import Lab, Result, attempt, give_back

ROWS = 4
STEPS = 2
"""Measured; one more is thrown away."""
CLOSE = 0.1
"""Share by which a prediction of memory may be wrong."""


def speed(lab: Lab, size: str) -> Iterator[tuple[str, Result]]:
    """Tokens per second and peak memory of a step of four rows, beside TRL's."""
    plan = lab.plan(size, ROWS)
    for variant in COMPARISON:
        yield variant.name, attempt(lambda variant=variant: timed(variant, plan))


def ladder(lab: Lab) -> Iterator[tuple[str, Result]]:
    """Our techniques, each on top of the one before."""
    plan = lab.plan("0.5B", ROWS, "train.gradient_checkpointing=false")
    for variant in LADDER:
        yield variant.name, attempt(lambda variant=variant: timed(variant, plan))


def timed(variant: StepVariant, plan: Plan) -> Result:
    if variant.missing:
        raise MissingPart(variant.missing)
    plan = replace(plan, recipe=plan.recipe.override(list(variant.changes)))
    watch = Watch()
    loss = variant.run(plan, STEPS + 1, watch)
    figures = watch.figures()
    seconds = statistics.median(figures["seconds"])
    return {
        "seconds": seconds,
        "tokens_per_second": sum(len(example.ids) for example in plan.examples) / seconds,
        "peak_mb": figures["loaded_mb"] + figures["above_loaded_mb"],
        "first_loss": loss,
    }


def memory(lab: Lab, size: str) -> Iterator[tuple[str, Result]]:
    """What the trace and preflight's fit predict of a step's peak, and what it is."""
    plan = lab.plan(size, ROWS)
    with traced(plan.recipe, plan.objective, plan.renderer.pad_id) as shapes:
        predicted = settled_peak(shapes, plan)
    learner = _learner(plan)
    fit = measured(learner, plan, None)["predicted_peak"]
    real = settled_peak(learner, plan)
    if lab.device.type == "cuda":
        learner.update(0.0)
        torch.cuda.reset_peak_memory_stats(lab.device)
        learner.accumulate(plan.groups, learner.divisor(plan.groups), 1)
        learner.update(0.0)
        real = torch.cuda.max_memory_allocated(lab.device)
    for name, found in (("trace", predicted), ("preflight's fit", fit)):
        close = abs(found / real - 1) <= CLOSE
        yield name, {"predicted_mb": found / MIB, "peak_mb": real / MIB, "within_10_percent": close}


def _learner(plan: Plan) -> Learner:
    return Learner(plan.recipe, plan.objective, plan.renderer.pad_id, Ranks(plan.recipe))


def settled_peak(learner: Learner, plan: Plan) -> int:
    """Bytes at most in a step after the first one, which makes gradients and optimizer states."""
    worst = longest_batch(learner, plan.groups, learner.layout.micro_batch_size)
    probe(learner, worst, gauged=False)
    learner.update(0.0)
    probe(learner, worst, gauged=False)
    return sum(resident_bytes(learner).values()) + probe(learner, worst).peak


def auto(lab: Lab, size: str) -> Iterator[tuple[str, Result]]:
    """The rows that `micro_batch_size: auto` finds, and the peak with them."""
    plan = lab.plan(size, MOST_ROWS, "train.micro_batch_size=auto")
    learner = _learner(plan)
    rows = auto_micro_batch(learner, plan.groups)
    learner.layout = replace(learner.layout, micro_batch_size=rows)
    limit = usable_bytes(accelerator(lab.device).total_memory, lab.device, None)
    yield "auto", {"rows": rows, "limit_mb": limit / MIB}  # before the pass that may run out of memory
    peak = settled_peak(learner, plan)
    yield "auto", {"rows": rows, "limit_mb": limit / MIB, "peak_mb": peak / MIB, "fits": peak <= limit}


def retreat(lab: Lab) -> Iterator[tuple[str, Result]]:
    """A step that runs out of memory is repeated in smaller pieces, with the same loss."""
    plan = lab.plan("0.5B", 2 * ROWS, "data.packing=false")
    calm = Trainer(plan, Ranks(plan.recipe))
    expected = calm.step(0)["loss"]
    worst = longest_batch(calm.learner, plan.groups, 2 * ROWS)
    work = probe(calm.learner, worst).peak
    resident = sum(resident_bytes(calm.learner).values())
    del calm
    give_back()
    trainer = Trainer(plan, Ranks(plan.recipe))
    with _tight(lab, trainer, resident + work // 2):
        loss = trainer.step(0)["loss"]
    differs = abs(loss - expected) / expected
    yield (
        "step",
        {
            "retreats": len(trainer.learner.retreats),
            "rows": trainer.learner.layout.micro_batch_size,
            "loss_differs": differs,
            "recovered": bool(trainer.learner.retreats) and differs < 1e-2,
        },
    )


@contextmanager
def _tight(lab: Lab, trainer: Trainer, limit: int) -> Iterator[None]:
    """Only `limit` bytes of the GPU; on a CPU a stand-in: passes of more than two rows raise the error."""
    if lab.device.type == "cuda":
        whole = torch.cuda.get_device_properties(lab.device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / whole, lab.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, lab.device)
        return

    def refuse(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        if len(keywords["input_ids"]) > ROWS // 2:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")

    hook = bare(trainer.learner.model).register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def varlen(lab: Lab) -> Iterator[tuple[str, Result]]:
    """Rows packed for variable-length attention, and the same rows padded."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise MissingPart("flash-attn is not installed")
    for name, packing in (("padded", "false"), ("packed", "true")):
        plan = lab.plan("0.5B", ROWS, f"data.packing={packing}")
        yield name, attempt(lambda plan=plan: timed(COMPARISON[0], plan))


def unsloth(lab: Lab) -> Iterator[tuple[str, Result]]:
    """Three steps on the embedded base with the backend `unsloth`."""
    if find_spec("unsloth") is None:
        raise MissingPart("unsloth is not installed")
    changes = ["model.backend=unsloth", "train.max_steps=3", f"output={lab.folder / 'unsloth'}"]
    run = train(load_recipe("tiny_dft", changes))
    yield "three steps", {"loss": run.metrics()[-1]["loss"], "peak_mb": run.metrics()[-1]["peak_memory_mb"]}
