"""The fingerprint of a base model, on disk or on the Hub: which weights it has."""

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
    """Identifies the weights: the Hub's commit, a GGUF file's sha256, or a hash of a folder's files.

    For each weight file, the hash covers its size and 64 evenly spread blocks of 64 KB (all of a small file).
    Further training changes every block, and a 16 GB base takes no longer than a small one.
    """
    local = local_fingerprint(config)
    if local is not None:
        return local
    return getattr(load_model_config(config), "_commit_hash", None) or f"{config.name}@{config.revision}"


def local_fingerprint(config: ModelConfig) -> str | None:
    """The same without asking the Hub: None for a base that is not on this machine."""
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
    """Hash of (file, size, modification time) entries; a file is read again if one of them changes."""
    sha = hashlib.sha256()
    for file, size, _ in files:
        sha.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                content.seek(start)
                sha.update(content.read(BLOCK))
    return sha.hexdigest()
