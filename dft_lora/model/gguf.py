"""A base that comes as a GGUF file, and an adapter that leaves as one. The only file that knows the format.

llama.cpp's files hold the weights in blocks of its own, under its own names, with config and tokenizer as
metadata. Such a file is unpacked once into a folder of 16-bit safetensors in the cache, named by the file's
sha256; from there it is a base like any other. transformers reads GGUF too, but marks the model as quantized
(so that it can be neither trained nor saved), holds all of it in float32, and does not read all that a file
says: the head width of Qwen3, Llama 3's rope factors, the split of SmolLM's tokenizer.

Legend: O outputs, I inputs of a linear layer, R rank of an adapter.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingPart, ModelError, RequestError
from .cache_folder import cache_folder, is_kept, keep

VERSION = 1
"""Of what `unpacked` writes: a change there must not read an older folder."""
FACTS = "gguf.json"
SHARD_BYTES = 2**30
FLOATS = ("F32", "F16", "BF16")
CHUNK = 2**22  # weights unpacked at a time


# --- reading ----------------------------------------------------------------------------------------


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
        gguf = _gguf()
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
    sizes = {int(known): size for known, size in _gguf().GGML_QUANT_SIZES.items()}
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

    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(stored.kind)
    rows = int(np.prod(stored.shape[:-1], dtype=np.int64))
    packed = np.frombuffer(stored.raw, np.uint8).reshape(rows, -1)
    out = np.empty((rows, stored.shape[-1]), np.float16)
    step = max(1, CHUNK // stored.shape[-1])
    for at in range(0, rows, step):
        out[at : at + step] = gguf.dequantize(packed[at : at + step], kind) - np.float32(offset)
    return torch.from_numpy(out.reshape(stored.shape))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingPart("GGUF files need the package gguf: pip install gguf") from None
    return gguf


# --- layouts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How llama.cpp writes one architecture, to be undone.

    `model_types`: transformers' names of it. `config`: fields beside the common ones. `paired`: llama.cpp's
    rope turns neighbouring rows of q and k, transformers' the two halves of a head, so the file has the rows
    in another order. `plus_one`: the file has 1 + w for the weight w of a norm.
    """

    model_types: tuple[str, ...]
    config: Callable[[GgufFile], dict[str, Any]] = field(default=lambda file: {})
    paired: bool = False
    plus_one: bool = False


def _llama(file: GgufFile) -> dict[str, Any]:
    """Llama, and Mistral, which llama.cpp writes as a llama with, at most, a sliding window."""
    if window := file.get("attention.sliding_window"):
        return {"model_type": "mistral", "sliding_window": window}
    biased = "blk.0.attn_q.bias" in file.tensors, "blk.0.ffn_gate.bias" in file.tensors
    return {"attention_bias": biased[0], "mlp_bias": biased[1]}


def _gemma3(file: GgufFile) -> dict[str, Any]:
    """Five layers of sliding-window attention, then a full one; each kind has its own rope."""
    layers, every = file.need("block_count"), file.get("attention.sliding_window_pattern", 6)
    head_dim, heads = file.need("attention.key_length"), file.need("attention.head_count")
    largest = layers == 62  # the 27B alone scales its queries by hidden size per head
    local = {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10_000.0)}
    return {
        "sliding_window": file.need("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)],
        "query_pre_attn_scalar": file.need("embedding_length") // heads if largest else head_dim,
        "rope_parameters": {"full_attention": _rope(file), "sliding_attention": local},
        "final_logit_softcapping": file.get("final_logit_softcapping"),
        "attn_logit_softcapping": None,
    }


LAYOUTS = {
    "llama": Layout(("llama", "mistral"), _llama, paired=True),
    "qwen2": Layout(("qwen2",)),
    "qwen3": Layout(("qwen3",), lambda file: {"attention_bias": False}),
    "gemma3": Layout(("gemma3_text",), _gemma3, plus_one=True),
}
"""By llama.cpp's name of the architecture."""


def _layout(file: GgufFile) -> Layout:
    """Raises ModelError for a file that is no whole model of a known layout."""
    kind, parts = file.metadata.get("general.type", "model"), file.metadata.get("split.count", 1)
    if kind != "model":
        raise ModelError(f"{file.path}: a GGUF file of the type {kind!r}, not a model")
    if parts > 1:
        raise ModelError(
            f"{file.path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUT"
        )
    if file.architecture not in LAYOUTS or file.get("expert_count", 0):
        what = file.architecture + (" with experts" if file.get("expert_count", 0) else "")
        raise ModelError(
            f"{file.path}: architecture {what!r} is not supported as GGUF (known: {', '.join(LAYOUTS)}); "
            "name the model's 16-bit folder or Hub id instead"
        )
    return LAYOUTS[file.architecture]


def model_config(file: GgufFile) -> Any:
    """The transformers config that the metadata describes. Raises ModelError for an unknown layout."""
    from transformers import AutoConfig

    layout, heads, width = _layout(file), file.need("attention.head_count"), file.need("embedding_length")
    head_dim = file.get("attention.key_length") or file.get("rope.dimension_count") or width // heads
    if file.get("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{file.path}: heads of different widths for keys and values are not supported")
    special = {
        f"{name}_id": file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for name, theirs in SPECIAL_TOKENS.items()
        if name != "unk_token"
    }
    fields = {
        "model_type": layout.model_types[0],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": file.need("feed_forward_length"),
        "num_hidden_layers": file.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.need("context_length"),
        "rope_parameters": _rope(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",  # what other engines should compute in: Gemma overflows float16
        **special,
    }
    fields |= layout.config(file)
    return AutoConfig.for_model(**fields)


def _rope(file: GgufFile) -> dict[str, Any]:
    theta = file.get("rope.freq_base", 10_000.0)
    kind = file.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, theta)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": file.need("rope.scaling.factor")}
    raise ModelError(f"{file.path}: rope scaling {kind!r} is not supported")


def _llama3_rope(file: GgufFile, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, of which a file holds the outcome: by what each frequency is divided."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divided = weights(file.tensors["rope_freqs.weight"]).float()
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(divided.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim = 2 * len(divided)
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    if not torch.allclose(plain / scaled, divided, rtol=2e-3):
        raise ModelError(f"{file.path}: its rope_freqs are not those of Llama 3")
    return rope


def _names(architecture: str, layers: int, parameters: Any) -> dict[str, str]:
    """llama.cpp's tensor names of transformers' parameters."""
    gguf = _gguf()
    (number,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table, names = gguf.get_tensor_name_map(number, layers), {}
    for parameter in parameters:
        stem, _, suffix = parameter.rpartition(".")
        if name := table.get_name(stem):
            names[parameter] = f"{name}.{suffix}"
    return names


def _halves_from_pairs(w_OI: Any, heads: int) -> Any:
    """Rows of q or k in transformers' order: the first of each pair of a head, then the second."""
    return w_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(w_OI.shape)


def _pairs_from_halves(w_OI: Any, heads: int) -> Any:
    """The other way round."""
    return w_OI.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w_OI.shape)


def _rope_heads(name: str, config: Any) -> int | None:
    """Into how many heads the rows of this tensor are cut, for q and k; None for others."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None


# --- unpacking --------------------------------------------------------------------------------------


def unpacked(path: Path) -> Path:
    """The folder of 16-bit weights, config and tokenizer that a GGUF file stands for, made at the first call.

    Raises ModelError for a file that cannot be read exactly, RunError when the disk is full.
    """
    folder = folder_of(sha256(path))
    if is_kept(folder):
        return folder
    file = read(path)
    config = model_config(file)
    _check_tokenizer(file)
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
        _save_tokenizer(file, Path(aside))
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
    names = _names(file.architecture, config.num_hidden_layers, wanted)
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
    layout = _layout(file)
    offset = 1.0 if layout.plus_one and name.endswith("norm.weight") else 0.0
    try:
        weight = weights(file.tensors[name], offset)
    except NotImplementedError:
        kind = _gguf().GGMLQuantizationType(file.tensors[name].kind).name
        raise ModelError(f"{file.path}: tensor {name} is in {kind}, which cannot be unpacked") from None
    if not weight.isfinite().all():
        raise ModelError(f"{file.path}: tensor {name} has weights that float16 does not hold")
    heads = _rope_heads(name, config) if layout.paired else None
    return weight if heads is None else _halves_from_pairs(weight, heads)


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


# --- tokenizer --------------------------------------------------------------------------------------

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}",
    "qwen2": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}",
    "smollm": None,  # single digits, then GPT-2's split
    "gpt-2": None,
}
"""`tokenizer.ggml.pre`: how a byte-level vocabulary's merges were learned. Its split of text into words."""


def _check_tokenizer(file: GgufFile) -> None:
    kind, split = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if not file.metadata.get("tokenizer.ggml.tokens"):
        raise ModelError(f"{file.path}: it holds no tokenizer")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and split not in SPLITS):
        raise ModelError(
            f"{file.path}: its tokenizer ({kind}, split {split!r}) is not supported "
            f"(known: llama; gpt2 with the splits {', '.join(SPLITS)})"
        )


SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
PROBE = "def f(x):\n\treturn x  + 1234.5\n\n\nIt's  naïve, 2,000 € — 日本語 or 😀?"


def _save_tokenizer(file: GgufFile, folder: Path) -> None:
    """The file's tokenizer and chat template, into a folder that has the config already.

    Raises ModelError when transformers cannot build it, or reads another one back.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        # Not from_pretrained: it prefers a tokenizer.json that happens to lie beside the file.
        built = PreTrainedTokenizerFast(
            name_or_path=str(file.path.parent.absolute()), gguf_file=file.path.name
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{file.path}: no tokenizer can be built from it ({error})") from None
    tokens = file.metadata["tokenizer.ggml.tokens"]
    backend, split = _only(built.backend_tokenizer, len(tokens)), file.metadata.get("tokenizer.ggml.pre")
    if file.metadata["tokenizer.ggml.model"] == "gpt2":
        backend.pre_tokenizer = _split(file.metadata["tokenizer.ggml.pre"])
    ids = {
        name: file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for name, theirs in SPECIAL_TOKENS.items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        # Where the file does not say: what llama.cpp does for this kind.
        add_bos_token=file.metadata.get(
            "tokenizer.ggml.add_bos_token",
            file.metadata["tokenizer.ggml.model"] == "llama" or split == "llama-bpe",
        ),
        **{name: None if i is None else tokens[i] for name, i in ids.items()},
    )
    tokenizer.save_pretrained(folder)
    back = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if back(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise ModelError(f"{file.path}: its tokenizer reads back differently as a {type(back).__name__}")


def _only(backend: Any, count: int) -> Any:
    """A tokenizer without the tokens beyond the first `count`: transformers adds GPT-2's end of text."""
    from tokenizers import Tokenizer

    spelled = json.loads(backend.to_str())
    spelled["added_tokens"] = [token for token in spelled["added_tokens"] if token["id"] < count]
    vocabulary = spelled["model"]["vocab"] | {t["content"]: t["id"] for t in spelled["added_tokens"]}
    if spelled["model"].get("unk_token") not in vocabulary:
        spelled["model"]["unk_token"] = None
    return Tokenizer.from_str(json.dumps(spelled))


def _split(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if (pattern := SPLITS[name]) is not None:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        return pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# --- adapters ---------------------------------------------------------------------------------------


def write_adapter(adapter: Path, config: Any, out: Path) -> None:
    """A peft LoRA adapter over a base of this transformers config as a GGUF adapter for llama.cpp.

    Raises RequestError for an adapter, or a base, that the format cannot hold.
    """
    from safetensors.torch import load_file

    known = {kind: (name, layout) for name, layout in LAYOUTS.items() for kind in layout.model_types}
    if config.model_type not in known:
        raise RequestError(
            f"llama.cpp adapters of a {config.model_type!r} base are not written (known: {', '.join(known)})"
        )
    lora = json.loads((adapter / "adapter_config.json").read_bytes())
    if (
        lora.get("use_dora")
        or lora.get("rank_pattern")
        or lora.get("alpha_pattern")
        or lora.get("modules_to_save")
    ):
        raise RequestError(f"{adapter}: llama.cpp takes plain LoRA of one rank and alpha only")
    rank = lora["r"]
    scale = lora["lora_alpha"] / (rank**0.5 if lora.get("use_rslora") else rank)
    (architecture, layout), factors = (
        known[config.model_type],
        load_file(adapter / "adapter_model.safetensors"),
    )
    gguf = _gguf()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)  # llama.cpp multiplies by alpha / rank
    for key, factor in sorted(factors.items()):
        module, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        names = _names(architecture, config.num_hidden_layers, [f"{module}.weight"])
        if side not in ("A", "B") or not names:
            raise RequestError(f"{adapter}: llama.cpp has no place for {key}")
        (name,) = names.values()
        heads = _rope_heads(name, config) if layout.paired and side == "B" else None
        factor = factor.float() if heads is None else _pairs_from_halves(factor.float(), heads)
        writer.add_tensor(f"{name}.lora_{side.lower()}", factor.contiguous().numpy())
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
