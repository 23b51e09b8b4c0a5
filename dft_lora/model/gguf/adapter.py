"""An adapter that leaves as a GGUF file, for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import RequestError
from .file import gguf_package
from .layouts import LAYOUTS, pairs_from_halves, rope_heads, tensor_names


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
    gguf = gguf_package()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)  # llama.cpp multiplies by alpha / rank
    for key, factor in sorted(factors.items()):
        module, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        names = tensor_names(architecture, config.num_hidden_layers, [f"{module}.weight"])
        if side not in ("A", "B") or not names:
            raise RequestError(f"{adapter}: llama.cpp has no place for {key}")
        (name,) = names.values()
        heads = rope_heads(name, config) if layout.paired and side == "B" else None
        factor = factor.float() if heads is None else pairs_from_halves(factor.float(), heads)
        writer.add_tensor(f"{name}.lora_{side.lower()}", factor.contiguous().numpy())
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
