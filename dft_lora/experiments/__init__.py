"""Whole experiments, from training to verdicts: `dft-lora experiment NAME`. Run it again to resume it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

CONTINUES = "run the same command again to continue"

NAMES = ("findings", "real", "rl", "tasks", "lab")
"""Modules of this package with a function `run(out, seeds, only)` that yields lines for the terminal."""


def run_experiment(name: str, out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Run the experiment `name`, or `only` the named parts of it. Finished work in `out` is reused."""
    return import_module(f".{name}", __name__).run(out, seeds, only)
