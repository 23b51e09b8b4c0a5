"""What must be unchanged for a run to be resumed: recipe, data, template, base, dtype, ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import Recipe, RolloutConfig, digest
from ..errors import RequestError
from ..model.fingerprint import base_fingerprint
from ..model.hardware import dtype_name
from ..model.load import hardware_of, hub_commit
from ..runs.folder import RunFolder
from .plan import Plan

FREE = (
    "name",
    "output",
    "evaluate.",
    "model.revision",  # the base's fingerprint is compared
    "model.unpack",
    "train.save_steps",
    "train.keep_checkpoints",
    "train.logging_steps",
    "train.offload_activations",
    "train.trackers",
)
"""Recipe fields that do not affect the training steps."""
LENGTH = ("train.max_steps", "train.epochs")
"""Fields that determine the number of steps, which is compared instead of them."""
ROUND = "steps per rollout"
"""Compared too: with other steps, a run with `rollouts.rounds` would begin its rounds elsewhere."""

ANSWERS = "reference answers"
"""Compared where a run samples its own answers, which are judged by them."""


def at_commit(recipe: Recipe, resume: bool) -> Recipe:
    """The recipe with its base's commit as revision, where the base is on the Hub.

    A run to resume stays at its commit, unless the recipe names a revision.
    """
    folder, model = RunFolder(recipe.output_dir), recipe.model
    if resume and folder.begun and model.revision is None:
        before = folder.recipe().model
        if (before.name, before.gguf) == (model.name, model.gguf) and before.revision is not None:
            return recipe.at_revision(before.revision)
    return recipe.at_revision(hub_commit(model))


def guarded_fields(plan: Plan, device: torch.device, processes: int) -> dict[str, Any]:
    """The values that a resumed run must share with the stopped one, flat, by name.

    The dtype is the resolved one: `auto` differs between GPUs.
    """
    config = plan.recipe.model
    hardware = hardware_of(config, device)
    fields = {
        name: value
        for name, value in _flat(plan.recipe.as_dict()).items()
        if not name.startswith(FREE) and name not in LENGTH and name != "model.dtype"
    }
    if plan.problems:
        fields[ROUND] = plan.steps_each
        fields[ANSWERS] = digest([problem.answer for problem in plan.problems])
    if teacher := plan.recipe.objective.teacher:
        fields["objective.teacher"] = RunFolder(teacher).adapter_digest
    return fields | {
        "steps": plan.steps,
        "data": plan.data_hash,
        "template": plan.renderer.fingerprint,
        "base": base_fingerprint(config),
        "dtype": dtype_name(hardware.dtype),
        "processes": processes,
    }


def refuse_differences(before: Mapping[str, Any], now: Mapping[str, Any], extend: bool) -> None:
    """Raises RequestError listing what changed. With `extend`, more steps are allowed.

    A recipe field that an earlier version did not have counts as its default: so the run was made.
    """
    sampled = before.get(ROUND) is not None or any(name.startswith("rollouts.") for name in before)
    defaults = _flat(Recipe(rollouts=RolloutConfig() if sampled else None).as_dict())
    defaults = {name: value for name, value in defaults.items() if name in now}
    defaults |= {name: now.get(name) for name in (ROUND, ANSWERS)}  # nor did it record these
    before = defaults | {name: value for name, value in before.items() if not name.startswith(FREE)}
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    if extend and now["steps"] > before.get("steps", 0):
        changed.discard("steps")
    if not changed:
        return
    lines = [f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in sorted(changed)]
    if changed == {"steps"} and now["steps"] > before["steps"]:
        remedy = "a longer run needs --extend"
    else:
        remedy = "change them back, or start a new run in another folder"
    raise RequestError(f"--resume: this is not the same run: {'; '.join(lines)}; {remedy}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 42 else f"{text[:17]}…"
