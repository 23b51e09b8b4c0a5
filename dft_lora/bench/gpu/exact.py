"""The same numbers as on the CPU: three steps in float16 and bfloat16; and bit-exact kill and resume."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ...config import load_recipe
from ...runs.folder import RunFolder
from ...training.loop import train
from .lab import Lab, Result

STEPS = 3
LOSS, NORM = 0.01, 0.05
"""Largest relative difference between a GPU's and a CPU's loss, and between their gradient norms."""
BEFORE, RUN = 3, 12
"""Checkpoints before the kill, and steps of the whole run."""
TRAIN = """import torch; torch.use_deterministic_algorithms(True, warn_only=True)
from torch.nn.attention import SDPBackend, sdpa_kernel
from dft_lora.cli import main
with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' backward adds in any order, with a warning only
    main()"""


def changes(folder: Path, steps: int, rows: int = 4, dtype: str = "auto") -> list[str]:
    return [
        f"train.max_steps={steps}",
        "train.save_steps=1",
        f"train.batch_size={rows}",
        "train.micro_batch_size=1",
        f"model.dtype={dtype}",
        f"output={folder}",
    ]


def command(*arguments: str) -> list[str]:
    """`dft-lora train tiny_dft` with deterministic kernels."""
    return [sys.executable, "-c", TRAIN, "train", "tiny_dft", *arguments]


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def same_as_cpu(lab: Lab, dtype: str) -> Iterator[tuple[str, Result]]:
    """Loss and gradient norm of three steps on the embedded base in nf4, here and on the CPU."""
    here, there = lab.folder / f"{dtype}-here", lab.folder / f"{dtype}-cpu"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    rows = 1 if lab.small else 4  # 16 bits are slow on a CPU
    asked = sets(changes(there, STEPS, rows, dtype))
    with subprocess.Popen(command(*asked), env=hidden, stdout=sys.stderr) as cpu:
        train(load_recipe("tiny_dft", changes(here, STEPS, rows, dtype)))
        if cpu.wait():
            raise RuntimeError("the run on the CPU failed")
    far = {key: _furthest(RunFolder(here), RunFolder(there), key) for key in ("loss", "grad_norm")}
    yield (
        "three steps",
        {
            "loss_differs": far["loss"],
            "grad_norm_differs": far["grad_norm"],
            "equal": far["loss"] <= LOSS and far["grad_norm"] <= NORM,
        },
    )


def _furthest(a: RunFolder, b: RunFolder, key: str) -> float:
    """The largest relative difference of a figure over the steps."""
    pairs = [(x[key], y[key]) for x, y in zip(a.metrics(), b.metrics(), strict=True)]
    if any(None in pair for pair in pairs):
        raise RuntimeError(f"loss scaling skipped a step: {key} here and on the CPU is {pairs}")
    return max(abs(x / y - 1) for x, y in pairs)


def kill_and_resume(lab: Lab) -> Iterator[tuple[str, Result]]:
    """A run that is killed and resumed ends with the adapter of one that was not, bit for bit."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    whole, killed = lab.folder / "whole", lab.folder / "killed"
    wanted = sets(changes(killed, RUN))
    with subprocess.Popen(command(*wanted), stdout=sys.stderr) as child:
        while child.poll() is None and not (killed / "checkpoints" / f"step-{BEFORE:06d}").is_dir():
            time.sleep(0.001)
        child.kill()
    at = len(RunFolder(killed).metrics())
    if at >= RUN:
        raise RuntimeError("the run ended before it could be killed")
    subprocess.run(command("--resume", *wanted), check=True, stdout=sys.stderr)
    subprocess.run(command(*sets(changes(whole, RUN))), check=True, stdout=sys.stderr)
    yield "adapter", {"killed_after": at, "steps": RUN, "bit_exact": _digest(whole) == _digest(killed)}


def _digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
