"""The cache folder for what was fetched or unpacked once: `DFT_LORA_CACHE` or `~/.cache/dft-lora`.

Each entry is an atomic folder (`runs/atomic.py`): complete or absent. Two processes that want the same entry
take turns; the second one finds it ready.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from ..errors import RequestError, RunError
from ..runs.atomic import MANIFEST, write_folder


def cache_folder() -> Path:
    return Path(os.environ.get("DFT_LORA_CACHE") or "~/.cache/dft-lora").expanduser()


def keep(entry: Path, files: Iterable[tuple[str, bytes]], room: int, purpose: str) -> Path:
    """The atomic folder `entry`, below the cache folder; created from `files` if it does not exist yet.

    `files` is consumed only then. `room`: bytes it will take. `purpose`: what is being done, for messages.
    Raises RequestError for a cache that cannot be written, RunError for a full disk.
    """
    from filelock import FileLock, Timeout

    if is_kept(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.with_name(f".{entry.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process: {purpose}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise RequestError(
            f"the cache {entry.parent} cannot be written ({error.strerror or error}); "
            "set DFT_LORA_CACHE to another folder"
        ) from None
    try:
        if not is_kept(entry):
            free = shutil.disk_usage(entry.parent).free
            if free < room:
                raise RunError(
                    f"{purpose}: {entry.parent} has {free / 1e6:,.0f} MB free and {room / 1e6:,.0f} are "
                    "needed; free some space, or set DFT_LORA_CACHE to another folder"
                )
            write_folder(entry, files)
    except OSError as error:
        raise RunError(
            f"{purpose}: {entry.parent} could not be written ({error.strerror or error}); "
            "free some space, or set DFT_LORA_CACHE to another folder"
        ) from None
    finally:
        lock.release()
    return entry


def is_kept(entry: Path) -> bool:
    return (entry / MANIFEST).is_file()
