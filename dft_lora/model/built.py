"""What every backend returns: a base and its new adapter, ready to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..loss import Head
from .hardware import Hardware
from .head import hidden_states
from .starts import Weights


@dataclass(frozen=True)
class Built:
    """A base with one new trainable adapter, ready to train."""

    model: Any
    """A peft model in eval mode."""
    head: Head
    hardware: Hardware
    checkpointing: bool
    hidden_states: Callable[..., torch.Tensor] = hidden_states
    """(model, **inputs) -> h_BLD, connected to the graph."""
    set_checkpointing: Callable[[bool], None] | None = None
    """Switches checkpointing on or off; None if the backend decides it when the model is built."""
    start: Weights | None = None
    """What the adapter's start took out of the base (`starts.py`)."""
