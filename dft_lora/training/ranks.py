"""The processes of a run: which one writes, and how they all agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config import Recipe
from ..errors import RequestError, RunError
from ..model.accelerator import LONGEST_WAIT, accelerator, default_device
from ..model.load import hardware_of
from ..model.memory import DeviceMemory, Memory
from .faults import is_out_of_memory
from .trackers import check_trackers

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


class Ranks:
    """Accelerate's view of this process and the others. With one process, sums over ranks change nothing.

    float16 bases get loss scaling, on every device. Raises RequestError if the examples of a step cannot be
    distributed, a tracker is not installed, or accelerate would shard the model; RunError if another process
    has died.
    """

    def __init__(self, recipe: Recipe):
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        # Without `cpu`, accelerate treats two CPU processes of torchrun as two separate runs.
        self.accelerator = Accelerator(
            cpu=default_device().type == "cpu",
            mixed_precision="no",  # no autocast: LoRA stays in float32
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
                # A rank that runs out of memory in its first pass would repeat the broadcast, the others not.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
            log_with=check_trackers(recipe.train.trackers),
            project_dir=str(recipe.output_dir),
        )
        kind = str(getattr(self.accelerator.distributed_type, "value", ""))
        if kind in SHARDED:
            raise RequestError(
                f"accelerate's distributed_type {kind} shards the whole model, but the loss reads the head "
                "outside of its forward pass: use MULTI_GPU, with train.shard: true to share the base "
                "(docs/scaling.md)"
            )
        self.device: torch.device = self.accelerator.device
        self.gauge: Memory | None = (
            DeviceMemory(self.device) if accelerator(self.device).counts_memory else None
        )
        """The device's own count of its memory; None where it has none for tensors alone (CPU, MPS)."""
        scales_loss = hardware_of(recipe.model, self.device).scales_loss
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales_loss)
        """The loss scaler for float16; otherwise disabled, and then it changes nothing."""
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.wait()  # all are connected before one of them may exit with an error below
        if recipe.train.batch_size < self.world:
            raise RequestError(
                f"train.batch_size {recipe.train.batch_size} is too small for {self.world} processes"
            )
        if recipe.train.shard:
            self._check_sharing(recipe)

    def _check_sharing(self, recipe: Recipe) -> None:
        """All processes gather a layer together, so each must make equally many passes."""
        if self.world == 1:
            raise RequestError(
                "train.shard: there is only one process to hold the base; start several with "
                "accelerate launch (docs/scaling.md), or set train.shard: false"
            )
        if recipe.train.batch_size % self.world:
            raise RequestError(
                f"train.batch_size {recipe.train.batch_size}: with train.shard it must be a multiple of the "
                f"{self.world} processes"
            )

    def wait(self) -> None:
        with self.together():
            self.accelerator.wait_for_everyone()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over all ranks."""
        with self.together():
            return self.accelerator.reduce(values, reduction="sum")

    def stack(self, values: torch.Tensor) -> torch.Tensor:
        """[ranks, ...] on the CPU, from each rank's own `values`."""
        with self.together():
            return self.accelerator.gather(values[None].to(self.device)).cpu()

    def everyone(self, mine: list[Any]) -> list[Any]:
        """All items in their order, of which rank r has items r, r + world, ... in `mine`."""
        if self.world == 1:
            return mine
        from accelerate.utils import gather_object

        with self.together():
            parts = gather_object([mine])
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true on all ranks if it is true on any, so that they decide alike."""
        if self.world == 1:
            return list(flags)
        return [bool(flag) for flag in self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device))]

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over ranks in one message: LoRA's are small.

        It is called after every rank has finished its part, so a rank that runs out of memory leaves no other
        waiting.
        """
        if self.world == 1:
            return
        flat = torch.cat(
            [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
        )
        pieces = self.sum(flat).split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, multiplied by the loss scale."""
        self.accelerator.backward(self.scaler.scale(loss))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turns the RuntimeError with which Gloo and NCCL report a lost process into a RunError."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [""])[0][:120]
            raise RunError(
                f"another process of this run is gone ({reason}); continue from a checkpoint with --resume"
            ) from None
