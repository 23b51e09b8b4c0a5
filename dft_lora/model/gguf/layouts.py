"""How llama.cpp writes each architecture: its config as metadata, its tensors' names and the order of rows.

Legend: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...errors import ModelError
from .file import GgufFile, gguf_package, weights
from .tokenizer import SPECIAL_TOKENS


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


def layout_of(file: GgufFile) -> Layout:
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

    layout, heads, width = layout_of(file), file.need("attention.head_count"), file.need("embedding_length")
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


def tensor_names(architecture: str, layers: int, parameters: Any) -> dict[str, str]:
    """llama.cpp's tensor names of transformers' parameters."""
    gguf = gguf_package()
    (number,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table, names = gguf.get_tensor_name_map(number, layers), {}
    for parameter in parameters:
        stem, _, suffix = parameter.rpartition(".")
        if name := table.get_name(stem):
            names[parameter] = f"{name}.{suffix}"
    return names


def halves_from_pairs(w_OI: Any, heads: int) -> Any:
    """Rows of q or k in transformers' order: the first of each pair of a head, then the second."""
    return w_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(w_OI.shape)


def pairs_from_halves(w_OI: Any, heads: int) -> Any:
    """The other way round."""
    return w_OI.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w_OI.shape)


def rope_heads(name: str, config: Any) -> int | None:
    """Into how many heads the rows of this tensor are cut, for q and k; None for others."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None
