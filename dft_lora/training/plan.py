"""Everything about a run that can be decided, or refused, before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import Recipe, RolloutConfig, digest
from ..data.batches import Batch, Group, collate, epoch_order, ungrouped
from ..data.doctor import Finding, Found, check_data, check_rows, usable
from ..data.sources import Kind, Rows, judgeable, load_problems
from ..data.templates import Example, Renderer
from ..errors import DataError, RecipeError
from ..loss import REFERENCE_NEEDS, ObjectiveError, objective
from ..model.accelerator import default_device
from ..model.fingerprint import base_fingerprint
from ..model.limits import caps_logits, positions, refuse_long_answers, refuse_unknown_tokens
from ..model.load import held_on, load_model_config, load_tokenizer
from ..model.starts import CHANGES_BASE
from ..runs.folder import RunFolder
from ..tasks import judge_of
from ..tasks.base import Problem

FIRST_TOKENS = 2048
"""Those that `adapter.init: eva` looks at. Its time grows with them, and its rank cannot exceed them."""


@dataclass(frozen=True)
class Plan:
    """Examples in source order, the renderer that made them, and the objective.

    With `problems`, the run samples its own answers to them, and `examples` are their prompts alone.
    """

    recipe: Recipe
    renderer: Renderer
    objective: Any
    examples: list[Example]
    counts: dict[str, int]
    findings: list[Finding]
    steps: int
    """Optimizer steps: train.max_steps if given, else the number that train.epochs amounts to."""
    problems: Sequence[Problem] = ()

    @property
    def data_hash(self) -> str:
        return digest([example.ids for example in self.examples])

    @property
    def rollouts(self) -> RolloutConfig:
        return self.recipe.rollouts or RolloutConfig()

    @property
    def steps_each(self) -> int:
        """Optimizer steps that learn from the same rollout."""
        if self.objective.learns_from == "rollouts":
            return self.rollouts.updates
        return math.ceil(self.steps / self.rollouts.rounds)

    @property
    def sized(self) -> list[Example]:
        """Examples as long as those of the run can be, to measure memory by: the examples themselves, or the
        longest prompts with stand-ins for the longest answers."""
        if not self.problems:
            return self.examples
        longest = sorted(self.examples, key=lambda example: len(example.ids), reverse=True)
        answer = (self.renderer.eos_id,) * self.rollouts.max_new_tokens
        return [replace(e, ids=e.ids + answer) for e in longest[: self.recipe.train.batch_size]]

    @property
    def groups(self) -> list[Group]:
        """Preference pairs or single examples that steps draw from; with problems, of stand-ins (`sized`)."""
        if self.objective.learns_from != "pairs":
            return ungrouped(self.sized)
        return [(e, e) for e in self.sized] if self.problems else paired(self.sized)

    def first_batch(self) -> Batch:
        """The first FIRST_TOKENS tokens of the run: its examples, or prompts, in the first epoch's order."""
        groups = ungrouped(self.examples) if self.problems else self.groups
        order = epoch_order(len(groups), self.recipe.train.seed, epoch=0)
        rows: list[Example] = []
        left = FIRST_TOKENS
        for example in (example for i in order for example in groups[i]):
            if left <= 0:
                break
            rows.append(replace(example, ids=example.ids[:left]))
            left -= len(example.ids)
        return collate(rows, self.renderer.pad_id)


def objective_of(recipe: Recipe) -> Any:
    """The recipe's objective. Raises RecipeError for an unknown one, or a wrong number."""
    try:
        return objective(recipe.objective.name, **recipe.objective.numbers)
    except ObjectiveError as error:
        raise RecipeError(str(error)) from None


def make_plan(recipe: Recipe) -> Plan:
    """Read and render all data, and resolve every name in the recipe.

    Raises a RequestError that names what is wrong.
    """
    chosen = objective_of(recipe)
    kind = data_kind(recipe, chosen)
    if kind == "prompts":
        _check_rollouts(recipe, chosen)
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
    _check_teacher(recipe, chosen)
    if held_on(recipe.model, default_device()) is not recipe.model:
        recipe = recipe.override(["model.quantization=none"])
    base = load_model_config(recipe.model)
    if "reference_kl" in chosen.needs and caps_logits(base):
        raise RecipeError(
            f"objective.name: {chosen.name!r} needs the KL to the base, which cannot be exact for the "
            f"soft-capped logits of {recipe.model.name!r}; use dft or iw-sft, or another model.name"
        )
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    rows = load_problems(recipe.data, recipe.train.seed, kind)
    limit = recipe.data.max_length
    problems: list[Problem] = []
    if kind == "prompts":
        problems, rendered, (counts, findings) = _prompts(recipe, renderer, rows)
        examples = rendered
    else:
        rendered = renderer.render_all([p for p in rows.problems if p.solution is not None])
        counts, findings = check_data(rows, rendered, limit, recipe.evaluate.tasks, recipe.data)
        examples = _marked_pairs(rendered, limit) if kind == "pairs" else usable(rendered, limit)
    if not examples:
        raise DataError(
            f"data.source {recipe.data.source!r}: no example is left "
            f"({counts['over_long']} of {len(rendered)} are longer than data.max_length {limit})"
        )
    refuse_unknown_tokens([renderer.pad_id, *(max(e.ids) for e in examples)], base, renderer.tokenizer)
    plan = Plan(
        recipe, renderer, chosen, examples, counts, findings, _steps(recipe, kind, len(examples)), problems
    )
    _refuse_long_rows(plan, base)
    return plan


def _check_teacher(recipe: Recipe, chosen: Any) -> None:
    """Raises RecipeError for a missing or needless teacher, RequestError for one that cannot be used."""
    teacher = recipe.objective.teacher
    if teacher is None and chosen.toward is None:
        return
    if chosen.toward is None:
        raise RecipeError(f"objective.teacher: {chosen.name!r} has no teacher; leave it out")
    if teacher is None:
        raise RecipeError(
            f"objective.teacher: {chosen.name!r} needs one; name a finished run over the same base"
        )
    if recipe.train.shard or recipe.model.backend != "plain":
        where = "train.shard" if recipe.train.shard else f"model.backend {recipe.model.backend!r}"
        raise RecipeError(f"objective.teacher: not with {where}")
    run = RunFolder.open(teacher)
    if not (run.finished and run.has_adapter):
        raise RecipeError(f"objective.teacher: {teacher} has no adapter of a finished run")
    if run.base_fingerprint != base_fingerprint(recipe.model):
        raise RecipeError(
            f"objective.teacher: {teacher} has another base ({run.recipe().model.name}, revision "
            f"{run.recipe().model.revision}) than this recipe"
        )


def data_kind(recipe: Recipe, chosen: Any) -> Kind:
    """What the run reads: prompts, where it answers itself; else what its objective learns from."""
    if recipe.rollouts is not None or chosen.learns_from == "rollouts":
        return "prompts"
    return chosen.learns_from


def _steps(recipe: Recipe, kind: Kind, examples: int) -> int:
    """Optimizer steps: as given, or the number that takes each example, pair or answer train.epochs times."""
    answers = (recipe.rollouts or RolloutConfig()).samples
    count = {"solutions": examples, "pairs": examples // 2, "prompts": examples * answers}[kind]
    return recipe.train.max_steps or math.ceil(count * recipe.train.epochs / recipe.train.batch_size)


def _prompts(recipe: Recipe, renderer: Renderer, rows: Rows) -> tuple[list[Problem], list[Example], Found]:
    """Problems with a reference answer whose prompts fit, and these prompts."""
    limit = recipe.data.max_length
    counts, findings = check_rows(rows, recipe.evaluate.tasks, recipe.data, own_answers=True)
    asked = [(p, tuple(renderer.prompt_ids(p.messages))) for p in judgeable(rows, recipe.data)]
    fitting = [(p, Example(p.id, ids, len(ids))) for p, ids in asked if len(ids) <= limit]
    if over := tuple(p.id for p, ids in asked if len(ids) > limit):
        findings = [*findings, Finding(f"prompt longer than data.max_length {limit}: left out", over)]
    problems, prompts = [p for p, _ in fitting], [e for _, e in fitting]
    return problems, prompts, (counts | {"over_long": len(over), "examples": len(prompts)}, findings)


def paired(examples: Sequence[Example]) -> list[Group]:
    """Neighbours as groups of two."""
    return list(zip(examples[::2], examples[1::2], strict=True))


def _marked_pairs(rendered: list[Example], limit: int) -> list[Example]:
    """Both sides of each pair that fits, with the signal that says which side it is."""
    fitting = [pair for pair in paired(rendered) if len(usable(pair, limit)) == 2]
    return [example for pair in fitting for example in mark_pair(pair)]


def mark_pair(pair: Group) -> Group:
    """The chosen and the rejected example, with the signal `preference`."""
    signs = zip(pair, (1.0, -1.0), strict=True)
    return tuple(replace(example, signals={"preference": sign}) for example, sign in signs)


def _check_rollouts(recipe: Recipe, chosen: Any) -> None:
    """Raises RecipeError for settings that contradict answers of the model itself."""
    config, train, name = recipe.rollouts or RolloutConfig(), recipe.train, chosen.name
    judge_of(recipe.data.source).allowed(recipe.evaluate.allow_code)
    online = chosen.learns_from == "rollouts"
    if train.shard or recipe.model.backend != "plain":
        part = "train.shard" if train.shard else f"model.backend {recipe.model.backend!r}"
        raise RecipeError(
            f"{part}: not where a run samples its own answers; use model.backend: plain, unsharded"
        )
    if config.samples < chosen.least_samples:
        raise RecipeError(
            f"rollouts.samples: {name!r} compares answers to a problem; give {chosen.least_samples} or more"
        )
    if online and config.rounds > 1:
        raise RecipeError(f"rollouts.rounds: {name!r} always samples anew; leave it out")
    if not online and config.updates > 1:
        raise RecipeError(
            f"rollouts.updates: {name!r} is not an online objective; give rollouts.rounds instead"
        )
    answers = config.updates * train.batch_size
    if online and answers % config.samples:
        raise RecipeError(
            f"train.batch_size: rollouts.updates * train.batch_size = {answers} answers are not a multiple "
            f"of rollouts.samples {config.samples}"
        )
    if not online and train.max_steps is None:
        raise RecipeError(
            "train.max_steps: give it, since how many answers will be correct is not known before the run"
        )


def _refuse_long_rows(plan: Plan, base: Any) -> None:
    """Raises DataError if the model has too few positions for a row, or a prompt with its longest answer."""
    recipe, most = plan.recipe, positions(base)
    longest = max(len(example.ids) for example in plan.examples)
    if plan.problems:
        refuse_long_answers(longest, plan.rollouts.max_new_tokens, base, recipe.model.name)
    elif most is not None and longest > most:
        raise DataError(
            f"data.max_length {recipe.data.max_length}: a row has {longest} tokens, and "
            f"{recipe.model.name!r} has {most} positions; data.max_length: {most} leaves out longer rows"
        )
