"""A frozen second adapter in a model that is being trained: the teacher of `target-sft`.

peft's own switch between adapters, and its loading of one, freeze the adapter that is trained. Both are
undone here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .load import check_adapter, fitting

TEACHER = "teacher"


def add_teacher(model: Any, path: Path) -> None:
    """Add the adapter in a folder as the teacher. The trained adapter stays the active one.

    Raises ModelError for an adapter that is missing, damaged, or does not fit.
    """
    check_adapter(path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with fitting(path):
        model.load_adapter(path, adapter_name=TEACHER, torch_device=str(model.device))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


@contextmanager
def as_teacher(model: Any) -> Iterator[None]:
    """While open, forward passes use the teacher's adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [TEACHER]
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names
