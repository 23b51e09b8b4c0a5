"""Engines that generate answers: the package's own decoding loop and vLLM, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..config import Recipe
from ..data.templates import Renderer
from ..model.generate import Completion, Request, generate
from ..model.hardware import dtype_name
from ..model.head import check_head
from ..model.load import load_adapters, load_base
from ..model.vllm import Vllm


class Engine(Protocol):
    """One base with the adapters of some runs, loaded and ready to generate."""

    scores_tokens: ClassVar[bool]
    """Whether `model` is a torch model that can also score given texts token by token."""

    model: Any
    provenance: dict[str, Any]
    """What it adds to recorded provenance: device, dtype."""

    def __init__(self, recipe: Recipe, adapters: Mapping[str, Path], renderer: Renderer): ...

    def generate(self, requests: Sequence[Request], on_progress: Callable[[int, Completion], None]) -> None:
        """Answer all requests; call `on_progress(i, completion)` for each one when it is complete."""


class Plain:
    """The package's own decoding loop (model/generate.py)."""

    scores_tokens: ClassVar[bool] = True

    def __init__(self, recipe: Recipe, adapters: Mapping[str, Path], renderer: Renderer):
        base, hardware = load_base(recipe.model, for_answers=True)
        check_head(base)
        self.model, self.renderer = load_adapters(base, adapters), renderer
        stop = recipe.evaluate.stop
        self.ends = renderer.has_text(stop) if stop else None
        self.provenance = {"device": hardware.name, "dtype": dtype_name(hardware.dtype)}

    def generate(self, requests: Sequence[Request], on_progress: Callable[[int, Completion], None]) -> None:
        generate(
            self.model,
            requests,
            stop_ids=self.renderer.stop_ids,
            pad_id=self.renderer.pad_id,
            ends=self.ends,
            on_progress=on_progress,
        )


ENGINES: Mapping[str, type[Engine]] = {"plain": Plain, "vllm": Vllm}
"""The values of evaluate.engine."""
