"""From rendered examples to padded batches, in an order that a seed fixes.

Legend: B rows of a micro-batch, L its longest row, E its examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .templates import Example

IGNORE = -100
MULTIPLE = (
    8  # of a row's length: tensor cores like it, and a CPU keeps 6 MB of compiled kernels for each length
)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `labels_BL` holds the id at solution and end positions, -100 elsewhere.

    Padding is masked by length, never by id: pad may equal eos.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    labels_BL: torch.Tensor
    ids: tuple[str, ...]
    positions_BL: torch.Tensor | None = None
    """Position of each token in its example, where a row holds several (`packing.py`)."""
    signals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The examples' signals by name, one value for each of `ids` [E]."""

    @property
    def supervised(self) -> int:
        """Label tokens; the first position has no prediction, so it never counts."""
        return int((self.labels_BL[:, 1:] != IGNORE).sum())

    @property
    def tokens(self) -> int:
        return int(self.attention_mask_BL.sum())

    @property
    def positions(self) -> int:
        """Tokens and padding: what the model computes."""
        return self.input_ids_BL.numel()

    @property
    def examples_BL(self) -> torch.Tensor:
        """Which of `ids` each position belongs to; padding counts to the example before it."""
        if self.positions_BL is None:
            return torch.arange(len(self.input_ids_BL))[:, None].expand_as(self.input_ids_BL)
        begins_BL = (self.positions_BL == 0) & (self.attention_mask_BL == 1)
        return begins_BL.flatten().cumsum(0).view_as(begins_BL) - 1

    def signals_N(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The signals at every position that has a prediction, [B * (L - 1)] in the order of the rows."""
        examples_N = self.examples_BL[:, 1:].flatten()
        return {name: values_E[examples_N].to(device) for name, values_E in self.signals.items()}

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model's forward.

        Packed rows carry positions and no mask: transformers makes the mask, or the bounds of variable-length
        attention, from positions that start again, and only where it is given no mask.
        """
        packed = self.positions_BL is not None
        inputs = {"input_ids": self.input_ids_BL} | (
            {"position_ids": self.positions_BL} if packed else {"attention_mask": self.attention_mask_BL}
        )
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right into one batch."""
    longest = rounded(max(len(example.ids) for example in examples))
    input_ids_BL = torch.full((len(examples), longest), pad_id)
    mask_BL = torch.zeros_like(input_ids_BL)
    labels_BL = torch.full_like(input_ids_BL, IGNORE)
    for row, example in enumerate(examples):
        ids, length = torch.tensor(example.ids), len(example.ids)
        input_ids_BL[row, :length] = ids
        mask_BL[row, :length] = 1
        labels_BL[row, example.prompt_length : length] = ids[example.prompt_length :]
    names = tuple(example.id for example in examples)
    return Batch(input_ids_BL, mask_BL, labels_BL, names, signals=signals_of(examples))


def signals_of(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The signals of examples that all carry the same ones, name -> [E]."""
    return {
        name: torch.tensor([example.signals[name] for example in examples]) for name in examples[0].signals
    }


def rounded(length: int) -> int:
    """The least multiple of MULTIPLE that is not below `length`."""
    return -(-length // MULTIPLE) * MULTIPLE


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def step_examples(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of one optimizer step's examples; a pure function of its arguments.

    Epochs follow each other without a gap: a step at the seam takes the end of one permutation
    and the start of the next, so every step holds exactly `batch_size` examples.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    orders = {
        epoch: epoch_order(count, seed, epoch) for epoch in range(first // count, (last - 1) // count + 1)
    }
    return [orders[i // count][i % count] for i in range(first, last)]


def by_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Groups of at most `size` examples of similar length."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def micro_batches(examples: Sequence[Example], size: int, pad_id: int) -> list[Batch]:
    """One step's examples as micro-batches of rows of similar length (less padding, same sum)."""
    return [collate(group, pad_id) for group in by_length(examples, size)]
