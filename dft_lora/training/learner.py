"""One optimizer step: its gradients, cut into micro-batches that fit in memory, then clipped and applied.

    groups -> micro-batches -> h_BLD by a hook -> logp_M from the chunked loss -> objective, a sum
    -> divided once by the step's tokens over all micro-batches and ranks -> clip -> AdamW

How the examples are split over micro-batches or ranks therefore does not change the step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..config import Recipe
from ..data.batches import Batch, Group, examples_of
from ..errors import RunError
from ..loss import REFERENCE_NEEDS, Objective, TokenScores, chunk_rows, token_logps
from ..model.attention import choose_arrangement
from ..model.backends import build
from ..model.memory import give_back_large_blocks
from .checkpoints import random_state, set_random_state
from .faults import RETREATS, Layout, out_of_memory_text, ran_out_of_memory
from .metrics import Sums, Totals
from .optimizer import make_optimizer
from .ranks import Ranks

AUTO_MICRO_BATCH = 4

log = logging.getLogger(__name__)


class Learner:
    """An adapter over its base, the objective and the optimizer: `accumulate` gradients, then `update`."""

    def __init__(self, recipe: Recipe, objective: Objective, pad_id: int, ranks: Ranks):
        self.recipe, self.objective, self.pad_id, self.ranks = recipe, objective, pad_id, ranks
        self.accelerator = ranks.accelerator
        if ranks.device.type == "cpu":
            give_back_large_blocks()
        built = build(recipe, ranks.device)
        self.head, self.hardware, self.checkpointing = built.head, built.hardware, built.checkpointing
        self.hidden_states, model = built.hidden_states, built.model
        self.arrange = choose_arrangement(recipe.data, model, alike=recipe.train.shard)
        model.train()
        self.adapter_model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Gradients are added up once per step, by `Ranks`: DDP only makes sure that all ranks start equal.
        shared = recipe.train.shard
        self.model = model if shared else self.accelerator.prepare(model)
        self.no_sync = ranks.together if shared else partial(self.accelerator.no_sync, self.model)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.trainable, recipe))
        torch.manual_seed(recipe.train.seed + ranks.rank)  # dropout differs between ranks
        size, chunk_mb = recipe.train.micro_batch_size, recipe.train.loss_chunk_mb
        self.layout = Layout(
            min(recipe.train.batch_size, AUTO_MICRO_BATCH) if size == "auto" else size,
            chunk_mb and chunk_mb * 2**20,
        )
        self.retreats: list[dict[str, Any]] = []

    @property
    def finds_micro_batch(self) -> bool:
        """Whether `micro_batch_size: auto` is measured: on a GPU that need not keep step with others."""
        settings = self.recipe.train
        return settings.micro_batch_size == "auto" and self.ranks.device.type == "cuda" and not settings.shard

    def divisor(self, groups: Sequence[Group]) -> int:
        """What the objective's sum over a whole step is divided by, at least 1."""
        examples = examples_of(groups)
        counts = {
            "tokens": sum(example.supervised for example in examples),
            "sequences": len(examples),
            "groups": len(groups),
        }
        return max(1, counts[self.objective.divided_by])

    def accumulate(self, groups: Sequence[Group], divisor: float, step: int) -> tuple[Totals, list[str]]:
        """Gradients of the whole step, summed over micro-batches and ranks; totals and suspect examples.

        Where one rank runs out of memory all of them repeat the step in smaller pieces.
        """
        mine, random = groups[self.ranks.rank :: self.ranks.world], random_state(self.ranks.device)
        while True:
            batches = self.arrange(mine, self.layout.micro_batch_size, self.pad_id)
            sums = Sums(self.ranks.device)

            def run(batches=batches, sums=sums) -> None:
                for batch in batches:
                    with self.no_sync():
                        loss = self.score(batch, sums)
                        self.accelerator.backward(loss / divisor)

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
            self.retreat(batches, len(sums.parts), step, least=max(map(len, mine), default=1))

    def retreat(self, batches: Sequence[Batch], passed: int, step: int, least: int) -> None:
        """Cut the step into smaller pieces; groups of `least` examples stay together.

        Raises RunError when that was done often enough, or cannot be.
        """
        weight_VD = self.head.weight_VD
        widest = max(batch.supervised for batch in batches)
        rows = chunk_rows(weight_VD, len(weight_VD), widest, self.layout.chunk_bytes)
        row_bytes = len(weight_VD) * weight_VD.element_size()
        smaller = self.layout.smaller(
            min(rows, max(1, widest)), row_bytes, first=not self.retreats, least=least
        )
        if smaller is None or len(self.retreats) == RETREATS:
            raise RunError(self.out_of_memory(batches, passed))
        self.layout = smaller
        self.retreats.append({"step": step, **asdict(smaller)})
        log.warning("step %d ran out of memory; repeating it with %s", step, smaller)

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
        objective, device = self.objective, self.ranks.device
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

    @property
    def adapter_config(self) -> Any:
        return self.adapter_model.peft_config["default"]

    def adapter_weights(self) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.adapter_model, save_embedding_layers=False)
