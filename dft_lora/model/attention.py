"""Attention: the kind that packed rows use, whether their examples stay apart, and heads that share keys."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..config import DataConfig
from ..data.batches import micro_batches
from ..data.packing import Arrange, CheapestPacking, Packed
from ..errors import ModelError
from .accelerator import accelerator
from .head import bare, hidden_states

CPU_ATTENTION = 3.5
"""Time of attention per operation on a CPU in 16 bits, in a training step, over that of the layers' products.

Half of their rate was measured (rows of 100 to 800 tokens), and a backward pass of 2.5 times the forward pass
stands against 1: frozen weights have no gradient.
"""

PACKED_HEADS = "sdpa_packed_heads"
"""The name under which transformers knows `_packed_heads`."""
PLAIN = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}
"""Kinds of model that may use it. Others choose their masks by the name `sdpa`, sparse ones for example."""


def lacks_shared_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has no fused kernel there for heads that share keys: flash attention alone has.

    It needs Ampere or newer, and 16 bits.
    """
    flash = dtype != torch.float32 and accelerator(device).computes_bfloat16
    return device.type == "cuda" and not flash


def use_packed_heads(model: Any) -> None:
    """Let the heads that share keys and values read them together, where `load_base` asks for it.

    Where all rows of a batch are equally long, transformers leaves the sharing to torch. For one token its
    CPU kernel reads keys and values once per query head: 2.5 to 4 times as slow with 3 heads per key-value
    head. On an older GPU (T4), or in float32, only torch's math kernel shares heads on CUDA, and it stores
    all attention scores.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    core = bare(model)
    if core.config._attn_implementation != "sdpa" or core.config.model_type not in PLAIN:
        return
    AttentionInterface.register(PACKED_HEADS, _packed_heads)
    AttentionMaskInterface.register(PACKED_HEADS, sdpa_mask)
    core.set_attn_implementation(PACKED_HEADS)


def _packed_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, but a token's heads that share keys and values are the rows of one query.

    For several tokens keys and values are repeated, where the device cannot share them.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    other = any(more.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    heads = query.shape[1] // key.shape[1]
    if not other and attention_mask is None and heads > 1:
        if query.shape[2] == 1:
            grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
            out = scaled_dot_product_attention(grouped, key, value, dropout_p=dropout, scale=scaling)
            return out.reshape(len(query), 1, query.shape[1], value.shape[3]), None
        # heads wider than 256 transformers repeats itself
        if key.shape[3] <= 256 and lacks_shared_heads(query.device, query.dtype):
            key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)


def use_varlen(model: Any) -> bool:
    """Switch a model to variable-length flash attention; False if package, device or model rule it out."""
    from transformers.utils import is_flash_attn_2_available

    core = bare(model)
    if core.device.type != "cuda" or core.dtype == torch.float32 or not is_flash_attn_2_available():
        return False
    if not accelerator(core.device).computes_bfloat16:  # flash attention 2 needs Ampere
        return False
    try:
        core.set_attn_implementation("flash_attention_2")
    except (ValueError, ImportError):  # what transformers raises for an architecture without it
        return False
    return True


@torch.no_grad()
def keeps_examples_apart(model: Any) -> bool:
    """Whether an example in a packed row is bit-exactly independent of the example before it.

    True for attention that restarts where positions restart; false for recurrent layers, or for a model that
    takes no positions. `model` must be in eval mode.
    """
    core = bare(model)
    if "position_ids" not in inspect.signature(core.forward).parameters:
        return False
    positions_BL = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=core.device)
    second_BL = torch.tensor([[8, 6, 5, 7]], device=core.device)

    def of_second(first: list[int]) -> torch.Tensor:
        ids_BL = torch.cat([second_BL.new_tensor([first]), second_BL], dim=1)
        return hidden_states(model, input_ids=ids_BL, position_ids=positions_BL)[:, 3:]

    return torch.equal(of_second([5, 6, 7]), of_second([9, 8, 5]))


def crossover_length(model: Any) -> float:
    """Row length at which attention over the row costs as much as all matrix products before the head.

    Per token, 2 operations per weight against 4 L D per layer, which take longer on a CPU in 16 bits.
    """
    core = bare(model)
    config, head = core.config.get_text_config(), core.get_output_embeddings()
    sizes = [
        module.in_features * module.out_features
        for module in core.modules()
        if hasattr(module, "in_features") and module is not head
    ]
    slower = CPU_ATTENTION if core.device.type == "cpu" and core.dtype != torch.float32 else 1
    return sum(sizes) / (2 * config.num_hidden_layers * config.hidden_size * slower)


def choose_arrangement(data: DataConfig, model: Any, alike: bool = False) -> Arrange:
    """How a step's examples become micro-batches, according to `data.packing`; `model` in eval mode.

    `auto` always packs with variable-length attention, and otherwise wherever that costs less than padding.
    `alike`: the number of micro-batches must not depend on the examples, which packing cannot guarantee.
    Raises ModelError if `data.packing` is true but the model mixes the examples of a row (`auto` pads then),
    or with `alike`.
    """
    if data.packing is False:
        return micro_batches
    if data.packing is True and alike:
        raise ModelError("data.packing: true cannot be combined with train.shard; auto can")
    varlen = not alike and use_varlen(model)
    if not keeps_examples_apart(model):
        if data.packing is True:
            raise ModelError(
                f"data.packing: {type(bare(model)).__name__} mixes the examples of a packed row; "
                "set data.packing: false"
            )
        return micro_batches
    return (
        Packed(data.max_length, varlen)
        if varlen or data.packing is True
        else CheapestPacking(crossover_length(model))
    )
