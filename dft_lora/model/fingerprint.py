"""The fingerprint of a base model, on disk or on the Hub: which weights it has."""

from __future__ import annotations

from pathlib import Path

from ..config import ModelConfig
from ..errors import ModelError
from ..runs.files_hash import files_hash
from . import gguf
from .known import KNOWN
from .load import gguf_file, hub_commit, resolve


def base_fingerprint(config: ModelConfig) -> str:
    """Identifies the weights: the Hub's commit, a GGUF file's sha256, or a hash of a folder's files.

    For each weight file, the hash covers its size and 64 evenly spread blocks of 64 KB (all of a small file).
    Further training changes every block, and a 16 GB base takes no longer than a small one.
    """
    resolve(config)  # fetches a GGUF file that is not on this machine
    return local_fingerprint(config) or hub_commit(config) or config.name


def local_fingerprint(config: ModelConfig) -> str | None:
    """The same without asking the Hub: None for a base that is neither on this machine nor known by name."""
    if config.name in KNOWN:
        return KNOWN[config.name].sha256
    try:
        if (file := gguf_file(config, fetch=False)) is not None:
            return gguf.sha256(file)
        folder = Path(resolve(config))
    except ModelError:
        return None
    if not folder.is_dir():
        return None
    if (origin := gguf.facts(folder)) is not None:
        return origin["sha256"]
    files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return files_hash(files, sampled=True)
