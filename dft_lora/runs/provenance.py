"""The birth certificate of a number: versions, commit, device, date, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("dft-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "math-verify")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, None where a package is missing; read from metadata, nothing is imported."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit this package runs from, with `-dirty` for uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """How this program was called: `python -m MODULE ...`, or the name of a script and its arguments."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    called = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*called, *sys.argv[1:]])


def certificate(**more: Any) -> dict[str, Any]:
    """What every recorded result carries; `more` adds device, seed and the like.

    `omp_num_threads` is the variable, None where it is not set: how sums are split decides their last bits.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "platform": platform.platform(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(),
        **more,
    }
