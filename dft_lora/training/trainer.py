"""The state of a run: its plan, its learner, and what a checkpoint must contain to resume bit-exactly."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from ..data.batches import examples_of
from ..errors import RunError
from ..model.accelerator import accelerator
from ..model.hardware import Hardware, dtype_name
from ..model.load import weights_of
from ..model.memory import MIB
from ..model.sharding import held_mb
from ..runs.provenance import certificate
from .checkpoints import Checkpoints, State, random_state, set_random_state
from .faults import Layout, Skips
from .learner import Learner
from .metrics import finite
from .optimizer import schedule
from .plan import Plan
from .ranks import Ranks
from .rollouts import Rollouts
from .steps import FixedGroups, StepSource


def step_source(plan: Plan, learner: Learner) -> StepSource:
    """Answers of the model in training where the plan has problems for it, else the plan's own examples."""
    if plan.problems:
        return Rollouts(plan, learner)
    settings = plan.recipe.train
    return FixedGroups(plan.groups, settings.batch_size, settings.seed)


class Trainer:
    """A plan, a source of steps and a learner, after `done` steps: 0, or as many as `state` has."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        source: StepSource | None = None,
        base: tuple[Any, Hardware] | None = None,
        state: State | None = None,
    ):
        self.plan, self.recipe, self.ranks = plan, plan.recipe, ranks
        first = plan.first_batch() if state is None and plan.recipe.adapter.init == "eva" else None
        self.learner = Learner(plan.recipe, plan.objective, plan.renderer.pad_id, ranks, base, first)
        self.source = source or step_source(plan, self.learner)
        self.skips = Skips()
        self.done, self.seconds = 0, 0.0
        if state is not None:
            self.restore(state)

    def step(self, step: int) -> dict[str, Any]:
        """Run optimizer step `step` (from 0); returns its line of `metrics.jsonl`."""
        started, busy = time.perf_counter(), time.process_time()
        settings, plan = self.recipe.train, self.plan
        groups = self.source.groups(step)
        self.learner.objective = plan.objective.at(step / plan.steps)
        chosen, divisor = examples_of(groups), self.learner.divisor(groups)
        supervised = sum(example.supervised for example in chosen)
        learning_rate = settings.learning_rate * schedule(
            step, plan.steps, settings.warmup, settings.schedule
        )
        for group in self.learner.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)

        sums, suspects = self.learner.accumulate(groups, divisor, step + 1)
        grad_norm, changed, sound = self.learner.update(sums.loss)
        self.done, seconds = step + 1, time.perf_counter() - started
        self.seconds += seconds
        ids = suspects or [example.id for example in chosen]
        self.skips.note(changed, sound, self.done, dtype_name(self.learner.hardware.dtype), ids)
        scored = max(1, sums.scored)
        skip = {"skipped_rows": int(sums.skipped_rows), "skip_bound": sums.skip_bound / divisor}
        return {
            "step": self.done,
            "loss": finite(sums.loss / divisor),
            "nll": finite(sums.nll / scored),
            "mean_probability": finite(sums.probability / scored),
            "entropy": finite(sums.entropy / scored),
            "top1": finite(sums.top1 / scored),
            "p_end": finite(sums.end_probability / max(1, sums.ends)),
            "learning_rate": learning_rate,
            "grad_norm": finite(grad_norm),
            "skipped": not changed,
            "tokens": int(sums.tokens),
            "padding": 1 - sums.tokens / sums.positions,
            "supervised_tokens": supervised,
            "seconds": seconds,
            "processor_seconds": time.process_time() - busy,
            "tokens_per_second": sums.tokens / seconds,
            "peak_memory_mb": accelerator(self.ranks.device).peak() / MIB,
            **self.source.figures,
            **(skip if settings.skip_rows else {}),
        }

    def save(self, checkpoints: Checkpoints) -> None:
        """Save a checkpoint. All ranks call this; the first one writes."""
        random = self.ranks.stack(random_state(self.ranks.device))
        if self.ranks.is_main:
            progress = {
                "layout": asdict(self.learner.layout),
                "retreats": self.learner.retreats,
                "skips": asdict(self.skips),
                "loss_scale": self.ranks.scaler.state_dict(),
                "seconds": self.seconds,
            }
            state = State(
                self.done,
                self.learner.adapter_weights(),
                self.learner.optimizer.state_dict(),
                random,
                progress,
                {
                    "source": self.source.kept(self.done),
                    "reference": self.learner.base_logps.state(self.source.upcoming(self.done)),
                    "value_head": self.learner.value_state(),
                },
            )
            checkpoints.save(state, self.learner.adapter_config)
        self.ranks.wait()

    def check_weights(self) -> None:
        """Raises RunError if any of the adapter's weights is not finite."""
        finite_weights = [parameter.detach().isfinite().all() for parameter in self.learner.trainable]
        if not torch.stack(finite_weights).all():
            raise RunError(
                f"step {self.done}: the adapter's weights are not finite, so they were not written; lower "
                "train.learning_rate and start a new run (earlier checkpoints of this one are untouched)"
            )

    def restore(self, state: State) -> None:
        """Restore `state`. Raises RunError if it belongs to a different adapter."""
        learner = self.learner
        shapes = [
            {name: w.shape for name, w in ws.items()} for ws in (state.adapter, learner.adapter_weights())
        ]
        if shapes[0] != shapes[1]:
            raise RunError(f"the checkpoint of step {state.step} belongs to an adapter of a different shape")
        learner.load_adapter(state.adapter)
        learner.optimizer.load_state_dict(state.optimizer)
        set_random_state(state.random[self.ranks.rank], self.ranks.device)
        self.source.restore(state.extra.get("source", {}))
        learner.base_logps.restore(self.source.upcoming(state.step), state.extra.get("reference", {}))
        learner.restore_value(state.extra.get("value_head", {}))
        progress = state.progress
        learner.layout, learner.retreats = Layout(**progress["layout"]), progress["retreats"]
        self.skips = Skips(**progress["skips"])
        if progress["loss_scale"]:
            self.ranks.scaler.load_state_dict(progress["loss_scale"])
        self.done, self.seconds = state.step, progress["seconds"]

    def metadata(self) -> dict[str, Any]:
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
            "gradient_checkpointing": self.learner.checkpointing,
            "arrangement": getattr(self.learner.arrange, "__name__", repr(self.learner.arrange)),
            "trainable_parameters": sum(parameter.numel() for parameter in self.learner.trainable),
            "frozen_mb": held_mb(self.learner.adapter_model),
        }

    def progress(self) -> dict[str, Any]:
        """What `run.json` records at every checkpoint: the settings in use, and what had to be skipped."""
        return {
            "micro_batch_size": self.learner.layout.micro_batch_size,
            "loss_chunk_bytes": self.learner.layout.chunk_bytes,
            "retreats": self.learner.retreats,
            "skipped_steps": self.skips.total,
        }

    def provenance(self) -> dict[str, Any]:
        return certificate(
            device=self.learner.hardware.name,
            dtype=dtype_name(self.learner.hardware.dtype),
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
