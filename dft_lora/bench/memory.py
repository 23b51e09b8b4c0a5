"""Peak memory of training steps, traced on shapes alone: no GPU, no weights.

`measure_recipes` takes the shipped recipes: each step has rows of about the longest length, the worst
case of a run; several rows are padded. `measure_longest` asks how long a single row may be.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import Recipe, load_recipe
from ..data.batches import ungrouped
from ..data.templates import Example
from ..loss import objective
from ..model.head import bare
from ..runs.provenance import certificate
from ..training.learner import Learner
from ..training.probe import MOST_ROWS, longest_batch, measure, probe, resident_bytes, usable_bytes
from ..training.trace import traced

GB = 2**30
PROMPT = 64
"""Tokens of a row that are not supervised."""
GATHERED = 3
"""Layers that FSDP holds whole at a time, at most: the current one, the next one, and a buffer."""


def shape(
    family: str, D: int, intermediate: int, heads: int, kv_heads: int, layers: int, V: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": D,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": V,
        "tie_word_embeddings": tied,
    }


_QWEN_1_5B = shape("qwen2", 1536, 8960, 12, 2, 28, 151_936, True)
SHAPES = {
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1_5B,
    "Qwen/Qwen2.5-Math-7B": shape("qwen2", 3584, 18_944, 28, 4, 28, 152_064, False),
    "Qwen/Qwen2.5-32B": shape("qwen2", 5120, 27_648, 40, 8, 64, 152_064, False),
    "meta-llama/Llama-3.2-3B": shape("llama", 3072, 8192, 24, 8, 28, 128_256, True),
    "meta-llama/Llama-3.1-8B": shape("llama", 4096, 14_336, 32, 8, 32, 128_256, False),
    "deepseek-ai/deepseek-math-7b-base": shape("llama", 4096, 11_008, 32, 32, 30, 102_400, False),
}
"""What `config.json` states of the models that shipped recipes name by Hub id."""

GPUS = {
    "lora_dft": (8,),
    "qwen2.5-math-1.5b_dft": (12,),
    "t4_dft": (15,),  # what a T4 reports of its 16
    "llama-3.2-3b_dft": (16,),
    "24gb_dft": (16, 24),
    "qwen2.5-math-7b_dft": (24,),
    "deepseek-math-7b_dft": (24,),
    "llama-3.1-8b_dft": (24,),
    "2x24gb_dft": (24,),
}
"""Recipes, and GB of the GPUs that they are traced for. Twins (`_sft`, `_power`) take the same memory."""
PROCESSES = {"2x24gb_dft": 2}


def measure_recipes(names: Sequence[str]) -> dict[str, Any]:
    """The named recipes as a JSON value with its provenance; sizes in bytes."""
    found = {}
    for name in names:
        recipe = load_recipe(name, ["model.dtype=float16"] if name.startswith("t4") else [])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[recipe.model.name]))
            found[name] = _trace(recipe, folder, GPUS[name], PROCESSES.get(name, 1))
        print(name, f"{found[name]['one_row'] / GB:.1f} GB", file=sys.stderr, flush=True)
    return {"kind": "memory", "recipes": found, "provenance": certificate()}


def _trace(recipe: Recipe, folder: str, gpus: Sequence[int], processes: int) -> dict[str, Any]:
    L, batch_size = recipe.data.max_length, recipe.train.batch_size
    lengths = [L - i % 8 for i in range(min(MOST_ROWS, batch_size))]
    groups = ungrouped(Example(str(i), tuple(range(length)), PROMPT) for i, length in enumerate(lengths))
    shown = {
        "model": recipe.model.name,
        "max_length": L,
        "r": recipe.adapter.r,
        "optimizer": recipe.train.optimizer,
        "processes": processes,
    }
    with _learner(recipe, folder) as learner:
        fit = measure(learner, groups, learner.checkpointing)
        row = longest_batch(learner, groups, 1)

        def peak(rows: int) -> int:
            return resident + probe(learner, longest_batch(learner, groups, rows)).peak

        learner.update(0.0)  # makes the optimizer's states
        parts = resident_bytes(learner)
        if processes > 1:
            parts["weights"] -= saved_by_sharding(learner, processes)
        resident = sum(parts.values())
        probe(learner, row, gauged=False)  # makes the gradients, which count as resident
        on_gpu = []
        for gb in gpus:
            limit = usable_bytes(gb * GB, learner.ranks.device, gb * GB)
            sizes = range(1, len(groups) + 1)
            fitting = [
                m for m in sizes if resident + fit.peak(m * row.positions, m * row.supervised) <= limit
            ]
            rows = max(fitting, default=0)
            on_gpu.append({"gb": gb, "rows": rows, "peak": peak(rows) if rows else None})
        return shown | {
            "dtype": str(learner.hardware.dtype).removeprefix("torch."),
            "checkpointing": learner.checkpointing,
            "bytes": parts,
            "one_row": peak(1),
            "gpus": on_gpu,
        }


LENGTHS = (4096, 8192)
MOST_TOKENS = 65536
"""The longest row that is tried: a tiled MLP takes minutes to trace at more."""
LONGEST_GPUS = (8, 12, 16, 24)
LONG_MODELS = (
    "Qwen/Qwen2.5-Math-1.5B",
    "meta-llama/Llama-3.2-3B",
    "Qwen/Qwen2.5-Math-7B",
    "meta-llama/Llama-3.1-8B",
)
LONG_OPTIONS = {
    "checkpointing": (),
    "+ offloaded inputs": ("train.offload_activations=true",),
    "+ tiled MLP": ("train.offload_activations=true", "train.mlp_tile=2048"),
}


def measure_longest(
    models: Sequence[str] = LONG_MODELS, gpus: Sequence[int] = LONGEST_GPUS
) -> Iterator[dict[str, Any]]:
    """Peaks of a step with one row of LENGTHS tokens, and the longest row that fits each GPU, in bytes.

    Yields the result so far after each model and technique, since all of them take half an hour.
    """
    found: list[dict[str, Any]] = []
    for model in models:
        for option, changes in LONG_OPTIONS.items():
            recipe = load_recipe("lora_dft", ["train.gradient_checkpointing=true", *changes])
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(SHAPES[model]))
                with _learner(recipe, folder) as learner:
                    rows = _longest_rows(learner, gpus)
            found.append({"model": model, "option": option, **rows})
            print(model, option, rows["longest"], file=sys.stderr, flush=True)
            yield {
                "kind": "longest",
                "lengths": LENGTHS,
                "most": MOST_TOKENS,
                "rows": found,
                "provenance": certificate(),
            }


def _longest_rows(learner: Learner, gpus: Sequence[int]) -> dict[str, Any]:
    def peak(tokens: int) -> int:
        row = [(Example("0", tuple(range(tokens)), PROMPT),)]
        return resident + probe(learner, longest_batch(learner, row, 1)).peak

    resident = 0
    peak(PROMPT * 2)
    learner.update(0.0)  # makes the optimizer's states
    peak(PROMPT * 2)  # makes the gradients, which count as resident
    resident = sum(resident_bytes(learner).values())
    peaks = {0: resident} | {tokens: peak(tokens) for tokens in LENGTHS}
    longest = {}
    for gb in gpus:
        limit = usable_bytes(gb * GB, learner.ranks.device, gb * GB)
        longest[gb] = longest_below(limit, peak, peaks) if resident <= limit else 0
    measured = {tokens: peaks[tokens] for tokens in LENGTHS}
    return {"peaks": measured, "longest": longest, "weights": resident_bytes(learner)["weights"]}


def longest_below(
    limit: int, peak: Callable[[int], int], peaks: dict[int, int], grain: int = 512, most: int = MOST_TOKENS
) -> int:
    """The largest multiple of `grain` up to `most` whose peak, which grows with it, does not exceed `limit`.

    `peaks` has 0 and two more lengths at least; each length that is tried joins it.
    """
    while True:
        low = max(tokens for tokens, size in peaks.items() if size <= limit)
        above = [tokens for tokens, size in peaks.items() if size > limit]
        if low >= most or (above and min(above) - low <= grain):
            return min(low, most)
        # Between the two, or beyond the two longest: where a line through them reaches the limit.
        short, long = (low, min(above)) if above else sorted(peaks)[-2:]
        slope = (peaks[long] - peaks[short]) / (long - short)
        tokens = int(short + (limit - peaks[short]) / slope) // grain * grain
        tokens = max(low + grain, min(tokens, min(above) - grain if above else most))
        peaks[tokens] = peak(tokens)


@contextmanager
def _learner(recipe: Recipe, folder: str) -> Iterator[Learner]:
    there = recipe.override([f"model.name={folder}"])
    with traced(there, objective(recipe.objective.name, **recipe.objective.numbers), 0) as learner:
        yield learner


def saved_by_sharding(learner: Learner, processes: int) -> int:
    """Bytes of frozen weights that a process need not hold with `train.shard` (`sharding.py`), computed.

    Packed weights of decoder layers are shared out; quantization scales, embeddings and head are not.
    """
    core = bare(learner.model)
    layers = [m for m in core.modules() if type(m).__name__ in set(core._no_split_modules)]
    sizes = [sum(p.nbytes for p in layer.parameters() if not p.requires_grad) for layer in layers]
    return sum(sizes) - sum(sizes) // processes - GATHERED * max(sizes)
