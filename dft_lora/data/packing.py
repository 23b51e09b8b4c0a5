"""Several examples in one row, nothing between them; each attends only to itself.

A row of three examples, a with 2 tokens, b with 3 and c with 2; the first token of each is its prompt:

    ids        a a b b b c c         attends to   a a b b b c c
    positions  0 1 0 1 2 0 1                  a   x
    labels     . a . b b . c                  a   x x
                                              b       x
    The label of an example's first           b       x x
    token is never set: its prediction        b       x x x
    would come from another example.          c             x
                                              c             x x

Where positions restart, transformers knows that an example begins: flash attention uses its variable-length
form, and other kinds of attention get the mask above. The examples of a step stay the same, and so does its
sum: packing rearranges rows and leaves the optimizer step as it is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .batches import IGNORE, Batch, Group, by_length, collate, examples_of, rounded, ungrouped, write_signals
from .templates import Example

Arrange = Callable[[Sequence[Group], int, int], list[Batch]]
"""(a step's groups, rows per micro-batch, pad id) -> micro-batches; no group is split over two of them."""


@dataclass(frozen=True)
class Packed:
    """Rows of at most `capacity` tokens; a micro-batch has as many rows as it would have examples.

    `flat`: a micro-batch is one row without any padding, as variable-length attention needs it. Otherwise the
    rows form a rectangle, which limits a block mask to [rows, capacity, capacity].
    """

    capacity: int
    flat: bool = False

    def __call__(self, groups: Sequence[Group], size: int, pad_id: int) -> list[Batch]:
        parts: list[list[list[Example]]] = []
        for rows in fill(groups, self.capacity):
            if not parts or len(parts[-1]) + len(rows) > size:
                parts.append([])
            parts[-1] += rows
        if self.flat:
            parts = [[[example for row in rows for example in row]] for rows in parts]
        return [collate_packed(rows, pad_id, padded=not self.flat) for rows in parts]

    def most_rows(self, groups: Sequence[Group]) -> int:
        """Rows of the longest group."""
        return sum(map(len, fill([max(groups, key=_tokens)], self.capacity)))


@dataclass(frozen=True)
class CheapestPacking:
    """Micro-batches of similar lengths, each in the number of rows that costs least with a block mask.

    Fewer rows waste less padding, but attention computes whole rows: a row of L tokens costs L + L^2 / X. X,
    the `crossover_length`, is the length at which attention costs as much as all matrix products together. No
    micro-batch costs more, or holds more examples, than one of padded rows.
    """

    crossover_length: float

    def __call__(self, groups: Sequence[Group], size: int, pad_id: int) -> list[Batch]:
        return [self._collate(examples_of(part), pad_id) for part in by_length(groups, size)]

    def _collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        ways = [spread(ungrouped(examples), n) for n in range(len(examples), 0, -1)]
        rows = min(ways, key=self._cost)
        return collate(examples, pad_id) if len(rows) == len(examples) else collate_packed(rows, pad_id)

    def _cost(self, rows: list[list[Example]]) -> float:
        longest = rounded(max(map(_tokens, rows)))
        return len(rows) * longest * (1 + longest / self.crossover_length)


def fill(groups: Sequence[Group], capacity: int) -> list[list[list[Example]]]:
    """Groups in few rows of nearly equal length, at most `capacity` tokens each: [rows to keep together].

    A group takes one row. Only a group that does not fit in one takes several, which are kept together. Rows
    have room for the longest example: a prompt of at most `data.max_length` with a sampled answer can exceed
    `capacity`.
    """
    capacity = max([capacity, *(len(example.ids) for example in examples_of(groups))])
    small = [group for group in groups if _tokens(group) <= capacity]
    whole = [[row] for row in _fewest(small, capacity)] if small else []
    large = [group for group in groups if _tokens(group) > capacity]
    return [*whole, *(_fewest(ungrouped(group), capacity) for group in large)]


def _fewest(groups: Sequence[Group], capacity: int) -> list[list[Example]]:
    """The fewest rows of at most `capacity` tokens that `spread` can put the groups into; each fits one."""
    n = math.ceil(sum(map(_tokens, groups)) / capacity)
    while max(map(_tokens, rows := spread(groups, n))) > capacity:
        n += 1
    return rows


def spread(groups: Sequence[Group], n: int) -> list[list[Example]]:
    """Groups in n rows of nearly equal length: the longest first, each into the emptiest row (Graham 1969).

    Rows of equal length need no padding, and no single row sets the peak of memory.
    """
    rows: list[list[Example]] = [[] for _ in range(n)]
    loads = [(0, row) for row in range(n)]
    for group in sorted(groups, key=_tokens, reverse=True):
        load, row = loads[0]
        rows[row] += group
        heapq.heapreplace(loads, (load + _tokens(group), row))
    return rows


def _tokens(row: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in row)


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int, padded: bool = True) -> Batch:
    """One batch of packed rows, padded on the right to the longest. A single row may go unpadded."""
    longest = max(map(_tokens, rows))
    longest = rounded(longest) if padded else longest
    input_ids_BL = torch.full((len(rows), longest), pad_id)
    mask_BL = torch.zeros_like(input_ids_BL)
    labels_BL = torch.full_like(input_ids_BL, IGNORE)
    positions_BL = torch.zeros_like(input_ids_BL)
    signals_BL = {name: torch.zeros(labels_BL.shape) for name in rows[0][0].signals}
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            ids, end = torch.tensor(example.ids), start + len(example.ids)
            unsupervised = max(1, example.prompt_length)
            input_ids_BL[b, start:end] = ids
            labels_BL[b, start + unsupervised : end] = ids[unsupervised:]
            positions_BL[b, start:end] = torch.arange(len(ids))
            write_signals(signals_BL, b, start, example)
            start = end
        mask_BL[b, :start] = 1
        positions_BL[b, start:] = torch.arange(longest - start)  # padding is an example of its own
    names = tuple(example.id for row in rows for example in row)
    return Batch(input_ids_BL, mask_BL, labels_BL, names, positions_BL, signals_BL)
