"""Everything about a run that can be decided, or refused, before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..config import Recipe, digest
from ..data.doctor import Finding, check_data, usable
from ..data.sources import load_problems
from ..data.templates import Example, Renderer
from ..errors import DataError, RecipeError
from ..loss import REFERENCE_NEEDS, ObjectiveError, objective
from ..model.limits import caps_logits, positions, refuse_unknown_tokens
from ..model.load import load_model_config, load_tokenizer
from ..model.starts import CHANGES_BASE


@dataclass(frozen=True)
class Plan:
    """Examples in source order, the renderer that made them, and the objective."""

    recipe: Recipe
    renderer: Renderer
    objective: Any
    examples: list[Example]
    counts: dict[str, int]
    findings: list[Finding]
    steps: int
    """Optimizer steps: train.max_steps if given, else the number that train.epochs amounts to."""

    @property
    def data_hash(self) -> str:
        return digest([example.ids for example in self.examples])


def make_plan(recipe: Recipe) -> Plan:
    """Read and render all data, and resolve every name in the recipe.

    Raises a RequestError that names what is wrong.
    """
    try:
        chosen = objective(recipe.objective.name, **recipe.objective.numbers)
    except ObjectiveError as error:
        raise RecipeError(str(error)) from None
    if recipe.train.skip_rows and chosen.token_weight is None:
        raise RecipeError(
            f"train.skip_rows needs an objective whose weight depends only on the token's probability, "
            f"which {chosen.name!r} is not; set it to 0"
        )
    if chosen.needs & REFERENCE_NEEDS and recipe.adapter.init in CHANGES_BASE:
        raise RecipeError(
            f"adapter.init: {recipe.adapter.init} changes the base that {chosen.name!r} compares with; use "
            "default, or another objective"
        )
    base = load_model_config(recipe.model)
    if "reference_kl" in chosen.needs and caps_logits(base):
        raise RecipeError(
            f"objective.name: {chosen.name!r} needs the KL to the base, which cannot be exact for the "
            f"soft-capped logits of {recipe.model.name!r}; use dft or iw-sft, or another model.name"
        )
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    rows = load_problems(recipe.data, recipe.train.seed)
    limit = recipe.data.max_length
    rendered = [renderer.render(problem) for problem in rows.problems if problem.solution is not None]
    counts, findings = check_data(rows, rendered, limit, recipe.evaluate.tasks)
    examples = usable(rendered, limit)
    if not examples:
        raise DataError(
            f"data.source {recipe.data.source!r}: no example is left "
            f"({counts['over_long']} of {len(rendered)} are longer than data.max_length {limit})"
        )
    refuse_unknown_tokens([renderer.pad_id, *(max(e.ids) for e in examples)], base, renderer.tokenizer)
    _refuse_long_rows(recipe, examples, positions(base))
    one_pass = math.ceil(len(examples) * recipe.train.epochs / recipe.train.batch_size)
    steps = recipe.train.max_steps or one_pass
    return Plan(recipe, renderer, chosen, examples, counts, findings, steps)


def _refuse_long_rows(recipe: Recipe, examples: list[Example], most: int | None) -> None:
    """Raises DataError if a row has more tokens than the model has positions."""
    longest = max(len(example.ids) for example in examples)
    if most is not None and longest > most:
        raise DataError(
            f"data.max_length {recipe.data.max_length}: a row has {longest} tokens, and "
            f"{recipe.model.name!r} has {most} positions; data.max_length: {most} leaves out longer rows"
        )
