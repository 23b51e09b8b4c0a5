"""Whole experiments, from training to verdicts: `dft-lora experiment NAME`. A stopped one continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

NAMES = ("findings",)
"""Modules of this package with `run(out, seeds)`, which yields the lines that a person reads at the end."""


def run_experiment(name: str, out: Path, seeds: Sequence[int]) -> Iterator[str]:
    """Run one of NAMES below `out`; what is already there is used again."""
    return import_module(f".{name}", __name__).run(out, seeds)
