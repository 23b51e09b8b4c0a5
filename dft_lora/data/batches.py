"""From rendered examples to padded batches, in an order determined by the seed.

Shapes (docs/shapes.md): B rows of a micro-batch, L positions of a row, N = B * (L - 1), E examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .templates import Example

Group = tuple[Example, ...]
"""Examples that share a micro-batch: one alone, or a preference pair."""

IGNORE = -100
MULTIPLE = 8
"""Row lengths are multiples of this: tensor cores prefer it, and a CPU keeps 6 MB of kernels per length."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `labels_BL` holds token ids at solution and end positions, -100 elsewhere.

    Padding is masked by length, never by id: the pad token may be the eos token.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    labels_BL: torch.Tensor
    ids: tuple[str, ...]
    positions_BL: torch.Tensor | None = None
    """Position of each token within its example, if rows hold several examples (`packing.py`)."""
    signals_BL: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The examples' signals by name: their values at label tokens, 0 elsewhere."""

    @property
    def supervised(self) -> int:
        """Label tokens; the first position has no prediction, so it never counts."""
        return int((self.labels_BL[:, 1:] != IGNORE).sum())

    @property
    def tokens(self) -> int:
        return int(self.attention_mask_BL.sum())

    @property
    def positions(self) -> int:
        """Tokens and padding: everything that the model computes."""
        return self.input_ids_BL.numel()

    @property
    def examples_BL(self) -> torch.Tensor:
        """Which of `ids` each position belongs to. Padding belongs to the example before it."""
        if self.positions_BL is None:
            return torch.arange(len(self.input_ids_BL))[:, None].expand_as(self.input_ids_BL)
        begins_BL = (self.positions_BL == 0) & (self.attention_mask_BL == 1)
        return begins_BL.flatten().cumsum(0).view_as(begins_BL) - 1

    def signals_N(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The signals of every position that has a prediction, [B * (L - 1)], row by row."""
        return {name: signal_BL[:, 1:].flatten().to(device) for name, signal_BL in self.signals_BL.items()}

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model's forward.

        Packed rows come with positions and without a mask. Where positions restart, transformers derives the
        mask, or the bounds for variable-length attention, but only if it is given no mask.
        """
        inputs = {"input_ids": self.input_ids_BL} | (
            {"attention_mask": self.attention_mask_BL}
            if self.positions_BL is None
            else {"position_ids": self.positions_BL}
        )
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right into one batch."""
    longest = rounded(max(len(example.ids) for example in examples))
    input_ids_BL = torch.full((len(examples), longest), pad_id)
    mask_BL = torch.zeros_like(input_ids_BL)
    labels_BL = torch.full_like(input_ids_BL, IGNORE)
    signals_BL = {name: torch.zeros(labels_BL.shape) for name in examples[0].signals}
    for row, example in enumerate(examples):
        ids, length = torch.tensor(example.ids), len(example.ids)
        input_ids_BL[row, :length] = ids
        mask_BL[row, :length] = 1
        labels_BL[row, example.prompt_length : length] = ids[example.prompt_length :]
        write_signals(signals_BL, row, 0, example)
    names = tuple(example.id for example in examples)
    return Batch(input_ids_BL, mask_BL, labels_BL, names, signals_BL=signals_BL)


def write_signals(signals_BL: Mapping[str, torch.Tensor], row: int, start: int, example: Example) -> None:
    """Write the signals of an example that begins at column `start` to the positions of its labels."""
    labels = slice(start + max(1, example.prompt_length), start + len(example.ids))
    for name, signal_BL in signals_BL.items():
        signal_BL[row, labels] = torch.as_tensor(example.signals[name])


def rounded(length: int) -> int:
    """The smallest multiple of MULTIPLE that is at least `length`."""
    return -(-length // MULTIPLE) * MULTIPLE


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def step_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of `count` examples, or groups, form one optimizer step; a pure function of its arguments.

    Epochs follow each other without a gap: a step at the boundary takes the end of one permutation
    and the start of the next, so every step holds exactly `batch_size` of them.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    orders = {
        epoch: epoch_order(count, seed, epoch) for epoch in range(first // count, (last - 1) // count + 1)
    }
    return [orders[i // count][i % count] for i in range(first, last)]


def by_length(groups: Sequence[Group], size: int) -> list[list[Group]]:
    """Groups of similar length in micro-batches of at most `size` examples; a larger group gets its own."""
    found: list[list[Group]] = []
    room = 0
    for group in sorted(groups, key=lambda group: max(len(example.ids) for example in group)):
        if len(group) > room:
            found.append([])
            room = size
        found[-1].append(group)
        room -= len(group)
    return found


def ungrouped(examples: Iterable[Example]) -> list[Group]:
    """Each example as a group of its own."""
    return [(example,) for example in examples]


def numbered(groups: Sequence[Group]) -> list[Group]:
    """The groups, whose examples have the signal `group`: the place of their group among these."""
    return [
        tuple(replace(example, signals={**example.signals, "group": float(place)}) for example in group)
        for place, group in enumerate(groups)
    ]


def examples_of(groups: Iterable[Group]) -> list[Example]:
    """The examples of groups, in order."""
    return [example for group in groups for example in group]


def micro_batches(groups: Sequence[Group], size: int, pad_id: int) -> list[Batch]:
    """One step's groups as micro-batches of rows of similar length: less padding, same sum."""
    return [collate(examples_of(part), pad_id) for part in by_length(groups, size)]
