"""The training run from start to end: plan, resume or begin, step, log, save, finish. Uses accelerate.

The details are elsewhere: a run's state in `trainer.py`, one step in `learner.py`, what may be resumed in
`resume_guard.py`, checkpoints in `checkpoints.py`, signals, bad numbers and memory in `faults.py`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

import torch

from ..config import Recipe
from ..data.doctor import findings_table
from ..errors import Interrupted
from ..loss.objectives import Dft, starves
from ..model.accelerator import accelerator
from ..model.backends import prepare
from ..model.hardware import Hardware
from ..runs.folder import RunFolder
from ..runs.plots import curves
from .checkpoints import Checkpoints, State, write_adapter
from .faults import SaveClock, StopSignals
from .plan import Plan, make_plan
from .probe import auto_micro_batch
from .ranks import Ranks
from .resume_guard import at_commit, guarded_fields, refuse_differences
from .trackers import begin, finish, track
from .trainer import Trainer

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool = False, extend: bool = False) -> RunFolder:
    """Train one adapter according to the recipe; returns its run folder.

    `resume` continues bit-exactly from the newest undamaged checkpoint, or from the start if the run was
    stopped before its first one. `extend` does so with a larger train.max_steps or train.epochs.

    Raises a RequestError before any model is loaded if the recipe, its data or the output folder cannot be
    used, or if the recipe differs from that of the run to resume. Raises Interrupted after SIGTERM or Ctrl-C,
    once a checkpoint is saved, and RunError if the run cannot continue.
    """
    prepare(recipe)
    plan = make_plan(at_commit(recipe, resume or extend))
    with StopSignals() as stop, RunFolder(recipe.output_dir).held():
        run = Run(plan, resume=resume, extend=extend)
        with run.trainer.progress_bar() as bar:
            while not run.complete:
                figures = run.step()
                if run.ranks.is_main:
                    show(bar, figures)
                if run.save_if_due(stop.asked) and not run.complete:
                    where = f"{run.folder.path}: stopped after step {run.trainer.done} of {plan.steps}"
                    raise Interrupted(where, stop.number)
        return run.finish()


class Run:
    """A run in its folder, new or resumed: `step` and `save_if_due` in turn until `complete`, then `finish`.

    `base`: what `load_base` returned, for a base that is in memory already. The errors are those of `train`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        resume: bool = False,
        extend: bool = False,
        base: tuple[Any, Hardware] | None = None,
    ):
        recipe = plan.recipe
        self.plan, self.folder = plan, RunFolder(recipe.output_dir)
        self.checkpoints = Checkpoints(self.folder.checkpoints, recipe.train.keep_checkpoints)
        self.ranks = ranks = Ranks(recipe)
        guarded = guarded_fields(plan, ranks.device, ranks.world)
        state = reopen(self.folder, self.checkpoints, guarded, extend) if resume or extend else None
        ranks.wait()  # all ranks have read before one of them writes
        if ranks.is_main and plan.findings:
            print(
                f"{recipe.data.source}: {plan.counts['rows']} rows\n{findings_table(plan.findings)}",
                file=sys.stderr,
            )
        if ranks.is_main and not ((resume or extend) and self.folder.begun):
            RunFolder.create(self.folder.path)
        accelerator(ranks.device).reset_peak()
        self.trainer = trainer = Trainer(plan, ranks, base=base, state=state)
        learner = trainer.learner
        if state is None and learner.finds_micro_batch:
            sizes = ranks.stack(torch.tensor(auto_micro_batch(learner, plan.groups)))
            learner.layout = replace(learner.layout, micro_batch_size=int(sizes.min()))
        if ranks.is_main:
            self.folder.cut_metrics(trainer.done)
            self.folder.write_run(
                **trainer.metadata(),
                **trainer.progress(),
                identity=guarded,
                **provenance(self.folder, trainer),
            )
            begin(ranks.accelerator, recipe.as_dict())
        self.clock = SaveClock(recipe.train.save_steps)

    @property
    def complete(self) -> bool:
        """Whether all steps were made."""
        return self.trainer.done >= self.plan.steps

    def step(self) -> dict[str, Any]:
        """Make the next optimizer step and log it; returns its line of `metrics.jsonl`."""
        figures = self.trainer.step(self.trainer.done)
        if self.ranks.is_main:
            warn_of_starved_ends(self.trainer, figures)
            if self.trainer.done % self.plan.recipe.train.logging_steps == 0 or self.complete:
                self.folder.log(figures)
                track(self.ranks.accelerator, figures)
        return figures

    def save_if_due(self, asked: bool = False) -> bool:
        """Save a checkpoint if one is asked for or due, or after the last step; returns whether any rank was
        asked."""
        asked, due = self.ranks.any(asked, self.clock.due(self.trainer.done))
        if asked or due or self.complete:
            save_checkpoint(self.folder, self.checkpoints, self.trainer)
            self.clock.saved()
        return asked

    def finish(self) -> RunFolder:
        """Write the final adapter, after the last step."""
        folder, trainer = self.folder, self.trainer
        trainer.check_weights()  # also for a run that was resumed after its last step
        if self.ranks.is_main:
            write_adapter(folder.adapter, trainer.learner.adapter_weights(), trainer.learner.adapter_config)
            folder.write_run(figures={"seconds": trainer.seconds, "last": folder.metrics()[-1]})
            curves({folder.name: folder}, folder.path / "curves.png")
            finish(self.ranks.accelerator)
        return folder


def reopen(folder: RunFolder, checkpoints: Checkpoints, now: dict[str, Any], extend: bool) -> State | None:
    """The state to resume from; None for a run that was stopped before its first checkpoint, or never began.

    Raises RequestError if the folder contains a different run, RunError if all checkpoints are damaged.
    """
    if not folder.begun:
        log.warning("%s: nothing to resume, starting a new run", folder.path)
        return None
    refuse_differences(folder.run().get("identity", {}), now, extend)
    state, skipped = checkpoints.newest()
    for damaged in skipped:
        log.warning("checkpoint skipped: %s", damaged)
    log.warning("%s: resuming after step %d", folder.path, state.step if state else 0)
    return state


def provenance(folder: RunFolder, trainer: Trainer) -> dict[str, Any]:
    """The provenance of the run, and of each time it was resumed."""
    before = folder.run() if folder.begun else {}
    if "provenance" not in before:
        return {"provenance": trainer.provenance()}
    return {"resumed": [*before.get("resumed", []), {"step": trainer.done, **trainer.provenance()}]}


def save_checkpoint(folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer) -> None:
    """Save a checkpoint. The metrics reach the disk first, so they cover every step of a checkpoint.

    Raises RunError if weights are not finite; earlier checkpoints stay.
    """
    trainer.check_weights()
    if trainer.ranks.is_main:
        folder.flush_metrics()
        folder.write_run(**trainer.progress())
    trainer.save(checkpoints)


def warn_of_starved_ends(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Say after the first step, whose forward pass is the base's, that answers will not learn to end."""
    p_end, wanted = figures["p_end"], trainer.plan.objective
    if trainer.done == 1 and p_end is not None and starves(trainer.learner.objective, p_end):
        log.warning(
            "the base expects the end token with p = %.4f, so %s gives it almost no weight and its answers "
            "may never end; remedies: %sobjective.floor=0.1 or objective.end=1 (dft-lora diagnose says more)",
            p_end,
            wanted.name,
            "" if isinstance(wanted, Dft) else "objective.name=dft with ",
        )


def show(bar: Any, figures: dict[str, Any]) -> None:
    """Update the progress bar."""
    shown = {"nll": figures["nll"], "p": figures["mean_probability"]}
    bar.set_postfix({k: "-" if v is None else f"{v:.3f}" for k, v in shown.items()}, refresh=False)
    bar.update()
