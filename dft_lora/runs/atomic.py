"""Atomic folders: complete and verified, or not there at all.

An atomic folder is written beside its final place, flushed to disk, verified by reading it back, and renamed.
Its `manifest.json` holds the size and the sha256 of every file. A crash at any moment leaves the old folder
or the new one, and perhaps a hidden leftover that nothing reads and the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import digest

MANIFEST = "manifest.json"


def write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write `files`, (relative name, content) pairs that are consumed one at a time, as the folder `path`.

    An existing folder is replaced. Raises OSError when the disk is full or broken; the old folder then stays
    unchanged.
    """
    aside, old = _hidden(path, "new"), _hidden(path, "old")
    for leftover in (aside, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        listed = {}
        for name, content in files:
            _write(aside / name, content)
            listed[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"files": listed, "sha256": digest(listed)}
        _write(aside / MANIFEST, json.dumps(manifest, indent=1).encode())
        for folder in {aside, *((aside / name).parent for name in listed)}:
            _flush(folder)
        if why := damage(aside):
            raise OSError(f"{path} differs from what was written when it is read back: {why}")
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(aside, path)
    _flush(path.parent)
    if old.exists():
        shutil.rmtree(old)


def damage(path: Path, required: Collection[str] = ()) -> str | None:
    """What is wrong with an atomic folder, as text; None when every file is as it was written.

    `required` names files that must be in the manifest.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files: dict[str, Any] = manifest["files"]
        if manifest["sha256"] != digest(files):
            return f"{MANIFEST} is damaged"
        if missing := sorted(set(required) - set(files)):
            return f"{', '.join(missing)} is not in its {MANIFEST}"
        for name, expected in files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{MANIFEST} names a file outside the folder"
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {expected['size']:,}"
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} is damaged (its checksum differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def discard(path: Path) -> None:
    """Remove an atomic folder. A kill in between leaves a hidden leftover, not an incomplete folder."""
    old = _hidden(path, "old")
    os.rename(path, old)
    shutil.rmtree(old)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _flush(folder: Path) -> None:
    """Flush a folder's entries to disk. Some network and Windows file systems cannot; this is ignored."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
