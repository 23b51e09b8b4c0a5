"""Small models written as GGUF files the way llama.cpp's converter writes them, by the gguf package."""

import json
from pathlib import Path

import numpy as np

from dft_lora.model.tiny import TINY_DIR

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(parameter: str, architecture: str) -> str:
    """llama.cpp's name of a parameter, spelled out here on its own."""
    names, stem, suffix = GEMMA_NAMES if architecture == "gemma3" else NAMES, *parameter.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{names[rest]}.{suffix}"


def paired(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """Row i and row i + half of each head become neighbours, as llama.cpp's rope wants them."""
    half = len(w_OI) // heads // 2
    order = [h * 2 * half + i + side * half for h in range(heads) for i in range(half) for side in (0, 1)]
    return w_OI[order]


def write_gguf(
    path: Path, model, architecture: str, kind: str = "F16", tokenizer: str = "bpe", **more
) -> Path:
    """A transformers model as a GGUF file, matrices in `kind`. `more`: metadata; None leaves a key out."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "vocab_size": config.vocab_size,
    } | {key.replace("__", "."): value for key, value in more.items()}
    for key, value in own.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if isinstance(value, str):
            add = writer.add_string
        if value is not None:
            add(f"{architecture}.{key}", value)
    if tokenizer:
        (_add_bpe if tokenizer == "bpe" else _add_spm)(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = paired(weight, heads if ".q_proj." in name else kv_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        _add(writer, gguf_name(name, architecture), weight, kind)
    if rope.get("rope_type") == "llama3":
        inverse = model.model.rotary_emb.inv_freq.numpy()
        plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / inverse).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, name: str, weight: np.ndarray, kind: str) -> None:
    import gguf

    quantized = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
    raw = gguf.quantize(np.ascontiguousarray(weight, np.float32), quantized)
    writer.add_tensor(name, raw, raw_dtype=quantized)


def _add_bpe(writer, size: int) -> None:
    """The embedded base's own tokenizer: byte-level BPE of single digits, which is SmolLM's split."""
    spelled = json.loads((TINY_DIR / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in spelled["added_tokens"]}
    tokens = {i: token for token, i in spelled["model"]["vocab"].items()} | special
    ids = {token: i for i, token in special.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    unused = [f"[PAD{i}]" for i in range(len(tokens), size)]  # the converter pads to the embedding's rows
    writer.add_token_list([*(tokens[i] for i in range(len(tokens))), *unused])
    writer.add_token_types([*(3 if i in special else 1 for i in range(len(tokens))), *(5 for _ in unused)])
    writer.add_token_merges([" ".join(pair) for pair in spelled["model"]["merges"]])
    writer.add_bos_token_id(ids["<|bos|>"])
    writer.add_eos_token_id(ids["<|end|>"])
    writer.add_pad_token_id(ids["<|pad|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((TINY_DIR / "chat_template.jinja").read_text())


SPM = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
SPM += [*"abcdefghijklmnopqrstuvwxyz0123456789", "th", "the", "▁the", "he"]


def _add_spm(writer, size: int) -> None:
    """A sentencepiece vocabulary of bytes, letters and a few words."""
    assert size == len(SPM)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(SPM)
    writer.add_token_scores([-float(i) for i in range(len(SPM))])
    writer.add_token_types([3] * 3 + [2] + [6] * 256 + [1] * (len(SPM) - 260))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
