"""Padding waste and tokens per second of rows padded in order, rows of similar length, and packed rows.

Backbone and loss, forward and backward, of the training bench's random Qwen2 over GSM8K; the waste is counted
over whole epochs' worth of steps, which needs no model.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.batches import Batch, Group, collate, examples_of, micro_batches, step_indices, ungrouped
from ..data.packing import Arrange, CheapestPacking, Packed
from ..model.accelerator import accelerator
from ..model.attention import crossover_length
from ..model.hardware import choose
from ..runs.provenance import certificate
from ..training.metrics import Sums
from ..training.plan import make_plan
from ..training.ranks import Ranks
from ..training.trainer import Trainer
from .train import Measurement, Shape, write_inputs


def in_order(groups: Sequence[Group], size: int, pad_id: int) -> list[Batch]:
    """What a plain data loader does."""
    examples = examples_of(groups)
    return [collate(examples[i : i + size], pad_id) for i in range(0, len(examples), size)]


def arrangements(capacity: int, even: float) -> dict[str, Arrange]:
    return {
        "padded, in order": in_order,
        "padded, rows of similar length": micro_batches,
        "packed where it costs less (auto)": CheapestPacking(even),
        "packed, block mask": Packed(capacity),
        "packed, one row (variable-length attention)": Packed(capacity, flat=True),
    }


def measure(capacity: int, batch_size: int, size: int, examples: int, threads: int) -> dict[str, Any]:
    """Waste over the steps of an epoch; CPU seconds of one step of `examples` for each arrangement."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_inputs(Path(folder), Measurement(Shape(batch=batch_size, max_length=capacity)))
        recipe = recipe.override(["data.sample=null", f"train.micro_batch_size={size}"])
        plan = make_plan(recipe)
        trainer = Trainer(plan, Ranks(recipe))
    pad, count = plan.renderer.pad_id, len(plan.examples)
    rows: dict[str, dict[str, Any]] = {}
    ways = arrangements(capacity, crossover_length(trainer.learner.model))
    for name, arrange in ways.items():
        tokens = positions = 0
        for step in range(count // batch_size):
            chosen = [plan.examples[i] for i in step_indices(count, batch_size, 0, step)]
            for batch in arrange(ungrouped(chosen), size, pad):
                tokens, positions = tokens + batch.tokens, positions + batch.positions
        rows[name] = {"waste": 1 - tokens / positions}
    chosen = [plan.examples[i] for i in step_indices(count, examples, 0, 0)]
    for name, arrange in ways.items():
        batches = arrange(ungrouped(chosen), size, pad)
        _pass(trainer, min(batches, key=lambda batch: batch.positions))  # pays for what is set up once
        clock = time.process_time if trainer.ranks.device.type == "cpu" else time.perf_counter
        started = clock()
        for batch in batches:
            _pass(trainer, batch)
        spent = clock() - started
        rows[name] |= {"seconds": spent, "tokens_per_second": sum(batch.tokens for batch in batches) / spent}
        print(f"{name:45} {rows[name]}", file=sys.stderr, flush=True)
    return {
        "kind": "packing",
        "data": Path(recipe.data.source).name,
        "examples": count,
        "capacity": capacity,
        "batch_size": batch_size,
        "micro_batch_size": size,
        "timed_examples": examples,
        "device": choose().name,
        "threads": threads,
        "clock": "process CPU time" if trainer.ranks.device.type == "cpu" else "wall time",
        "arrangements": rows,
        "provenance": certificate(),
    }


def _pass(trainer: Trainer, batch: Batch) -> None:
    loss = trainer.learner.score(batch, Sums(trainer.ranks.device))
    loss.backward()
    accelerator(trainer.ranks.device).synchronize()
