"""The untouched base of a recipe as a run folder."""

from __future__ import annotations

from pathlib import Path

from ..config import Recipe
from ..data.templates import Renderer
from ..model.fingerprint import base_fingerprint
from ..model.load import load_tokenizer, weights_of
from ..runs.folder import RunFolder
from ..runs.provenance import certificate


def base_run(recipe: Recipe, path: str | Path) -> RunFolder:
    """A run folder for the untouched base of a recipe: no adapter, so that it is evaluated like any run."""
    folder = RunFolder.create(path)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    folder.write_run(
        recipe=recipe.model_copy(update={"name": folder.name, "output": str(path)}).as_dict(),
        template=renderer.template.name,
        template_hash=renderer.fingerprint,
        base=base_fingerprint(recipe.model),
        provenance=certificate(weights=weights_of(recipe.model)),
    )
    return folder
