"""The training loop: one file, top to bottom, on accelerate.

One step: `batch_size` examples -> micro-batches of similar length -> h_BLD by a hook -> logp_M
from the chunked loss -> objective, a sum over tokens -> divided once by the supervised tokens of
the whole step over all micro-batches and ranks -> clip -> AdamW. How the examples are split
over micro-batches or ranks therefore does not change the step.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe
from ..data.batches import Batch, micro_batches, step_examples
from ..errors import RequestError
from ..loss import REFERENCE_NEEDS, TokenScores, token_logps
from ..model.hardware import choose, peak_memory_mb
from ..model.head import Head, check_head, hidden_states
from ..model.load import add_lora, load_base, use_checkpointing
from ..provenance import certificate
from ..run_folder import RunFolder
from .plan import Plan, make_plan

AUTO_MICRO_BATCH = 4


def train(recipe: Recipe) -> RunFolder:
    """Train one adapter as the recipe says; returns its run folder.

    Raises a RequestError before any model is loaded when the recipe, its data or the output folder
    cannot be used.
    """
    plan = make_plan(recipe)
    folder = RunFolder.create(recipe.output_dir)
    trainer = Trainer(plan)
    if trainer.is_main:
        folder.write_run(**trainer.facts())
    started = time.perf_counter()
    with trainer.progress_bar() as bar:
        for step in range(plan.steps):
            figures = trainer.step(step)
            if trainer.is_main:
                if (step + 1) % recipe.train.logging_steps == 0 or step + 1 == plan.steps:
                    folder.log(figures)
                bar.set_postfix(
                    nll=f"{figures['nll']:.3f}", p=f"{figures['mean_probability']:.3f}", refresh=False
                )
                bar.update()
    if trainer.is_main:
        save_adapter(trainer.adapter_model, folder.adapter)
        folder.write_run(figures={"seconds": time.perf_counter() - started, "last": figures})
    return folder


class Trainer:
    """A model, its optimizer and the step between them."""

    def __init__(self, plan: Plan):
        from accelerate import Accelerator

        self.plan, self.recipe = plan, plan.recipe
        scaled = choose(self.recipe.model.dtype).scales_loss
        self.accelerator = Accelerator(mixed_precision="fp16" if scaled else "no")
        if self.recipe.train.batch_size < self.world:
            raise RequestError(
                f"train.batch_size {self.recipe.train.batch_size} is smaller than {self.world} processes"
            )
        base, self.hardware = load_base(self.recipe.model, self.accelerator.device)
        self.head: Head = check_head(base)
        torch.manual_seed(self.recipe.train.seed)  # the same initial adapter for every objective
        model = add_lora(base, self.recipe.adapter)
        self.checkpointing = use_checkpointing(model, self.recipe.train.gradient_checkpointing)
        model.train()
        self.adapter_model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model, self.optimizer = self.accelerator.prepare(
            model, make_optimizer(self.trainable, self.recipe)
        )
        torch.manual_seed(self.recipe.train.seed + self.rank)  # dropout differs between ranks

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def micro_batch_size(self) -> int:
        size = self.recipe.train.micro_batch_size
        return min(self.recipe.train.batch_size, AUTO_MICRO_BATCH) if size == "auto" else size

    def step(self, step: int) -> dict[str, Any]:
        """Run optimizer step `step` (from 0); returns its line of `metrics.jsonl`."""
        started = time.perf_counter()
        settings, plan = self.recipe.train, self.plan
        chosen = [
            plan.examples[i]
            for i in step_examples(len(plan.examples), settings.batch_size, settings.seed, step)
        ]
        supervised = sum(len(example.ids) - example.prompt_length for example in chosen)
        batches = micro_batches(chosen[self.rank :: self.world], self.micro_batch_size, plan.renderer.pad_id)
        learning_rate = settings.learning_rate * schedule(
            step, plan.steps, settings.warmup, settings.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        sums = Sums()
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.score(batch, sums)
                # DDP averages gradients over ranks; the step divides a sum once.
                self.accelerator.backward(loss * (self.world / supervised))
        grad_norm = self.accelerator.clip_grad_norm_(self.trainable, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

        total = self.accelerator.reduce(sums.tensor(self.accelerator.device), reduction="sum").tolist()
        loss_sum, nll, probability, entropy, top1, scored, tokens = total
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "loss": loss_sum / supervised,
            "nll": nll / scored,
            "mean_probability": probability / scored,
            "entropy": entropy / scored,
            "top1": top1 / scored,
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "tokens": int(tokens),
            "supervised_tokens": supervised,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory_mb(self.accelerator.device),
        }

    def score(self, batch: Batch, sums: Sums) -> torch.Tensor:
        """The objective's sum over a micro-batch, connected to the graph; adds its figures to `sums`."""
        objective, device = self.plan.objective, self.accelerator.device
        targets_BL = batch.labels_BL[:, 1:].to(device)
        rows_BL = torch.arange(len(targets_BL), device=device)[:, None].expand_as(targets_BL)

        def scores_of(model: Any, **more: Any) -> TokenScores:
            h_BLD = hidden_states(model, **batch.inputs(device))[:, :-1]
            return token_logps(
                h_BLD.flatten(0, 1).to(self.head.weight_VD.dtype),
                targets=targets_BL.flatten(),
                **self.head.arguments(),
                **more,
            )

        reference = None
        if objective.needs & REFERENCE_NEEDS:  # the base itself: adapter off, no second model
            with torch.no_grad(), self.adapter_model.disable_adapter():
                reference = scores_of(self.adapter_model, keep_jacobian=True)
        scores = scores_of(
            self.model,
            needs=objective.needs,
            sequence=rows_BL.flatten(),
            reference=reference,
            skip=self.recipe.train.skip_rows,
            token_weight=objective.token_weight if self.recipe.train.skip_rows else None,
        )
        loss = objective(scores)
        sums.add(loss, scores, batch.tokens)
        return loss

    def facts(self) -> dict[str, Any]:
        """What `run.json` records before the first step."""
        plan = self.plan
        return {
            "recipe": self.recipe.as_dict(),
            "template": plan.renderer.template.name,
            "template_hash": plan.renderer.fingerprint,
            "data_hash": plan.data_hash,
            "data": plan.counts,
            "steps": plan.steps,
            "micro_batch_size": self.micro_batch_size,
            "gradient_checkpointing": self.checkpointing,
            "trainable_parameters": sum(parameter.numel() for parameter in self.trainable),
            "provenance": certificate(
                device=self.hardware.name,
                dtype=str(self.hardware.dtype).removeprefix("torch."),
                processes=self.world,
                seed=self.recipe.train.seed,
            ),
        }

    def progress_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.plan.steps, desc=self.recipe.output_dir.name, unit="step", disable=not self.is_main
        )


@dataclass
class Sums:
    """Running sums over the supervised tokens of a step: the plain figures, whatever the objective."""

    values: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, scores: TokenScores, tokens: int) -> None:
        logp_M = scores.logp.detach().double()
        parts = (loss.detach(), -logp_M.sum(), logp_M.exp().sum(), scores.entropy.sum(), scores.is_top1.sum())
        counts = torch.tensor([logp_M.numel(), tokens], dtype=torch.float64, device=logp_M.device)
        here = torch.cat([torch.stack([part.double() for part in parts]), counts])
        self.values = here if self.values is None else self.values + here

    def tensor(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(7, dtype=torch.float64, device=device) if self.values is None else self.values


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """Learning-rate factor of a step: linear warm-up over a share of the steps, then decay to 0."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[kind]


def make_optimizer(parameters: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the adapter, in float32 or with bitsandbytes' 8-bit states."""
    settings = recipe.train
    arguments = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    import bitsandbytes

    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[settings.optimizer](parameters, **arguments)


def save_adapter(model: Any, path: Path) -> None:
    """Write an adapter in peft's format, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    model.save_pretrained(temporary, save_embedding_layers=False)
    temporary.rename(path)
