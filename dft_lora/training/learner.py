"""One optimizer step: gradients from micro-batches that fit in memory, then clipped and applied.

    groups -> micro-batches -> h_BLD by a hook -> logp_M from the chunked loss -> objective, a sum
    -> divided once by the step's tokens over all micro-batches and ranks -> clip -> AdamW

The step therefore does not depend on how its examples are split over micro-batches or ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ..config import Recipe
from ..data.batches import Batch, Group, examples_of, numbered, ungrouped
from ..data.templates import Example
from ..errors import RunError
from ..loss import REFERENCE_NEEDS, Objective, TokenScores, chunk_rows, token_logps
from ..model.accelerator import accelerator
from ..model.attention import choose_arrangement
from ..model.backends import build
from ..model.hardware import Hardware
from ..model.long_rows import offloaded
from ..model.memory import give_back_large_blocks
from ..model.starts import config_over_base, from_base, over_base
from ..model.teacher import as_teacher
from .base_logps import BaseLogps
from .checkpoints import random_state, set_random_state
from .faults import RETREATS, Layout, out_of_memory_text, ran_out_of_memory
from .metrics import ExampleLogps, Sums, Totals
from .optimizer import make_optimizer
from .ranks import Ranks

AUTO_MICRO_BATCH = 4

log = logging.getLogger(__name__)


class Learner:
    """A base with its adapter, the objective and the optimizer: `accumulate` gradients, then `update`.

    `base`, `first`: see `build`.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        pad_id: int,
        ranks: Ranks,
        base: tuple[Any, Hardware] | None = None,
        first: Batch | None = None,
    ):
        self.recipe, self.objective, self.pad_id, self.ranks = recipe, objective, pad_id, ranks
        self.accelerator = ranks.accelerator
        built = build(recipe, ranks.device, base, first)
        if ranks.device.type == "cpu":
            give_back_large_blocks(ranks.device)
        self.head, self.hardware, self.checkpointing = built.head, built.hardware, built.checkpointing
        self.hidden_states, model = built.hidden_states, built.model
        self.set_checkpointing, self.start = built.set_checkpointing, built.start
        self.arrange = choose_arrangement(recipe.data, model, alike=recipe.train.shard)
        model.train()
        self.adapter_model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # `Ranks` sums gradients once per step; DDP only makes sure that all ranks start from equal weights.
        shared = recipe.train.shard
        self.model = model if shared else self.accelerator.prepare(model)
        self.no_sync = ranks.together if shared else partial(self.accelerator.no_sync, self.model)
        self.value_head = self._new_value_head() if "value" in objective.signals else None
        optimizer = make_optimizer(model, self.trainable, recipe, self._value_group())
        self.optimizer = self.accelerator.prepare(optimizer)
        self.base_logps = BaseLogps(alike=shared)
        torch.manual_seed(recipe.train.seed + ranks.rank)  # dropout differs between ranks
        size, chunk_mb = recipe.train.micro_batch_size, recipe.train.loss_chunk_mb
        self.layout = Layout(
            min(recipe.train.batch_size, AUTO_MICRO_BATCH) if size == "auto" else size,
            chunk_mb and chunk_mb * 2**20,
        )
        self.retreats: list[dict[str, Any]] = []

    @property
    def finds_micro_batch(self) -> bool:
        """Whether `micro_batch_size: auto` is measured: on a GPU, unless the base is sharded."""
        settings = self.recipe.train
        return (
            settings.micro_batch_size == "auto"
            and accelerator(self.ranks.device).counts_memory
            and not settings.shard
        )

    @property
    def keeps_reference(self) -> bool:
        """Whether `with_reference` supplies all that the objective needs of the base: log p, as a signal."""
        return self.objective.needs & REFERENCE_NEEDS == {"reference_logp"}

    def divisor(self, groups: Sequence[Group]) -> int:
        """What the objective's sum over the whole step is divided by, at least 1."""
        examples = examples_of(groups)
        counts = {
            "tokens": sum(example.supervised for example in examples),
            "sequences": len(examples),
            "groups": len(groups),
        }
        return max(1, counts[self.objective.divided_by])

    def accumulate(self, groups: Sequence[Group], divisor: float, step: int) -> tuple[Totals, list[str]]:
        """Accumulates the gradients of the whole step over micro-batches and ranks.

        Returns the totals, and the examples of micro-batches whose loss is not finite.
        """
        if self.keeps_reference:
            groups = self.with_reference(groups, step)
        if self.objective.step_signals is not None:
            groups = self.with_signals(groups, self.objective.step_signals, step)
        if "group" in self.objective.signals:
            groups = numbered(groups)

        def work(batch: Batch, sums: Sums) -> None:
            with self.no_sync():
                self.ranks.backward(self.score(batch, sums) / divisor)

        sums, values = self.in_pieces(groups, work, lambda: Sums(self.ranks.device), step)
        self.ranks.sum_gradients([*self.trainable, *self.value_parameters])
        return Totals(*values), sums.suspects()

    def with_signals(
        self, groups: Sequence[Group], make: Callable[[torch.Tensor], dict[str, torch.Tensor]], step: int
    ) -> list[Group]:
        """The step's groups, with the signals that `make` computes from the mean NLL of all their examples.

        Costs one forward pass over the step, without gradients and without dropout.
        """
        examples = examples_of(groups)
        nll_E = torch.stack([-logp_T.mean() for logp_T, _ in self.example_logps(examples, step)])
        made = {name: values_E.tolist() for name, values_E in make(nll_E).items()}
        marked = iter(
            replace(
                example, signals={**example.signals, **{name: values[i] for name, values in made.items()}}
            )
            for i, example in enumerate(examples)
        )
        return [tuple(next(marked) for _ in group) for group in groups]

    def in_pieces(
        self,
        groups: Sequence[Group],
        work: Callable[[Batch, Any], None],
        begin: Callable[[], Any],
        step: int,
    ) -> tuple[Any, list[float]]:
        """Runs `work(batch, found)` on all micro-batches of this rank's groups, with `found = begin()`.

        Returns `found`, and its `values` summed over ranks. If one rank runs out of memory, all of them
        start over with smaller pieces.
        """
        mine, random = groups[self.ranks.rank :: self.ranks.world], random_state(self.ranks.device)
        while True:
            batches = self.arrange(mine, self.layout.micro_batch_size, self.pad_id)
            found = begin()
            passed: list[Batch] = []

            def run(batches=batches, found=found, passed=passed) -> None:
                for batch in batches:
                    work(batch, found)
                    passed.append(batch)

            failed = ran_out_of_memory(run)
            if failed and self.recipe.train.shard:  # the others are waiting for this rank's part of a layer
                raise RunError(self.out_of_memory(batches, len(passed)))
            *values, failures = self.ranks.sum(
                torch.cat([found.values, found.values.new_tensor([failed])])
            ).tolist()
            if not failures:
                return found, values
            self.optimizer.zero_grad()
            set_random_state(random, self.ranks.device)
            self.retreat(batches, len(passed), step, least=max(map(len, mine), default=1))

    def retreat(self, batches: Sequence[Batch], passed: int, step: int, least: int) -> None:
        """Split the step into smaller pieces; groups of `least` examples stay together.

        Raises RunError after RETREATS retreats, or if no smaller layout exists.
        """
        weight_VD = self.head.weight_VD
        mine = max((batch.supervised for batch in batches), default=1)
        widest = int(self.ranks.stack(torch.tensor(mine)).max())  # all ranks choose the same layout
        rows = chunk_rows(weight_VD, len(weight_VD), self.layout.chunk_bytes)
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
        sizes = [(len(batch.input_ids_BL), batch.input_ids_BL.shape[1]) for batch in batches]
        tile = self.recipe.train.mlp_tile
        return out_of_memory_text(self.layout, sizes, passed, self.checkpointing, tile)

    def update(self, loss: float) -> tuple[float, bool, bool]:
        """Clip and step. Returns the gradient norm, whether weights changed, and whether the step was sound.

        If the loss or a gradient is not finite, nothing changes. With loss scaling (float16) an overflowing
        gradient is normal operation: the scaler skips the step and halves its scale. At a scale of 1 it is
        not.
        """
        scaler, norm = self.ranks.scaler, math.nan
        scale = scaler.get_scale()
        if math.isfinite(loss):
            scaler.unscale_(self.optimizer)
            norm = self.clip(self.trainable)
            if self.value_head is not None and not math.isfinite(self.clip(self.value_parameters)):
                norm = math.nan
            if math.isfinite(norm) and ran_out_of_memory(partial(scaler.step, self.optimizer)):
                raise RunError(
                    "out of memory in the optimizer: set train.optimizer: adamw8bit, or a smaller adapter.r"
                )
            scaler.update()
        self.optimizer.zero_grad()
        changed = math.isfinite(norm)
        return norm, changed, changed or 1 < scale > scaler.get_scale()

    def clip(self, parameters: list[torch.nn.Parameter]) -> float:
        """Clip the gradients of `parameters`; returns their norm before."""
        return float(self.accelerator.clip_grad_norm_(parameters, self.recipe.train.max_grad_norm))

    def score(self, batch: Batch, sums: Sums) -> torch.Tensor:
        """The objective's sum over a micro-batch, connected to the graph; adds its metrics to `sums`."""
        objective = self.objective
        reference, h_BLD = None, None
        if objective.toward is not None:
            h_BLD = self.hidden(self.model, batch)
            reference = self.toward_teacher(h_BLD.detach(), batch, objective.toward)
        elif objective.needs & REFERENCE_NEEDS and not self.keeps_reference:
            with torch.no_grad(), self.adapter_model.disable_adapter():  # the base itself: no second model
                reference = self.token_scores(self.adapter_model, batch, keep_jacobian=True)
        scores = self.scores_at(
            self.hidden(self.model, batch) if h_BLD is None else h_BLD,
            batch,
            needs=objective.needs,
            signals=batch.signals_N(self.ranks.device),
            reference=reference,
            skip=self.recipe.train.skip_rows,
            token_weight=objective.token_weight if self.recipe.train.skip_rows else None,
        )
        loss = objective(scores)
        sums.add(loss, scores, batch)
        return loss

    @torch.no_grad()
    def toward_teacher(
        self, h_BLD: torch.Tensor, batch: Batch, toward: Callable[..., torch.Tensor]
    ) -> TokenScores:
        """The scores of the objective's reference, between the model and the teacher; without dropout."""
        self.adapter_model.eval()
        try:
            with as_teacher(self.adapter_model):
                teacher_BLD = self.hidden(self.adapter_model, batch)
        finally:
            self.adapter_model.train()
        return self.scores_at(toward(h_BLD, teacher_BLD), batch, keep_jacobian=True)

    def with_reference(self, groups: Sequence[Group], step: int) -> list[Group]:
        """The groups, with the signal `reference_logp` of every example: log p under the base."""
        return self.base_logps.marked(
            groups, lambda some: [logp_T for logp_T, _ in self.example_logps(some, step, base=True)]
        )

    def example_logps(
        self, examples: Sequence[Example], step: int, base: bool = False
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """log p of each example's supervised tokens, and their values with a value head; float32, on the CPU.

        By the policy in training, or by the base; without gradients and without dropout. All ranks call it
        with the same examples; each scores a share of them.
        """
        by_place = ungrouped(replace(example, id=str(i)) for i, example in enumerate(examples))

        def score(batch: Batch, found: ExampleLogps) -> None:
            found.add(self.token_scores(self.adapter_model, batch), batch)

        self.adapter_model.eval()
        try:
            with torch.no_grad(), self.adapter_model.disable_adapter() if base else nullcontext():
                found, _ = self.in_pieces(by_place, score, lambda: ExampleLogps(self.ranks.device), step)
        finally:
            self.adapter_model.train()
        share = range(self.ranks.rank, len(examples), self.ranks.world)
        return self.ranks.everyone([found.by_id[str(i)] for i in share])

    def token_scores(self, model: Any, batch: Batch, **more: Any) -> TokenScores:
        """Forward pass of a micro-batch, scored by the chunked loss engine."""
        return self.scores_at(self.hidden(model, batch), batch, **more)

    def hidden(self, model: Any, batch: Batch) -> torch.Tensor:
        """The last hidden states of a micro-batch, but for its last position, which predicts nothing."""
        with offloaded(model) if self.recipe.train.offload_activations else nullcontext():
            return self.hidden_states(model, **batch.inputs(self.ranks.device))[:, :-1]

    def scores_at(self, h_BLD: torch.Tensor, batch: Batch, **more: Any) -> TokenScores:
        """The scores of a micro-batch whose hidden states are these."""
        device = self.ranks.device
        if self.value_head is not None:
            value_BL1 = self.value_head(h_BLD.detach().float())
            more["signals"] = {**more.get("signals", {}), "value": value_BL1.flatten()}
        return token_logps(
            h_BLD.flatten(0, 1).to(self.head.weight_VD.dtype),
            targets=batch.labels_BL[:, 1:].to(device).flatten(),
            **self.head.arguments(),
            sequence=batch.examples_BL[:, 1:].to(device).flatten(),
            chunk_bytes=self.layout.chunk_bytes,
            check_values=False,  # `update` checks the loss, once per step
            **more,
        )

    def _new_value_head(self) -> torch.nn.Linear:
        """D -> 1 in float32, zero at first: it estimates the reward from the policy's last hidden state."""
        head = torch.nn.Linear(self.head.weight_VD.shape[1], 1, device=self.ranks.device)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        return head

    @property
    def value_parameters(self) -> list[torch.nn.Parameter]:
        return [] if self.value_head is None else list(self.value_head.parameters())

    def _value_group(self) -> list[dict[str, Any]]:
        if self.value_head is None:
            return []
        return [{"params": self.value_parameters, "rate": getattr(self.objective, "value_rate", 1.0)}]

    def value_state(self) -> dict[str, torch.Tensor]:
        return {} if self.value_head is None else self.value_head.state_dict()

    def restore_value(self, state: dict[str, torch.Tensor]) -> None:
        if self.value_head is not None:
            self.value_head.load_state_dict(state)

    @property
    def adapter_config(self) -> Any:
        return config_over_base(self.adapter_model.peft_config["default"], self.start)

    def adapter_weights(self) -> dict[str, torch.Tensor]:
        """The adapter by peft's names, as a LoRA over the unchanged base."""
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self.adapter_model, save_embedding_layers=False)
        return over_base(weights, self.start)

    def load_adapter(self, saved: dict[str, torch.Tensor]) -> None:
        """Take over the weights that `adapter_weights` returned."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.adapter_model, from_base(saved, self.start))
