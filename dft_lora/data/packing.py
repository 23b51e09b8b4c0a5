"""Several examples in one row, nothing between them; each sees itself alone.

A row of three examples, a of 2, b of 3 and c of 2 tokens, their first tokens being prompts:

    ids        a a b b b c c         attends to   a a b b b c c
    positions  0 1 0 1 2 0 1                  a   x
    labels     . a . b b . c                  a   x x
                                              b       x
    The label of an example's first           b       x x
    token is never set: its prediction        b       x x x
    would come from another example.          c             x
                                              c             x x

Positions that start again tell transformers where an example begins: flash attention becomes its
variable-length form, and elsewhere the mask above is built. The examples of a step stay the same, and so does
its sum: packing moves rows, never the optimizer step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from .batches import IGNORE, Batch, micro_batches
from .templates import Example

Arrange = Callable[[Sequence[Example], int, int], list[Batch]]
"""(a step's examples, rows of a micro-batch, pad id) -> micro-batches."""


@dataclass(frozen=True)
class Packed:
    """Rows of at most `capacity` tokens, as many of them in a micro-batch as there would be examples.

    `flat`: a micro-batch is one row with no padding at all, as variable-length attention wants it. Without it
    the rows stand below each other, which keeps a block mask at [rows, capacity, capacity].
    """

    capacity: int
    flat: bool = False

    def __call__(self, examples: Sequence[Example], size: int, pad_id: int) -> list[Batch]:
        rows = fill(examples, self.capacity)
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.flat:
            groups = [[[example for row in group for example in row]] for group in groups]
        return [collate_packed(group, pad_id) for group in groups]


def arrangement(packing: bool | str, capacity: int, varlen: bool) -> Arrange:
    """How a step's examples become micro-batches; `varlen`: variable-length attention is at hand.

    `auto` packs only there. With a block mask a row of L tokens costs L^2 however short its examples are: on
    a CPU that is slower than padding rows of similar length (docs/measurements/lowres.md).
    """
    wanted = varlen if packing == "auto" else packing
    return Packed(capacity, flat=varlen) if wanted else micro_batches


def fill(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Examples in rows of nearly equal length, at most `capacity` tokens each, in few rows.

    The longest goes first, each into the emptiest row (Graham 1969); a row more where that does not fit. Rows
    of equal length waste no padding beside each other, and none of them sets a peak of memory alone.
    """
    longest_first = sorted(examples, key=lambda example: len(example.ids), reverse=True)
    total = sum(len(example.ids) for example in examples)
    for n in count(math.ceil(total / capacity)):
        rows: list[list[Example]] = [[] for _ in range(n)]
        loads = [(0, row) for row in range(n)]
        for example in longest_first:
            load, row = loads[0]
            rows[row].append(example)
            heapq.heapreplace(loads, (load + len(example.ids), row))
        if max(loads)[0] <= capacity:
            return rows
        if n >= len(examples):
            raise ValueError(f"capacity: an example of {len(longest_first[0].ids)} tokens exceeds {capacity}")
    raise AssertionError  # count() does not end


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """One batch of packed rows, padded on the right to the longest."""
    longest = max(sum(len(example.ids) for example in row) for row in rows)
    input_ids_BL = torch.full((len(rows), longest), pad_id)
    mask_BL = torch.zeros_like(input_ids_BL)
    labels_BL = torch.full_like(input_ids_BL, IGNORE)
    positions_BL = torch.zeros_like(input_ids_BL)
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            ids, end = torch.tensor(example.ids), start + len(example.ids)
            unsupervised = max(1, example.prompt_length)
            input_ids_BL[b, start:end] = ids
            labels_BL[b, start + unsupervised : end] = ids[unsupervised:]
            positions_BL[b, start:end] = torch.arange(len(ids))
            start = end
        mask_BL[b, :start] = 1
        positions_BL[b, start:] = torch.arange(longest - start)  # padding is one more example, of its own
    names = tuple(example.id for row in rows for example in row)
    return Batch(input_ids_BL, mask_BL, labels_BL, names, positions_BL)
