"""A key-value cache whose rows come and go.

Ragged and right-aligned, as after left padding: of T columns in use, a row of length l has the last l.
A forward appends its columns on the right for every row; a row that leaves gives its place to the last one;
rows that come are written into free places.

    row 0  . . a b c d        the next step appends e, f, g on the right; when row 0 leaves, row 2
    row 1  . . . . h i        takes its place and the window shrinks to the longest row that stays
    row 2  . j k l m n

transformers' DynamicCache copies all it holds at every token (and again whenever rows are selected). Here
columns are written in place into spare room, and a row that leaves costs the copy of one row.

Shapes: R rows, H key-value heads, T columns, D head size.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

SPARE = (
    64  # columns of room at each reallocation, besides a quarter of the width: one copy in 64 tokens or more
)


def room_for(columns: int) -> int:
    """Columns that are reserved when `columns` are in use."""
    return columns + columns // 4 + SPARE


def filled(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that has rows."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


class RaggedLayer(DynamicLayer):
    """`keys` and `values` [R, H, T, D] are windows onto larger buffers: rows [:R], columns [end - T : end].

    Every layer keeps its whole past, sliding windows too (masked by the model, not cut here): rows of
    different ages could not share a cache that is cut for all of them at once.
    """

    rows = columns = end = 0
    buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append columns to every row."""
        states, new = (key_states, value_states), key_states.shape[2]
        if self.end + new > self.buffers[0].shape[2]:
            self._reserve(self.rows, self.columns, states)
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[: self.rows, :, self.end : self.end + new] = state
        self.end += new
        return self._window(self.rows, self.columns + new)

    def add(self, other: CacheLayerMixin, repeat_N: Tensor, expected_rows: int = 0) -> None:
        """See RaggedCache."""
        states = filled(other)
        rows, columns = self.rows + len(repeat_N), max(self.columns, states[0].shape[2])
        if not self.buffers or rows > self.buffers[0].shape[0] or columns > self.end:
            self._reserve(max(rows, expected_rows), columns, states)
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[self.rows : rows, :, self.end - state.shape[2] : self.end] = state[repeat_N]
        self._window(rows, columns)
        self.is_initialized = True

    def drop(self, holes_N: Tensor, movers_N: Tensor, rows: int, columns: int) -> None:
        """See RaggedCache."""
        for state in filled(self):
            state[holes_N, :, -columns:] = state[movers_N, :, -columns:]
        self._window(rows, columns)

    def _window(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        self.rows, self.columns = rows, columns
        keys, values = (buffer[:rows, :, self.end - columns : self.end] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def _reserve(self, rows: int, columns: int, like: tuple[Tensor, Tensor]) -> None:
        """Move the window into buffers for `rows`, its right edge at `columns`, with room to spare behind it.

        Zeros, not empty: masked columns are multiplied by 0, which does not undo a NaN.
        """
        room = room_for(columns)
        old, edge = self.buffers, self.end
        self.buffers = tuple(s.new_zeros(rows, s.shape[1], room, s.shape[3]) for s in like)
        self.end = columns
        for buffer, was in zip(self.buffers, old, strict=False):
            buffer[: self.rows, :, columns - self.columns : columns] = was[
                : self.rows, :, edge - self.columns : edge
            ]


class RaggedCache(Cache):
    """A transformers cache of `RaggedLayer`s."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=RaggedLayer)

    @property
    def ragged(self) -> list[RaggedLayer]:
        """`layers`, which transformers types as layers of any kind."""
        return cast(list[RaggedLayer], self.layers)

    def add(self, other: Cache, repeat_N: Tensor, expected_rows: int = 0) -> None:
        """Add rows repeat_N[0], repeat_N[1], ... of `other`, as often as they are named, below those here.

        `expected_rows`: how many rows there will be soon; buffers that must grow grow to that at once.
        """
        self.layers = self.layers or [RaggedLayer() for _ in other.layers]
        for layer, more in zip(self.ragged, cast(list[CacheLayerMixin], other.layers), strict=True):
            layer.add(more, repeat_N, expected_rows)

    def drop(self, holes_N: Tensor, movers_N: Tensor, rows: int, columns: int) -> None:
        """Put rows `movers_N` into places `holes_N`; then keep the first `rows` and the last `columns`."""
        for layer in self.ragged:
            layer.drop(holes_N, movers_N, rows, columns)
