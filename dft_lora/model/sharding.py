"""A frozen base sharded over processes: FSDP2 for the decoder layers, and nothing else.

Each process holds its part of every decoder layer's frozen weights. A layer is gathered when a forward or
backward pass reaches it, and freed afterwards. Adapter, embeddings, norm and output head are complete in
every process (Qwen2.5-32B: 3 GB), so everything else works as with DDP: the loss reads the head outside of
the forward pass, gradients are ordinary tensors, checkpoints hold complete adapters and optimizer states.

4-bit weights need two preparations. Their storage dtype must be a floating-point type, since FSDP turns their
parts into parameters. And their quantization state, complete in each process, is attached to the module,
where bitsandbytes looks for it once FSDP has replaced the weight with a plain tensor.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from ..errors import ModelError
from .head import bare
from .memory import MIB


def shard(model: Any, device: torch.device) -> None:
    """Shard a peft model's frozen decoder layers over all processes, in place; the rest moves to `device`.

    `model` may be on the CPU: layers move to `device` one by one and are sharded there. Afterwards every
    process must make the same number of forward and backward passes. Raises ModelError if the layers are
    unknown.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    core = bare(model)
    kinds = set(getattr(core, "_no_split_modules", None) or ())
    layers = [module for module in core.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ModelError(
            f"train.shard: {type(core).__name__} does not declare which of its modules are layers"
        )
    for module in core.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            state.to(device)
            module.quant_state = state
    parts = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
    whole = {p for p in core.parameters() if p not in parts}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*layers, core):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for tensor in chain(core.parameters(), core.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def held_mb(model: Any) -> float:
    """MiB of frozen weights in this process: all of them, or its shard."""
    frozen = [p for p in bare(model).parameters() if not p.requires_grad]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
    return sum(p.untyped_storage().nbytes() for p in held) / MIB
