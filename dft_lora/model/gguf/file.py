"""The file format: metadata, and tensors that stay on disk until they are unpacked."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingPart, ModelError

FLOATS = ("F32", "F16", "BF16")
CHUNK = 2**22  # weights unpacked at a time


@dataclass(frozen=True)
class Stored:
    """One tensor as the file holds it: `shape` in torch's order, `kind` the ggml type, `raw` its bytes."""

    shape: tuple[int, ...]
    kind: int
    raw: memoryview


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a GGUF file; the tensors stay on disk until they are unpacked."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own keys, such as `attention.head_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ModelError(f"{self.path}: its metadata has no {self.architecture}.{key}")
        return value

    @cached_property
    def quantization(self) -> str:
        """The file's type as llama.cpp names it, such as `Q4_K_M`; else that of most of its weights."""
        gguf = gguf_package()
        try:
            kind = gguf.LlamaFileType(self.metadata.get("general.file_type"))
            return kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            largest = max(self.tensors.values(), key=lambda stored: len(stored.raw))
            return gguf.GGMLQuantizationType(largest.kind).name


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Cursor:
    """Reads little-endian values one after the other. Raises ValueError beyond the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from("<" + layout, self.data, self.at)
        except struct.error:
            raise ValueError("ends within its header") from None
        self.at += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        if self.at + length > len(self.data):
            raise ValueError("ends within its header")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.take("IQ")
            if count > len(self.data):
                raise ValueError("ends within its header")
            if element in SCALARS:
                return list(self.take(f"{count}{SCALARS[element]}"))
            return [self.value(element) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"has metadata of the unknown type {kind}")
        return self.take(SCALARS[kind])[0]


def read(path: Path) -> GgufFile:
    """A GGUF file's metadata and tensor table. Raises ModelError for a file that is none, or not whole."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: not a GGUF file (it does not begin with GGUF)")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(path, data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError) as error:
        raise ModelError(f"{path}: damaged or cut off: {error}") from None


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    _, version, tensor_count, metadata_count = cursor.take("4sIQQ")
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version}; versions 2 and 3 are read")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(*cursor.take("I"))
    if "general.architecture" not in metadata:
        raise ModelError(f"{path}: its metadata has no general.architecture")
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.take(f"{cursor.take('I')[0]}Q")
        table.append((name, tuple(reversed(dimensions)), *cursor.take("IQ")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    tensors, view = {}, memoryview(data)
    for name, shape, kind, offset in table:
        size = _bytes_of(path, name, shape, kind)
        if start + offset + size > len(data):
            raise ValueError(f"{len(data):,} bytes, tensor {name} ends at {start + offset + size:,}")
        tensors[name] = Stored(shape, kind, view[start + offset : start + offset + size])
    return GgufFile(path, metadata, tensors)


def _bytes_of(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    sizes = {int(known): size for known, size in gguf_package().GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        raise ModelError(f"{path}: tensor {name} has the unknown type {kind}")
    block, size = sizes[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def weights(stored: Stored, offset: float = 0.0) -> Any:
    """A tensor's weights less `offset` in float16, made in chunks of rows: only a chunk is ever in float32.

    Not bfloat16: rounded to it, 0.3 % of the weights of SmolLM2 (Gemma: 0.2 %) take another nf4 level than
    the exact ones; after float16 0.05 % (0.02 %), measured over three layers.
    Raises NotImplementedError for a type that cannot be unpacked.
    """
    import torch

    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(stored.kind)
    rows = int(np.prod(stored.shape[:-1], dtype=np.int64))
    packed = np.frombuffer(stored.raw, np.uint8).reshape(rows, -1)
    out = np.empty((rows, stored.shape[-1]), np.float16)
    step = max(1, CHUNK // stored.shape[-1])
    for at in range(0, rows, step):
        out[at : at + step] = gguf.dequantize(packed[at : at + step], kind) - np.float32(offset)
    return torch.from_numpy(out.reshape(stored.shape))


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingPart("GGUF files need the package gguf: pip install gguf") from None
    return gguf
