"""The hash of a set of files, kept until one of them changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

BLOCK, BLOCKS = 2**16, 64


def files_hash(files: Iterable[Path], sampled: bool = False) -> str:
    """sha256 over the name, size and content of each file, in the given order.

    `sampled`: of a file above 4 MB, only 64 evenly spread blocks of 64 KB are read. A file is read again when
    its size or modification time has changed. Raises OSError when a file is missing.
    """
    found = [(file, file.stat()) for file in files]
    return _hash(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found), sampled)


@lru_cache(256)
def _hash(files: tuple[tuple[Path, int, int], ...], sampled: bool) -> str:
    """Of (file, size, modification time) entries."""
    sha = hashlib.sha256()
    for file, size, _ in files:
        sha.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(BLOCK, size // BLOCKS) if sampled else BLOCK):
                content.seek(start)
                sha.update(content.read(BLOCK))
    return sha.hexdigest()
