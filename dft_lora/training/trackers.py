"""A run's metrics in tensorboard, wandb or trackio, through accelerate.

tensorboard and trackio need no account. `metrics.jsonl` and `curves.png` are always written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import MissingPart


def check_trackers(names: Sequence[str]) -> list[str] | None:
    """The names as accelerate expects them. Raises MissingPart for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingPart(f"train.trackers: {name} is not installed; pip install {name}")
    return list(names) or None


def begin(accelerator: Any, recipe: Mapping[str, Any]) -> None:
    """Start every tracker with the recipe's fields, flat: tensorboard takes only plain values."""
    fields = {
        f"{part}.{name}": value if isinstance(value, int | float | str | bool) else str(value)
        for part, values in recipe.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
    }
    accelerator.init_trackers("dft-lora", config=fields)


def track(accelerator: Any, figures: Mapping[str, Any]) -> None:
    """Log the metrics of one step."""
    values = {name: float(value) for name, value in figures.items() if value is not None and name != "step"}
    accelerator.log(values, step=figures["step"])


def finish(accelerator: Any) -> None:
    """Close the trackers; accelerate's own end_training would also end the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()
