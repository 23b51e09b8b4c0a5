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

import torch

from .batches import IGNORE, Batch, by_length, collate, rounded, signals_of
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
        return [collate_packed(group, pad_id, padded=not self.flat) for group in groups]


@dataclass(frozen=True)
class Thrifty:
    """Micro-batches of similar examples, each in the number of rows that costs least with a block mask.

    Fewer rows waste less padding, but attention pays for whole rows: one of L tokens costs L + L^2 / `even`,
    where `even` is the length at which attention costs as much as all matrices together. No micro-batch
    costs, or holds, more than one of padded rows.
    """

    even: float

    def __call__(self, examples: Sequence[Example], size: int, pad_id: int) -> list[Batch]:
        return [self._collate(group, pad_id) for group in by_length(examples, size)]

    def _collate(self, group: Sequence[Example], pad_id: int) -> Batch:
        ways = [spread(group, n) for n in range(len(group), 0, -1)]
        rows = min(ways, key=self._cost)
        return collate(group, pad_id) if len(rows) == len(group) else collate_packed(rows, pad_id)

    def _cost(self, rows: list[list[Example]]) -> float:
        longest = rounded(max(map(_tokens, rows)))
        return len(rows) * longest * (1 + longest / self.even)


def fill(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Examples in rows of nearly equal length, at most `capacity` tokens each, in few rows."""
    for n in range(math.ceil(_tokens(examples) / capacity), len(examples) + 1):
        rows = spread(examples, n)
        if max(map(_tokens, rows)) <= capacity:
            return rows
    longest = max(len(example.ids) for example in examples)
    raise ValueError(f"capacity: an example of {longest} tokens exceeds {capacity}")


def spread(examples: Sequence[Example], n: int) -> list[list[Example]]:
    """Examples in n rows of nearly equal length: the longest first, each into the emptiest (Graham 1969).

    Rows of equal length waste no padding beside each other, and none of them sets a peak of memory alone.
    """
    rows: list[list[Example]] = [[] for _ in range(n)]
    loads = [(0, row) for row in range(n)]
    for example in sorted(examples, key=lambda example: len(example.ids), reverse=True):
        load, row = loads[0]
        rows[row].append(example)
        heapq.heapreplace(loads, (load + len(example.ids), row))
    return rows


def _tokens(row: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in row)


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int, padded: bool = True) -> Batch:
    """One batch of packed rows, padded on the right to the longest; one row alone may do without."""
    longest = max(map(_tokens, rows))
    longest = rounded(longest) if padded else longest
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
    examples = [example for row in rows for example in row]
    names = tuple(example.id for example in examples)
    return Batch(input_ids_BL, mask_BL, labels_BL, names, positions_BL, signals_of(examples))
