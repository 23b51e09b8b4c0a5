"""AdamW and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..config import Recipe


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """Learning-rate factor of a step: linear warm-up over a share of the steps, then the schedule `kind`."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[kind]


def make_optimizer(
    model: Any, parameters: list[torch.nn.Parameter], recipe: Recipe, more: Iterable[dict[str, Any]] = ()
) -> torch.optim.Optimizer:
    """AdamW over the adapter and `more` groups of parameters, with float32 or bitsandbytes' 8-bit states.

    A group with a `rate` has that many times the learning rate; LoRA+ makes several groups of the adapter.
    """
    settings = recipe.train
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    kind = _kind(settings.optimizer)
    if (ratio := recipe.adapter.lora_plus_ratio) is None:
        optimizer = kind(parameters, **arguments)
    else:
        from peft.optimizers import create_loraplus_optimizer

        decay = {"loraplus_weight_decay": settings.weight_decay}
        optimizer = create_loraplus_optimizer(model, kind, loraplus_lr_ratio=ratio, **arguments, **decay)
        for group in optimizer.param_groups:
            group["rate"] = group["lr"] / settings.learning_rate
    for group in more:
        optimizer.add_param_group(group)
    return optimizer


def _kind(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    import bitsandbytes

    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[name]
