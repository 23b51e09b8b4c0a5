"""What the stages share: bases of random weights, invented text, and how time and memory are taken."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import parse_recipe
from ...data.templates import Example, Renderer
from ...errors import MissingPart
from ...loss import objective
from ...model.hardware import choose, dtype_name
from ...model.load import load_tokenizer
from ...model.memory import DeviceMemory, LiveTensors, Memory
from ...model.random_base import write_random_base
from ...training.faults import is_out_of_memory
from ...training.plan import Plan
from ..memory import SHAPES, shape

GB = 2**30
SMALL_BASE = shape("qwen2", 64, 128, 4, 2, 2, 2048, True)
BASES = {
    "0.5B": shape("qwen2", 896, 4864, 14, 2, 24, 151_936, True),
    "1.5B": SHAPES["Qwen/Qwen2.5-Math-1.5B"],
    "7B": SHAPES["Qwen/Qwen2.5-Math-7B"],
}
NEEDED_GB = {"0.5B": 4, "1.5B": 7, "7B": 14}
"""Memory of a GPU on which four rows of 2,048 tokens are trained (docs/scaling.md), one GB spared."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """A folder to work in, the device, and whether sizes are those of the rehearsal."""

    folder: Path
    device: torch.device
    small: bool

    @property
    def dtype(self) -> torch.dtype:
        """What a large model computes in here."""
        return choose(parameters=10**10, device=self.device).dtype

    @property
    def length(self) -> int:
        return 64 if self.small else 2048

    def base(self, size: str) -> Path:
        """A base of random weights. Raises MissingPart where the GPU is too small for it."""
        folder = self.folder / f"base-{size}"
        if self.device.type == "cuda":
            gb = torch.cuda.get_device_properties(self.device).total_memory / GB
            if gb < NEEDED_GB[size]:
                raise MissingPart(f"needs a GPU of {NEEDED_GB[size]} GB; this one has {gb:.0f}")
        if not folder.is_dir():
            write_random_base(folder, SMALL_BASE if self.small else BASES[size])
        return folder

    def plan(self, size: str, count: int, *changes: str) -> Plan:
        """Steps over `count` examples of invented text, each about as long as the longest allowed.

        Nf4, LoRA of rank 8, gradient checkpointing; `changes` as for --set.
        """
        recipe = parse_recipe(
            {
                "name": "gpu",
                "model": {"name": str(self.base(size)), "dtype": dtype_name(self.dtype)},
                "data": {"source": "word-problems", "template": "plain", "max_length": self.length},
                "train": {
                    "batch_size": count,
                    "micro_batch_size": count,
                    "max_steps": 8,
                    "gradient_checkpointing": True,
                },
                "output": str(self.folder / "run"),
            }
        ).override(list(changes))
        vocabulary = (SMALL_BASE if self.small else BASES[size])["vocab_size"]
        renderer = Renderer(load_tokenizer(recipe.model), "plain")
        chosen = objective(recipe.objective.name, **recipe.objective.numbers)
        examples = invented(count, self.length, vocabulary)
        return Plan(recipe, renderer, chosen, examples, {}, [], steps=8)

    def gauge(self) -> AbstractContextManager[Memory]:
        """CUDA's own count of its tensors; on a CPU the live tensors."""
        return nullcontext(DeviceMemory(self.device)) if self.device.type == "cuda" else LiveTensors()


def invented(count: int, length: int, vocabulary: int) -> list[Example]:
    """Rows of random ids, of almost `length` tokens, the first eighth of each a prompt."""
    draw = random.Random(0)
    rows = (range(length - i % 8) for i in range(count))
    return [
        Example(str(i), tuple(draw.randrange(vocabulary) for _ in row), length // 8)
        for i, row in enumerate(rows)
    ]


def attempt(work: Callable[[], Result]) -> Result:
    """The result of `work`, or why there is none, in one line; its memory is given back."""
    try:
        return work()
    except Exception as error:
        return {"missing": str(error)} if isinstance(error, MissingPart) else {"error": one_line(error)}
    finally:
        give_back()


def one_line(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


def give_back() -> None:
    """Return what is free to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
