"""The training run as a story: plan, resume or begin, step, log, keep, finish. On accelerate.

What is left out here stands in a file of its own: a step in `learner.py`, what may be resumed in
`resume_guard.py`, checkpoints in `checkpoints.py`, signals, bad numbers and memory in `faults.py`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

from ..config import Recipe
from ..data.doctor import findings_table
from ..errors import Interrupted
from ..model.backends import prepare
from ..runs.folder import RunFolder
from ..runs.plots import curves
from .checkpoints import Checkpoints, State, write_adapter
from .faults import SaveClock, StopSignals
from .plan import make_plan
from .probe import auto_micro_batch
from .ranks import Ranks
from .resume_guard import guarded_fields, refuse_differences
from .trackers import begin, finish, track
from .trainer import Trainer

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool = False, extend: bool = False) -> RunFolder:
    """Train one adapter as the recipe says; returns its run folder.

    `resume` goes on, to the bit, from the newest whole checkpoint (from the start where the run was stopped
    before its first); `extend` does so with a larger train.max_steps or train.epochs.

    Raises a RequestError before any model is loaded when the recipe, its data or the output folder cannot be
    used, or the run to resume is another one; Interrupted after SIGTERM or Ctrl-C, with a checkpoint kept;
    RunError when the run cannot go on.
    """
    prepare(recipe)
    plan = make_plan(recipe)
    folder = RunFolder(recipe.output_dir)
    checkpoints = Checkpoints(folder.checkpoints, recipe.train.keep_checkpoints)
    with StopSignals() as stop:
        ranks = Ranks(recipe)
        guarded = guarded_fields(plan, ranks.device, ranks.world)
        state = reopen(folder, checkpoints, guarded, extend) if resume or extend else None
        ranks.wait()  # all have read before one writes
        if ranks.is_main and plan.findings:
            print(
                f"{recipe.data.source}: {plan.counts['rows']} rows\n{findings_table(plan.findings)}",
                file=sys.stderr,
            )
        if ranks.is_main and not ((resume or extend) and folder.begun):
            RunFolder.create(folder.path)
        trainer = Trainer(plan, ranks)
        learner = trainer.learner
        if state is not None:
            trainer.restore(state)
        elif learner.finds_micro_batch:
            learner.layout = replace(
                learner.layout, micro_batch_size=auto_micro_batch(learner, plan.examples)
            )
        if ranks.is_main:
            folder.cut_metrics(trainer.done)
            folder.write_run(
                **trainer.metadata(), **trainer.progress(), identity=guarded, **provenance(folder, trainer)
            )
            begin(ranks.accelerator, recipe.as_dict())
        clock = SaveClock(recipe.train.save_steps)
        with trainer.progress_bar() as bar:
            while trainer.done < plan.steps:
                figures = trainer.step(trainer.done)
                finished = trainer.done == plan.steps
                if ranks.is_main:
                    if trainer.done % recipe.train.logging_steps == 0 or finished:
                        folder.log(figures)
                        track(ranks.accelerator, figures)
                    show(bar, figures)
                asked, due = ranks.any(stop.asked, clock.due(trainer.done))
                if asked or due or finished:
                    save_checkpoint(folder, checkpoints, trainer)
                    clock.saved()
                if asked and not finished:
                    where = f"{folder.path}: stopped after step {trainer.done} of {plan.steps}"
                    raise Interrupted(where, stop.number)
        trainer.check_weights()  # of a run that was resumed at its end too
        if ranks.is_main:
            write_adapter(folder.adapter, learner.adapter_weights(), learner.adapter_config)
            folder.write_run(figures={"seconds": trainer.seconds, "last": folder.metrics()[-1]})
            curves({folder.name: folder}, folder.path / "curves.png")
            finish(ranks.accelerator)
    return folder


def reopen(folder: RunFolder, checkpoints: Checkpoints, now: dict[str, Any], extend: bool) -> State | None:
    """Where to go on; None for a run that was stopped before its first checkpoint, or before it began.

    Raises RequestError when the folder holds another run, RunError when no checkpoint is whole.
    """
    if not folder.begun:
        log.warning("%s: nothing to resume, starting", folder.path)
        return None
    refuse_differences(folder.run().get("identity", {}), now, extend)
    state, passed_over = checkpoints.newest()
    for damaged in passed_over:
        log.warning("checkpoint passed over: %s", damaged)
    log.warning("%s: going on after step %d", folder.path, state.step if state else 0)
    return state


def provenance(folder: RunFolder, trainer: Trainer) -> dict[str, Any]:
    """The run's birth certificate, and one more for each time it was resumed."""
    before = folder.run() if folder.begun else {}
    if "provenance" not in before:
        return {"provenance": trainer.provenance()}
    return {"resumed": [*before.get("resumed", []), {"step": trainer.done, **trainer.provenance()}]}


def save_checkpoint(folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer) -> None:
    """A checkpoint; the metrics reach the disk first, so that it never knows of a step that they do not.

    Raises RunError for weights that are not finite: the checkpoints before them stay.
    """
    trainer.check_weights()
    if trainer.ranks.is_main:
        folder.flush_metrics()
        folder.write_run(**trainer.progress())
    trainer.save(checkpoints)


def show(bar: Any, figures: dict[str, Any]) -> None:
    """Bring the progress bar up to date."""
    shown = {"nll": figures["nll"], "p": figures["mean_probability"]}
    bar.set_postfix({k: "-" if v is None else f"{v:.3f}" for k, v in shown.items()}, refresh=False)
    bar.update()
