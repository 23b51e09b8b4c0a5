"""The untrained base of a recipe as a run folder, so that it can be evaluated like any other run."""

from __future__ import annotations

from pathlib import Path

from ..config import Recipe
from ..data.templates import Renderer
from ..model.accelerator import default_device
from ..model.fingerprint import base_fingerprint
from ..model.load import held_on, hub_commit, load_tokenizer, weights_of
from ..runs.folder import RunFolder
from ..runs.provenance import certificate


def base_run(recipe: Recipe, path: str | Path) -> RunFolder:
    """Create a run folder without an adapter for the recipe's base. Raises RequestError if `path` exists."""
    folder = RunFolder.create(path)
    recipe = recipe.model_copy(update={"model": held_on(recipe.model, default_device())})
    recipe = recipe.at_revision(hub_commit(recipe.model))
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    folder.write_run(
        recipe=recipe.model_copy(update={"name": folder.name, "output": str(path)}).as_dict(),
        template=renderer.template.name,
        template_hash=renderer.fingerprint,
        base=base_fingerprint(recipe.model),
        provenance=certificate(weights=weights_of(recipe.model)),
    )
    return folder
