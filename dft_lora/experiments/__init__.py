"""Whole experiments, from training to verdicts: `dft-lora experiment NAME`. A stopped one continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

CONTINUES = "run the same command again to continue"

NAMES = ("findings",)
"""Modules of this package with `run(out, seeds, only)`, which yields the lines that a person reads."""


def run_experiment(name: str, out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Run one of NAMES below `out`, or `only` the named parts of it; what is already there is used again."""
    return import_module(f".{name}", __name__).run(out, seeds, only)
