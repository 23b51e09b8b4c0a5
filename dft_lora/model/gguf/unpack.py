"""A GGUF file unpacked once into a folder of 16-bit safetensors in the cache, named by the file's sha256."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ModelError
from ..cache_folder import cache_folder, is_kept, keep
from .file import GgufFile, gguf_package, read, weights
from .layouts import halves_from_pairs, layout_of, model_config, rope_heads, tensor_names
from .tokenizer import check_tokenizer, save_tokenizer

VERSION = 1
"""Of what `unpacked` writes: a change there must not read an older folder."""
FACTS = "gguf.json"
SHARD_BYTES = 2**30


def unpacked(path: Path) -> Path:
    """The folder of 16-bit weights, config and tokenizer that a GGUF file stands for, made at the first call.

    Raises ModelError for a file that cannot be read exactly, RunError when the disk is full.
    """
    folder = folder_of(sha256(path))
    if is_kept(folder):
        return folder
    file = read(path)
    config = model_config(file)
    check_tokenizer(file)
    room = sum(2 * int(np.prod(stored.shape)) for stored in file.tensors.values())
    return keep(folder, _files(file, config, folder.name), room, f"unpacking {path.name}")


def folder_of(sha: str) -> Path:
    """Where the file of this sha256 is, or will be, unpacked."""
    return cache_folder() / f"unpacked-{VERSION}" / sha


def facts(folder: str | Path) -> dict[str, Any] | None:
    """Of an unpacked folder: `file`, `sha256` and `quantization` of its GGUF file; None for any other."""
    try:
        return json.loads((Path(folder) / FACTS).read_bytes())
    except (OSError, ValueError):
        return None


def sha256(path: Path) -> str:
    """Of a file's content. Raises ModelError when there is no such file."""
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"model.name: {path} cannot be read ({error.strerror})") from None


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _files(file: GgufFile, config: Any, sha: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the unpacked folder, one at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as aside:
        config.save_pretrained(aside)
        save_tokenizer(file, Path(aside))
        for written in sorted(Path(aside).iterdir()):
            yield written.name, written.read_bytes()
    origin = {"file": file.path.name, "sha256": sha, "quantization": file.quantization}
    yield FACTS, json.dumps(origin, indent=1).encode()
    yield from _weight_files(file, config, model.state_dict())


def _weight_files(file: GgufFile, config: Any, wanted: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The shards, and their index where there are several. `wanted`: the model's parameters, on no device."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save
    from tqdm import tqdm

    if config.tie_word_embeddings:
        wanted = {name: shape for name, shape in wanted.items() if name != "lm_head.weight"}
    names = tensor_names(file.architecture, config.num_hidden_layers, wanted)
    _check_tensors(file, wanted, names)
    split = split_torch_state_dict_into_shards(wanted, max_shard_size=SHARD_BYTES)
    with tqdm(total=len(wanted), desc=f"unpacking {file.path.name}", unit="tensor") as bar:
        for shard, parameters in split.filename_to_tensors.items():
            content = {}
            for parameter in parameters:
                content[parameter] = _undo(file, config, names[parameter])
                bar.update()
            yield shard, save(content, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        yield "model.safetensors.index.json", json.dumps(index, indent=1).encode()


def _undo(file: GgufFile, config: Any, name: str) -> Any:
    """A tensor as transformers holds it."""
    layout = layout_of(file)
    offset = 1.0 if layout.plus_one and name.endswith("norm.weight") else 0.0
    try:
        weight = weights(file.tensors[name], offset)
    except NotImplementedError:
        kind = gguf_package().GGMLQuantizationType(file.tensors[name].kind).name
        raise ModelError(f"{file.path}: tensor {name} is in {kind}, which cannot be unpacked") from None
    if not weight.isfinite().all():
        raise ModelError(f"{file.path}: tensor {name} has weights that float16 does not hold")
    heads = rope_heads(name, config) if layout.paired else None
    return weight if heads is None else halves_from_pairs(weight, heads)


def _check_tensors(file: GgufFile, wanted: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Each parameter has its tensor, in its shape, and no tensor is left over."""
    for parameter, expected in wanted.items():
        name = names.get(parameter)
        if name is None or name not in file.tensors:
            raise ModelError(f"{file.path}: no tensor {name or parameter}; the file is not a whole model")
        if file.tensors[name].shape != tuple(expected.shape):
            raise ModelError(
                f"{file.path}: tensor {name} has the shape {file.tensors[name].shape}, "
                f"its metadata asks for {tuple(expected.shape)}"
            )
    if unknown := sorted(set(file.tensors) - set(names.values()) - {"rope_freqs.weight"}):
        raise ModelError(
            f"{file.path}: {len(unknown)} tensors do not belong to this layout, such as {unknown[0]}"
        )
