"""Attention over packed rows: which kind, and the proof that the examples of a row do not see each other."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..config import DataConfig
from ..data.batches import micro_batches
from ..data.packing import Arrange, CheapestPacking, Packed
from ..errors import ModelError
from .head import bare, hidden_states


def use_varlen(model: Any) -> bool:
    """Switch a model to variable-length flash attention; False where package, device or model rule it out."""
    from transformers.utils import is_flash_attn_2_available

    core = bare(model)
    if core.device.type != "cuda" or core.dtype == torch.float32 or not is_flash_attn_2_available():
        return False
    try:
        core.set_attn_implementation("flash_attention_2")
    except (ValueError, ImportError):  # what transformers raises for an architecture without it
        return False
    return True


@torch.no_grad()
def keeps_examples_apart(model: Any) -> bool:
    """Whether, in a packed row, nothing of an example depends on the one before it, to the bit.

    True for attention that starts anew where positions do; false for recurrent layers, or for a model that
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
    """Tokens of a row at which attention over the whole row costs as much as all matrices before the head.

    2 P multiplications and additions a token against 4 L D a layer.
    """
    core = bare(model)
    config, head = core.config.get_text_config(), core.get_output_embeddings()
    sizes = [
        module.in_features * module.out_features
        for module in core.modules()
        if hasattr(module, "in_features") and module is not head
    ]
    return sum(sizes) / (2 * config.num_hidden_layers * config.hidden_size)


def choose_arrangement(data: DataConfig, model: Any, alike: bool = False) -> Arrange:
    """How a step's examples become micro-batches, as `data.packing` says; `model` in eval mode.

    `auto` packs all it can with variable-length attention, and elsewhere where that costs less than padding.
    `alike`: as many micro-batches for any examples, which packing does not promise. Raises ModelError where
    packing is asked for and the model mixes the examples of a row, where `auto` pads, or with `alike`.
    """
    if data.packing is False:
        return micro_batches
    if data.packing is True and alike:
        raise ModelError("data.packing: true does not go with train.shard; auto does")
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
