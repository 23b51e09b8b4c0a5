"""The training loop: one file, top to bottom, on accelerate.

`train` is the story; what can go wrong in it is told in `faults.py` (signals, bad numbers, memory),
`checkpoints.py` and `identity.py` (what may be resumed), by name.

One step: `batch_size` examples -> micro-batches of similar length -> h_BLD by a hook -> logp_M
from the chunked loss -> objective, a sum over tokens -> divided once by the supervised tokens of
the whole step over all micro-batches and ranks -> clip -> AdamW. How the examples are split
over micro-batches or ranks therefore does not change the step.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ..config import Recipe
from ..data.batches import Batch, step_examples
from ..data.doctor import table
from ..data.templates import Example
from ..errors import Interrupted, RunError
from ..loss import REFERENCE_NEEDS, TokenScores, chunk_rows, token_logps
from ..model.attention import choose_arrangement
from ..model.backends import build, prepare
from ..model.hardware import peak_memory_mb
from ..model.load import weights_of
from ..model.memory import give_back_large_blocks
from ..model.sharding import held_mb
from ..plots import curves
from ..provenance import certificate
from ..run_folder import RunFolder
from .checkpoints import Checkpoints, State, random_state, set_random_state, write_adapter
from .faults import (
    RETREATS,
    Layout,
    SaveClock,
    Skips,
    StopSignals,
    out_of_memory_text,
    ran_out_of_memory,
)
from .figures import Sums, Totals, finite
from .identity import identity, refuse_differences
from .optimizer import make_optimizer, schedule
from .plan import Plan, make_plan
from .preflight import auto_micro_batch
from .ranks import Ranks
from .trackers import begin, finish, track

AUTO_MICRO_BATCH = 4

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
        itself = identity(plan, ranks.device, ranks.world)
        state = reopen(folder, checkpoints, itself, extend) if resume or extend else None
        ranks.wait()  # all have read before one writes
        if ranks.is_main and plan.findings:
            print(
                f"{recipe.data.source}: {plan.counts['rows']} rows\n{table(plan.findings)}", file=sys.stderr
            )
        if ranks.is_main and not ((resume or extend) and folder.begun):
            RunFolder.create(folder.path)
        trainer = Trainer(plan, ranks)
        if state is not None:
            trainer.restore(state)
        elif trainer.finds_micro_batch:
            trainer.layout = replace(trainer.layout, micro_batch_size=auto_micro_batch(trainer))
        if ranks.is_main:
            folder.cut_metrics(trainer.done)
            folder.write_run(
                **trainer.facts(), **trainer.standing(), identity=itself, **birth(folder, trainer)
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
                    keep(folder, checkpoints, trainer)
                    clock.saved()
                if asked and not finished:
                    where = f"{folder.path}: stopped after step {trainer.done} of {plan.steps}"
                    raise Interrupted(where, stop.number)
        if ranks.is_main:
            write_adapter(folder.adapter, trainer.adapter_weights(), trainer.adapter_config)
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


def birth(folder: RunFolder, trainer: Trainer) -> dict[str, Any]:
    """The run's birth certificate, and one more for each time it was resumed."""
    before = folder.run() if folder.begun else {}
    if "provenance" not in before:
        return {"provenance": trainer.certificate()}
    return {"resumed": [*before.get("resumed", []), {"step": trainer.done, **trainer.certificate()}]}


def keep(folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer) -> None:
    """A checkpoint; the metrics reach the disk first, so that it never knows of a step that they do not."""
    if trainer.ranks.is_main:
        folder.flush_metrics()
        folder.write_run(**trainer.standing())
    trainer.save(checkpoints)


class Trainer:
    """A model, its optimizer, the step between them, and where they stand: `done` steps."""

    def __init__(self, plan: Plan, ranks: Ranks):
        self.plan, self.recipe, self.ranks = plan, plan.recipe, ranks
        self.accelerator = ranks.accelerator
        if ranks.device.type == "cpu":
            give_back_large_blocks()
        built = build(self.recipe, ranks.device)
        self.head, self.hardware, self.checkpointing = built.head, built.hardware, built.checkpointing
        self.hidden_states, model = built.hidden_states, built.model
        self.arrange = choose_arrangement(self.recipe.data, model, alike=self.recipe.train.shard)
        model.train()
        self.adapter_model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Gradients are added up once a step, by `Ranks`: DDP only makes sure that all begin alike.
        shared = self.recipe.train.shard
        self.model = model if shared else self.accelerator.prepare(model)
        self.apart = ranks.together if shared else partial(self.accelerator.no_sync, self.model)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.trainable, self.recipe))
        torch.manual_seed(self.recipe.train.seed + self.ranks.rank)  # dropout differs between ranks
        size = self.recipe.train.micro_batch_size
        chunk_mb = self.recipe.train.loss_chunk_mb
        self.layout = Layout(
            min(self.recipe.train.batch_size, AUTO_MICRO_BATCH) if size == "auto" else size,
            chunk_mb and chunk_mb * 2**20,
        )
        self.retreats: list[dict[str, Any]] = []
        self.skips = Skips()
        self.done, self.seconds = 0, 0.0

    @property
    def finds_micro_batch(self) -> bool:
        """Whether `micro_batch_size: auto` is measured: on a GPU that need not keep step with others."""
        settings = self.recipe.train
        return settings.micro_batch_size == "auto" and self.ranks.device.type == "cuda" and not settings.shard

    def step(self, step: int) -> dict[str, Any]:
        """Run optimizer step `step` (from 0); returns its line of `metrics.jsonl`."""
        started = time.perf_counter()
        settings, plan = self.recipe.train, self.plan
        chosen = [
            plan.examples[i]
            for i in step_examples(len(plan.examples), settings.batch_size, settings.seed, step)
        ]
        supervised = sum(example.supervised for example in chosen)
        learning_rate = settings.learning_rate * schedule(
            step, plan.steps, settings.warmup, settings.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        sums, suspects = self.accumulate(chosen, supervised)
        grad_norm, changed, sound = self.update(sums.loss)
        self.done, seconds = step + 1, time.perf_counter() - started
        self.seconds += seconds
        ids = suspects or [example.id for example in chosen]
        self.skips.note(sound, self.done, dtype_name(self.hardware.dtype), ids)
        scored = max(1, sums.scored)
        skip = {"skipped_rows": int(sums.skipped_rows), "skip_bound": sums.skip_bound / max(1, supervised)}
        return {
            "step": self.done,
            "loss": finite(sums.loss / max(1, supervised)),
            "nll": finite(sums.nll / scored),
            "mean_probability": finite(sums.probability / scored),
            "entropy": finite(sums.entropy / scored),
            "top1": finite(sums.top1 / scored),
            "learning_rate": learning_rate,
            "grad_norm": finite(grad_norm),
            "skipped": not changed,
            "tokens": int(sums.tokens),
            "padding": 1 - sums.tokens / sums.positions,
            "supervised_tokens": supervised,
            "seconds": seconds,
            "tokens_per_second": sums.tokens / seconds,
            "peak_memory_mb": peak_memory_mb(self.ranks.device),
            **(skip if settings.skip_rows else {}),
        }

    def accumulate(self, chosen: Sequence[Example], supervised: int) -> tuple[Totals, list[str]]:
        """Gradients of the whole step, added up over micro-batches and ranks; totals and suspect examples.

        Where one rank runs out of memory all of them do the step again in smaller pieces.
        """
        mine, random = chosen[self.ranks.rank :: self.ranks.world], random_state(self.ranks.device)
        while True:
            batches = self.arrange(mine, self.layout.micro_batch_size, self.plan.renderer.pad_id)
            sums = Sums(self.ranks.device)

            def run(batches=batches, sums=sums) -> None:
                for batch in batches:
                    with self.apart():
                        loss = self.score(batch, sums)
                        self.accelerator.backward(loss / max(1, supervised))

            failed = ran_out_of_memory(run)
            if failed and self.recipe.train.shard:  # the others wait for this one's part of a layer
                raise RunError(self.out_of_memory(batches, passed=len(sums.parts)))
            *values, failures = self.ranks.sum(
                torch.cat([sums.values, sums.values.new_tensor([failed])])
            ).tolist()
            if not failures:
                self.ranks.sum_gradients(self.trainable)
                return Totals(*values), sums.suspects()
            self.optimizer.zero_grad()
            set_random_state(random, self.ranks.device)
            self.retreat(batches, passed=len(sums.parts))

    def retreat(self, batches: Sequence[Batch], passed: int) -> None:
        """Cut the step into smaller pieces. Raises RunError when that was done often enough, or cannot be."""
        weight_VD = self.head.weight_VD
        widest = max(batch.supervised for batch in batches)
        rows = chunk_rows(weight_VD, len(weight_VD), widest, self.layout.chunk_bytes)
        row_bytes = len(weight_VD) * weight_VD.element_size()
        smaller = self.layout.smaller(min(rows, max(1, widest)), row_bytes, first=not self.retreats)
        if smaller is None or len(self.retreats) == RETREATS:
            raise RunError(self.out_of_memory(batches, passed))
        self.layout = smaller
        self.retreats.append({"step": self.done + 1, **asdict(smaller)})
        log.warning("step %d ran out of memory; doing it again with %s", self.done + 1, smaller)

    def out_of_memory(self, batches: Sequence[Batch], passed: int) -> str:
        sizes = [tuple(batch.input_ids_BL.shape) for batch in batches]
        return out_of_memory_text(self.layout, sizes, passed, self.checkpointing)

    def update(self, loss: float) -> tuple[float, bool, bool]:
        """Clip and step; gradient norm, whether the weights changed, whether all numbers were sound.

        Nothing changes where loss or gradient is not finite. With loss scaling (float16) a gradient that
        overflows is normal work: the scaler skips the step and halves its scale. At a scale of 1 it is not.
        """
        scaler, norm, scaling = self.ranks.scaler, math.nan, False
        if math.isfinite(loss):
            norm = float(self.accelerator.clip_grad_norm_(self.trainable, self.recipe.train.max_grad_norm))
            scaling = scaler is not None and scaler.get_scale() > 1
            if (math.isfinite(norm) or scaler is not None) and ran_out_of_memory(self.optimizer.step):
                raise RunError(
                    "out of memory in the optimizer: train.optimizer: adamw8bit or a smaller adapter.r fits"
                )
        self.optimizer.zero_grad()
        changed = math.isfinite(norm)
        return norm, changed, changed or scaling

    def score(self, batch: Batch, sums: Sums) -> torch.Tensor:
        """The objective's sum over a micro-batch, connected to the graph; adds its figures to `sums`."""
        objective, device = self.plan.objective, self.ranks.device
        targets_BL = batch.labels_BL[:, 1:].to(device)

        def scores_of(model: Any, **more: Any) -> TokenScores:
            h_BLD = self.hidden_states(model, **batch.inputs(device))[:, :-1]
            return token_logps(
                h_BLD.flatten(0, 1).to(self.head.weight_VD.dtype),
                targets=targets_BL.flatten(),
                **self.head.arguments(),
                chunk_bytes=self.layout.chunk_bytes,
                check_values=False,  # `update` looks at the loss, once a step
                **more,
            )

        reference = None
        if objective.needs & REFERENCE_NEEDS:  # the base itself: adapter off, no second model
            with torch.no_grad(), self.adapter_model.disable_adapter():
                reference = scores_of(self.adapter_model, keep_jacobian=True)
        scores = scores_of(
            self.model,
            needs=objective.needs,
            sequence=batch.examples_BL[:, 1:].to(device).flatten(),
            reference=reference,
            skip=self.recipe.train.skip_rows,
            token_weight=objective.token_weight if self.recipe.train.skip_rows else None,
        )
        loss = objective(scores)
        sums.add(loss, scores, batch)
        return loss

    def save(self, checkpoints: Checkpoints) -> None:
        """Keep where the run stands. All ranks call it; the first one writes."""
        random = self.ranks.stack(random_state(self.ranks.device))
        if self.ranks.is_main:
            progress = {
                "layout": asdict(self.layout),
                "retreats": self.retreats,
                "skips": asdict(self.skips),
                "loss_scale": self.ranks.scaler and self.ranks.scaler.state_dict(),
                "seconds": self.seconds,
            }
            state = State(self.done, self.adapter_weights(), self.optimizer.state_dict(), random, progress)
            checkpoints.save(state, self.adapter_config)
        self.ranks.wait()

    def restore(self, state: State) -> None:
        """Stand where `state` was taken. Raises RunError when it is of another adapter."""
        from peft import set_peft_model_state_dict

        shapes = [{name: w.shape for name, w in ws.items()} for ws in (state.adapter, self.adapter_weights())]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"the checkpoint of step {state.step} holds other adapter weights than this run has"
            )
        set_peft_model_state_dict(self.adapter_model, state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        set_random_state(state.random[self.ranks.rank], self.ranks.device)
        progress = state.progress
        self.layout, self.retreats = Layout(**progress["layout"]), progress["retreats"]
        self.skips = Skips(**progress["skips"])
        if progress["loss_scale"]:
            self.ranks.scaler.load_state_dict(progress["loss_scale"])
        self.done, self.seconds = state.step, progress["seconds"]

    @property
    def adapter_config(self) -> Any:
        return self.adapter_model.peft_config["default"]

    def adapter_weights(self) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.adapter_model, save_embedding_layers=False)

    def facts(self) -> dict[str, Any]:
        """What `run.json` records before the first step."""
        plan = self.plan
        return {
            "recipe": self.recipe.as_dict(),
            "template": plan.renderer.template.name,
            "template_hash": plan.renderer.fingerprint,
            "data_hash": plan.data_hash,
            "data": plan.counts,
            "findings": [asdict(finding) | {"rows": finding.rows[:100]} for finding in plan.findings],
            "steps": plan.steps,
            "gradient_checkpointing": self.checkpointing,
            "arrangement": getattr(self.arrange, "__name__", repr(self.arrange)),
            "trainable_parameters": sum(parameter.numel() for parameter in self.trainable),
            "frozen_mb": held_mb(self.adapter_model),
        }

    def standing(self) -> dict[str, Any]:
        """What `run.json` records at every checkpoint: the settings that worked, and what did not."""
        return {
            "micro_batch_size": self.layout.micro_batch_size,
            "loss_chunk_bytes": self.layout.chunk_bytes,
            "retreats": self.retreats,
            "skipped_steps": self.skips.total,
        }

    def certificate(self) -> dict[str, Any]:
        return certificate(
            device=self.hardware.name,
            dtype=dtype_name(self.hardware.dtype),
            weights=weights_of(self.recipe.model),
            processes=self.ranks.world,
            seed=self.recipe.train.seed,
        )

    def progress_bar(self) -> Any:
        from tqdm import tqdm

        name, done = self.recipe.output_dir.name, self.done
        return tqdm(
            total=self.plan.steps, initial=done, desc=name, unit="step", disable=not self.ranks.is_main
        )


def show(bar: Any, figures: dict[str, Any]) -> None:
    """Bring the progress bar up to date."""
    shown = {"nll": figures["nll"], "p": figures["mean_probability"]}
    bar.set_postfix({k: "-" if v is None else f"{v:.3f}" for k, v in shown.items()}, refresh=False)
    bar.update()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
