"""Which weights these are: the fingerprint of a base model, on disk or on the Hub."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from ..config import ModelConfig
from ..errors import ModelError
from . import gguf
from .load import load_model_config, resolve

BLOCK, BLOCKS = 2**16, 64


def base_fingerprint(config: ModelConfig) -> str:
    """Which weights these are: the Hub's commit, a GGUF file's sha256, or a hash of a folder's files.

    Of each weight file the size and 64 blocks of 64 KB spread evenly over it are hashed (all of a small one):
    another training run changes every block, and a 16 GB base takes no longer than a small one.
    """
    local = local_fingerprint(config)
    if local is not None:
        return local
    return getattr(load_model_config(config), "_commit_hash", None) or f"{config.name}@{config.revision}"


def local_fingerprint(config: ModelConfig) -> str | None:
    """The same without the Hub: None for a base that is not a folder on this machine."""
    try:
        folder = Path(resolve(config))
    except ModelError:
        return None
    if not folder.is_dir():
        return None
    if (origin := gguf.facts(folder)) is not None:
        return origin["sha256"]
    files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return _hash(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(64)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of (file, size, time of its last change): a file is read again once one of them differs."""
    sha = hashlib.sha256()
    for file, size, _ in files:
        sha.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                content.seek(start)
                sha.update(content.read(BLOCK))
    return sha.hexdigest()
