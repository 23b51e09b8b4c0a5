"""Longer rows on the same GPU: two options beside gradient checkpointing, and what they cost.

    train.offload_activations   a layer's input waits in the host's memory until the backward pass needs it:
                                two copies over the bus per layer
    train.mlp_tile              an MLP sees so many tokens at a time, and runs again in the backward pass:
                                its forward pass once more

With checkpointing alone, a training step keeps the input of every layer, [B, L, D], and the backward pass of
one layer its MLP's widest activations, several times [B, L, 5 D]. Both grow with the length of a row.

Shapes (docs/shapes.md): B rows, L tokens of a row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from .head import bare

SMALL = 2**16
"""Elements; smaller tensors stay where they are."""

Saved = torch.Tensor | tuple[torch.device, torch.Tensor]


def offloaded(model: Any) -> saved_tensors_hooks:
    """While open, what autograd saves is moved to the host's memory and comes back when it is needed.

    Inside a checkpointed layer nothing is saved, so what moves is the layers' inputs. The model's weights,
    which a linear head saves, stay. On a CPU nothing moves.
    """
    weights = {_storage(parameter) for parameter in model.parameters()}
    return saved_tensors_hooks(lambda x: x if _storage(x) in weights else _to_host(x), _from_host)


def _storage(x: torch.Tensor) -> int:
    """The same for a tensor and its views."""
    return x.untyped_storage()._cdata


def _to_host(x: torch.Tensor) -> Saved:
    if x.device.type == "cpu" or x.numel() < SMALL or not x.is_floating_point():
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    if not x.is_meta:
        host.copy_(x, non_blocking=x.is_cuda)
    return x.device, host


def _from_host(saved: Saved) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    device, host = saved
    return host.to(device, non_blocking=True)


def tile_mlps(model: Any, tokens: int) -> None:
    """Let every MLP of a model see at most `tokens` tokens of a row at a time while it is trained.

    Values stay the same up to the rounding of the matrix products. Raises ModelError if the decoder's layers
    have no MLP that treats every token by itself.
    """
    mlps = [module for name, module in bare(model).named_modules() if name.endswith(".mlp")]
    if not mlps or not all(hasattr(mlp, "down_proj") for mlp in mlps):
        raise ModelError(
            "train.mlp_tile: the layers of this model have no MLP with a down_proj; leave it out"
        )
    for mlp in mlps:
        mlp.forward = partial(_in_tiles, mlp.forward, tokens)


def _in_tiles(forward: Callable[[torch.Tensor], torch.Tensor], tokens: int, x_BLD: torch.Tensor):
    if x_BLD.shape[1] <= tokens or not torch.is_grad_enabled():
        return forward(x_BLD)
    tiles = x_BLD.split(tokens, dim=1)
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in tiles], dim=1)
