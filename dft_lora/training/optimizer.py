"""AdamW and the learning rate of each step."""

from __future__ import annotations

import math
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
    parameters: list[torch.nn.Parameter] | list[dict[str, Any]], recipe: Recipe
) -> torch.optim.Optimizer:
    """AdamW over the adapter, with float32 states or bitsandbytes' 8-bit states.

    A parameter group with a `rate` has that many times the learning rate.
    """
    settings = recipe.train
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    import bitsandbytes

    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[settings.optimizer](parameters, **arguments)
