"""The tokenizer that a GGUF file holds as metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .file import GgufFile

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


def check_tokenizer(file: GgufFile) -> None:
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


def save_tokenizer(file: GgufFile, folder: Path) -> None:
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
