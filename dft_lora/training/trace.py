"""The learner of a recipe without weights and without a GPU: its own code, run on the meta device.

Every tensor has a shape and a dtype but no contents, so a base of any size is "trained" on a laptop, and
`TracedTensors` counts the bytes that CUDA's allocator would count. It takes the branches of a GPU: no blocks
of rows for a CPU's cache, the loss workspace of a GPU, the outputs of the Triton kernel. Three things are
modelled, because only CUDA has them: attention by PyTorch's memory-efficient or flash kernel, bitsandbytes'
unpacked matrix inside its product, and paged optimizer states, counted as if they stayed on the GPU.

Not on a fake CUDA device: without CUDA, autograd aborts on one (torch 2.13: "not linked with support").
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.library import _scoped_library

from ..config import Recipe
from ..loss import Objective
from ..model.memory import TracedTensors
from .learner import Learner
from .ranks import Ranks


def can_trace(recipe: Recipe) -> bool:
    """Whether shapes alone tell what a recipe's process holds: not in int8, sharded, or by unsloth."""
    model = recipe.model
    return model.backend == "plain" and model.quantization != "int8" and not recipe.train.shard


@contextmanager
def traced(recipe: Recipe, objective: Objective, pad_id: int) -> Iterator[Learner]:
    """The learner of a recipe on the meta device; while open, its work can be probed but not timed.

    With `train.shard` it is one process that holds the whole base.
    """
    recipe = recipe.override(["train.shard=false", "train.skip_rows=0", "adapter.init=default"])
    if recipe.model.dtype == "auto":
        recipe = recipe.override(["model.dtype=bfloat16"])
    if recipe.train.optimizer == "paged_adamw8bit":  # pages need CUDA
        recipe = recipe.override(["train.optimizer=adamw8bit"])
    with TracedTensors() as memory, _scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings(action="ignore"):  # that it overrides PyTorch's own
            library.impl("scaled_dot_product_attention", _attention_on_cuda, "AutogradMeta")
        yield Learner(recipe, objective, pad_id, MetaRanks(recipe, memory))


class MetaRanks(Ranks):
    """One process on the meta device, with the gauge that counts there."""

    def __init__(self, recipe: Recipe, memory: TracedTensors):
        super().__init__(recipe)
        self.device, self.gauge = torch.device("meta"), memory
        self.accelerator.device_placement = False
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)


def _attention_on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch's flash kernel, or the memory-efficient one with a mask, which becomes an addend first.

    On the meta device PyTorch would multiply out all scores, [L, L] per head.
    """
    ops = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if enable_gqa:  # only the flash kernel shares keys and values among query heads
        shared = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(shared, -3) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), -torch.inf))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return ops._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
