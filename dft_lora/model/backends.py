"""Who builds the base and its adapter: `plain` (transformers, peft, bitsandbytes) or `unsloth`.

Same recipe, same objectives through the same loss; a backend is a function from a recipe to `Built`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe
from ..data.batches import Batch
from .built import Built
from .hardware import Hardware
from .head import check_head, refuse_adapted_head
from .load import add_lora, load_base, set_checkpointing, use_checkpointing
from .long_rows import tile_mlps
from .lora_inputs import keep_inputs_narrow
from .row_blocks import norms_in_blocks
from .sharding import shard
from .starts import correct_quantization, follow_inputs, start_of
from .teacher import add_teacher


def prepare(recipe: Recipe) -> None:
    """Do what a backend needs before transformers is imported. Raises MissingPart if it is not installed."""
    if recipe.model.backend == "unsloth":
        from .unsloth import import_unsloth

        import_unsloth()


def build(
    recipe: Recipe,
    device: torch.device,
    base: tuple[Any, Hardware] | None = None,
    first: Batch | None = None,
) -> Built:
    """Build the base and adapter of a recipe on a device.

    `base`: what `load_base` returned, if it is in memory already (backend `plain` only). `first`: the run's
    first tokens, for `adapter.init: eva`; without them A starts as by default, which is enough to measure
    memory or to load a checkpoint.

    Raises ModelError for what cannot be trained exactly, MissingPart if the backend is not installed.
    """
    if base or first:
        built = _plain(recipe, device, base, first)
    else:
        built = BACKENDS[recipe.model.backend](recipe, device)
    refuse_adapted_head(built.model)
    return built


def _plain(
    recipe: Recipe,
    device: torch.device,
    loaded: tuple[Any, Hardware] | None = None,
    first: Batch | None = None,
) -> Built:
    base, hardware = loaded or load_base(recipe.model, device, shardable=recipe.train.shard)
    head = check_head(base)
    torch.manual_seed(recipe.train.seed)  # the same initial adapter for every objective
    model = add_lora(base, recipe.adapter, recipe.model.revision)
    if recipe.adapter.init == "loftq":
        plain = recipe.model.model_copy(update={"quantization": "none"})
        correct_quantization(model, load_base(plain, torch.device("cpu"))[0])
    if first is not None:
        follow_inputs(model, first)
    if recipe.objective.teacher is not None:
        add_teacher(model, Path(recipe.objective.teacher) / "adapter")
    start = start_of(model, recipe.adapter)
    if hardware.dtype != torch.float32:
        keep_inputs_narrow(model)
        if device.type == "cpu":
            norms_in_blocks(model)
    if recipe.train.mlp_tile is not None:
        tile_mlps(model, recipe.train.mlp_tile)
    if recipe.train.shard:
        shard(model, device)
    checkpointing = use_checkpointing(model, recipe.train.gradient_checkpointing)
    switch = partial(set_checkpointing, model)
    return Built(model.eval(), head, hardware, checkpointing, set_checkpointing=switch, start=start)


def _unsloth(recipe: Recipe, device: torch.device) -> Built:
    from .unsloth import build_with_unsloth

    return build_with_unsloth(recipe, device)


BACKENDS: dict[str, Callable[[Recipe, torch.device], Built]] = {"plain": _plain, "unsloth": _unsloth}
