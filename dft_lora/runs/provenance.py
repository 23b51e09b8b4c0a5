"""The provenance of a result: versions, commit, device, date, command."""

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
    """Installed versions, None for a missing package; read from metadata without importing anything."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if something is uncommitted; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this program: `python -m MODULE ...`, or a script's name and its arguments."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    called = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*called, *sys.argv[1:]])


def certificate(**more: Any) -> dict[str, Any]:
    """The provenance that is recorded with every result; `more` adds device, seed and the like.

    `omp_num_threads` is the environment variable, None if unset: it determines how sums are split, and with
    that their last bits.
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
