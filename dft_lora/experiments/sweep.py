"""Sweeps: train every combination of some recipe fields on the same data, and compare the runs.

    recipe: tiny_dft                       # a file, or a shipped recipe
    set: {train.max_steps: 60}             # changes to it, for all runs
    grid:                                  # the product of these is trained
      objective.name: [sft, dft]
      train.learning_rate: [5.0e-4, 2.0e-3]
    task: arithmetic-validation            # selects the best runs; never the set that is reported later
    output: runs/sweep

Each run is an ordinary run folder. Starting a stopped sweep again resumes it: finished runs are kept if
recipe and data are the same, and an unfinished run resumes from its checkpoint. The report names the best
setting of each objective by sampled accuracy; objectives are not compared by their losses or at a single
learning rate.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ..config import Part, Recipe, load_recipe, read_yaml_file, setting
from ..errors import Interrupted, RecipeError
from ..runs.folder import RunFolder, write_json, write_text
from ..tasks import get_task
from . import CONTINUES

if TYPE_CHECKING:
    from ..evaluation.task_results import TaskResults


class Sweep(Part):
    """A sweep file."""

    recipe: str
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = Field(min_length=1)
    task: str
    limit: int | None = Field(None, ge=1)
    """Use only the first problems of the task."""
    output: str = "runs/sweep"

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep file. Raises RecipeError naming the wrong field."""
        values = read_yaml_file(Path(path), f"--sweep {path}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise RecipeError(f"--sweep {path}: {field}: {first['msg']}") from None

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every run, by name. Raises RecipeError for an invalid field or value."""
        from ..training.plan import objective_of

        for field, values in self.grid.items():
            if not values:
                raise RecipeError(f"grid.{field}: no values; give at least one")
            section = field.partition(".")[0]
            if section == "data" or field in ("train", "train.seed"):
                raise RecipeError(
                    f"grid.{field}: the runs of a sweep see the same data in the same order; remove the field"
                )
            if section == "evaluate":
                raise RecipeError(
                    f"grid.{field}: the runs of a sweep are evaluated alike; put it under 'set'"
                )
            if section == "model" and field != "model.unpack":
                raise RecipeError(
                    f"grid.{field}: the runs of a sweep share a base, so that they can be compared; put it "
                    "under 'set'"
                )
        fixed = [setting(field, value) for field, value in self.set.items()]
        found: dict[str, Recipe] = {}
        for values in product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            name = "-".join(_label(field, value) for field, value in chosen.items())
            if name in found:
                raise RecipeError(f"grid: two runs would be named {name!r}; name each value once")
            changes = [setting(field, value) for field, value in chosen.items()]
            where = [
                setting("name", name),
                setting("output", str(Path(self.output, name))),
                setting("evaluate.tasks", [self.task]),
            ]
            found[name] = load_recipe(self.recipe, [*fixed, *changes, *where])
            objective_of(found[name])
        return found


def run_sweep(sweep: Sweep) -> dict[str, Any]:
    """Train the missing runs, evaluate all in the same batches, and write sweep.json and sweep.md.

    Raises a RequestError before training when the task, a field or a finished run does not fit.
    """
    from ..evaluation.evaluate import evaluate
    from ..evaluation.task_results import TaskResults

    get_task(sweep.task)
    recipes = sweep.recipes()
    try:
        folders = [train_once(recipe) for recipe in recipes.values()]
        evaluate([folder.path for folder in folders], limit=sweep.limit)
    except Interrupted as stop:
        raise stop.and_then(CONTINUES) from None
    results = {
        name: TaskResults.read(folder, sweep.task) for name, folder in zip(recipes, folders, strict=True)
    }
    report = summary(sweep, recipes, results)
    write_json(Path(sweep.output, "sweep.json"), report)
    write_text(Path(sweep.output, "sweep.md"), sweep_markdown(report))
    return report


def train_once(recipe: Recipe) -> RunFolder:
    """Train the recipe unless its folder contains the finished run; an unfinished run is resumed.

    Raises RequestError when the folder contains a run of another recipe or on other data.
    """
    from ..training.loop import train
    from ..training.ranks import Ranks
    from ..training.resume_guard import guarded_fields, refuse_differences

    folder = RunFolder(recipe.output_dir)
    if not (folder.has_adapter and folder.finished):
        return train(recipe, resume=folder.begun)
    ranks = Ranks(recipe)
    now = guarded_fields(_plan(recipe), ranks.device, ranks.world)
    refuse_differences(folder.run()["identity"], now, extend=False)
    print(f"{folder.path}: already trained", file=sys.stderr)
    return folder


_plans: dict[tuple[Any, ...], Any] = {}


def _plan(recipe: Recipe) -> Any:
    """`make_plan`, with the data rendered only once (a second or two) for all runs that share it."""
    from ..training.plan import data_kind, make_plan, objective_of

    if recipe.train.max_steps is None:
        return make_plan(recipe)
    chosen = objective_of(recipe)
    kind = data_kind(recipe, chosen)
    seed = recipe.data.sample and recipe.train.seed
    key = (recipe.model, recipe.data, recipe.evaluate.tasks, seed, kind)
    if key not in _plans:
        _plans[key] = make_plan(recipe)
    plan = _plans[key]
    recipe = recipe.model_copy(update={"model": plan.recipe.model})  # as this device can hold it
    return replace(plan, recipe=recipe, objective=chosen, steps=recipe.train.max_steps)


def summary(
    sweep: Sweep, recipes: Mapping[str, Recipe], results: Mapping[str, TaskResults]
) -> dict[str, Any]:
    """All runs with their results, the best of each objective, and these compared with each other."""
    from ..evaluation import statistics as st
    from ..evaluation.report import paired
    from ..runs.provenance import certificate

    protocols = {name: result.protocol for name, result in results.items()}
    scores = {name: st.avg_at_n(result.correct_PS) for name, result in results.items()}
    runs = {
        name: {
            "objective": recipe.objective.name,
            "fields": {field: _value(recipe, field) for field in sweep.grid},
            **results[name].summary(),
        }
        for name, recipe in recipes.items()
    }
    best: dict[str, str] = {}
    for name, run in runs.items():
        if run["objective"] not in best or run["avg"] > runs[best[run["objective"]]]["avg"]:
            best[run["objective"]] = name
    bests = list(best.values())
    pairs = [
        {"a": a, "b": b, **paired(st.compare(scores[a], scores[b]))}
        for i, a in enumerate(bests)
        for b in bests[i + 1 :]
    ]
    for pair, adjusted in zip(pairs, st.holm([p["p_value"] for p in pairs]) if pairs else [], strict=True):
        pair["p_holm"] = float(adjusted)
    return {
        "task": sweep.task,
        "protocol": {k: v for k, v in next(iter(protocols.values())).items() if k != "adapter"},
        "runs": runs,
        "best": best,
        "paired": pairs,
        "provenance": certificate(),
    }


def sweep_markdown(report: Mapping[str, Any]) -> str:
    """sweep.md: every run, then the best run of each objective compared with the others."""
    from ..evaluation.text import aligned, percent, points

    fields = list(next(iter(report["runs"].values()))["fields"])
    rows = [
        [
            *(f"{run['fields'][field]}" for field in fields),
            percent(run["avg"]),
            f"{percent(run['ci95'][0])} to {percent(run['ci95'][1])}",
            percent(run["greedy"]),
            "best" if report["best"][run["objective"]] == name else "",
        ]
        for name, run in report["runs"].items()
    ]
    first = next(iter(report["runs"].values()))
    parts = [
        "# Sweep",
        f"Evaluated on {report['task']}: {first['problems']} problems, {first['samples']} samples each. "
        "Choosing the best of several runs biases its accuracy upwards: report it on another set.",
        aligned([*fields, "avg@n", "95 % interval", "greedy", "of its objective"], rows),
    ]
    if report["paired"]:
        rows = [
            [
                f"{p['b']} - {p['a']}",
                points(p["difference"]),
                f"{points(p['ci95'][0])} to {points(p['ci95'][1])}",
                f"{p['p_holm']:.4f}",
                "noise" if p["noise"] else "",
            ]
            for p in report["paired"]
        ]
        parts.append(aligned(["each at its own best", "sampled", "95 % interval", "p (Holm)", ""], rows))
    return "\n\n".join(parts) + "\n"


def _label(field: str, value: Any) -> str:
    """Part of a run's name: the value, preceded by the last part of the field's name if it is a number."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = re.sub(r"[^\w.,=+-]+", "_", text)  # it becomes part of a folder name
    return text if isinstance(value, str) and not _number(value) else f"{field.rpartition('.')[2]}={text}"


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value(recipe: Recipe, field: str) -> Any:
    value: Any = recipe.as_dict()
    for key in field.split("."):
        value = value[key]
    return value
