"""Runs that are evaluated or shown together: recipes, names, the renderer, and checks that they fit."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..config import ModelConfig, Recipe
from ..data.own_tasks import find_task
from ..data.templates import Renderer, shown
from ..errors import DataError, RequestError
from ..model.fingerprint import base_fingerprint
from ..model.load import load_tokenizer
from ..runs.folder import RunFolder
from ..tasks.base import Problem, Task
from .shots import shots_for

log = logging.getLogger(__name__)


def recipes_of(folders: Sequence[RunFolder], changes: Sequence[str]) -> list[Recipe]:
    """The runs' recipes with `changes` of the form `evaluate.field=value` or `field=value`."""
    for change in changes:
        section, dot, _ = change.partition("=")[0].partition(".")
        if dot and section in Recipe.model_fields and section != "evaluate":
            raise RequestError(f"--set {change!r}: an evaluation takes the fields of `evaluate` only")
    changes = [change if change.startswith("evaluate.") else f"evaluate.{change}" for change in changes]
    return [folder.recipe().override(changes) for folder in folders]


def asked_tasks(recipes: Sequence[Recipe], tasks: Sequence[str]) -> tuple[str, ...]:
    """`tasks`, or those of the first recipe if empty. Raises RequestError when that has none either."""
    if not (tasks or recipes[0].evaluate.tasks):
        raise RequestError("no task: give --task NAME, or evaluate.tasks in the recipe")
    return tuple(tasks) or recipes[0].evaluate.tasks


@dataclass(frozen=True)
class Asked:
    """A task, the problems of it that are asked, and the renderer of their prompts."""

    task: Task
    problems: list[Problem]
    renderer: Renderer


def asked_problems(
    names: Sequence[str], recipe: Recipe, renderer: Renderer, limit: int | None = None
) -> dict[str, Asked]:
    """The tasks of these names, or in these files, with at most `limit` problems each, by title.

    A task with a template of its own is asked with that one, unless evaluate.template names another. Raises
    RequestError for a task that needs a permission or an engine that the settings do not give, and for a test
    set that cannot be used.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"--limit: {limit}; give at least 1")
    settings = recipe.evaluate
    asked: dict[str, Asked] = {}
    for name in names:
        task = find_task(name, recipe.data).allowed(settings.allow_code)
        if task.file is not None and task.name in asked:
            raise RequestError(
                f"--task {name}: two test sets are named {task.name!r}; rename one of the files"
            )
        if task.by_likelihood:
            _needs_plain(name, "its choices", settings.engine)
        problems = task.problems()[:limit]
        if not problems:
            raise RequestError(f"--task {name}: the task has no problems")
        unjudged = sum(not task.judges(problem) for problem in problems)
        if unjudged:
            _needs_plain(name, "solutions of rows without a reference answer", settings.engine)
        own = task.template if settings.template == "same" else None
        its = Renderer(renderer.tokenizer, own) if own else renderer
        asked[task.name] = Asked(task, problems, its.after(shots_for(task, recipe)))
        if task.file is not None:
            _check_prompts(name, asked[task.name])
            if unjudged:
                log.warning(
                    "%s: %d of %d problems have no reference answer (data.answer names its column); their "
                    "solutions are scored, and nothing is sampled for them",
                    name,
                    unjudged,
                    len(problems),
                )
    return asked


def _needs_plain(name: str, scored: str, engine: str) -> None:
    if engine != "plain":
        raise RequestError(
            f"--task {name}: scores {scored}, which evaluate.engine {engine!r} cannot do; use plain"
        )


def _check_prompts(name: str, asked: Asked) -> None:
    """Raises RequestError for a row of an own test set that the template cannot write."""
    for problem in asked.problems:
        try:
            asked.renderer.prompt_text(problem.messages)
        except DataError as error:
            raise RequestError(f"--task {name}: {problem.id}: {error}") from None


def renderer_of(folders: Sequence[RunFolder], recipes: Sequence[Recipe]) -> Renderer:
    """The renderer for all runs: that of training, unless evaluate.template names another template.

    Raises RequestError when the training template now gives other token ids than it did in training.
    """
    wanted = recipes[0].evaluate.template
    tokenizer = load_tokenizer(recipes[0].model)
    for folder in folders:
        trained = folder.run()
        renderer = Renderer(tokenizer, trained["template"] if wanted == "same" else wanted)
        if wanted == "same" and renderer.fingerprint != trained["template_hash"]:
            raise RequestError(
                f"{folder.path}: template {shown(trained['template'])} gives other token ids now than in "
                "training (the tokenizer or the template changed); to evaluate anyway, name one with "
                "--set template=NAME"
            )
    return renderer


def same_base(folders: Sequence[RunFolder], recipes: Sequence[Recipe]) -> None:
    """Raises RequestError when the runs differ in their base or, where it matters, their template."""
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        mine, first = _weights(recipe), _weights(recipes[0])
        if differing := [field for field in mine if mine[field] != first[field]]:
            field = differing[0]
            raise RequestError(
                f"{folder.path} has another base than {folders[0].path} (model.{field} {mine[field]!r} and "
                f"{first[field]!r}); evaluate them separately"
            )
        if (
            recipe.evaluate.template == "same"
            and folder.run()["template_hash"] != folders[0].run()["template_hash"]
        ):
            raise RequestError(
                f"{folder.path} was trained with template {shown(folder.run()['template'])}, "
                f"{folders[0].path} with {shown(folders[0].run()['template'])}: name one with "
                "--set template=NAME"
            )


def same_settings(
    folders: Sequence[RunFolder], recipes: Sequence[Recipe], free: Collection[str] = ()
) -> None:
    """Raises RequestError when the runs' evaluation settings differ in a field that is not in `free`."""
    first = dict(recipes[0].evaluate)
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        differing = {k: v for k, v in dict(recipe.evaluate).items() if v != first[k] and k not in free}
        if differing:
            named = "; ".join(f"evaluate.{k} {first[k]!r} and {v!r}" for k, v in differing.items())
            raise RequestError(
                f"{folders[0].path} and {folder.path} have different settings: {named}; evaluate them "
                f"separately, or name one for all with --set {next(iter(differing))}=VALUE"
            )


def unchanged_base(folders: Sequence[RunFolder], config: ModelConfig) -> str:
    """The base's fingerprint. Raises RequestError when a run was made with other weights of the same name."""
    now = base_fingerprint(config)
    for folder in folders:
        if folder.base_fingerprint not in (None, now):
            raise RequestError(
                f"{folder.path}: the weights of its base {config.name!r} have changed since the run was "
                "made; restore them, or train the run again in another folder"
            )
    return now


def _weights(recipe: Recipe) -> dict[str, Any]:
    """The fields that determine a base's weights. `unpack` only decides how they are held in memory."""
    return recipe.model.model_dump(exclude={"unpack"})


def unique_names(folders: Sequence[RunFolder]) -> list[str]:
    """The folder names, made unique. They name adapters, so dots, which peft reads as module paths, go."""
    names: list[str] = []
    for folder in folders:
        name = candidate = folder.name.replace(".", "_")
        for number in count(2):
            if candidate not in names:
                break
            candidate = f"{name}-{number}"
        names.append(candidate)
    return names
