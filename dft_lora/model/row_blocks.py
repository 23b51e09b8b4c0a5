"""Row by row work in blocks that stay in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 2**17
"""Of a block per thread: 512 KB in float32, half of a core's second-level cache."""


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of all rows: on a CPU blocks that fit in the cache, elsewhere one."""
    size = max(1, rows)
    if device.type == "cpu":
        size = max(64, torch.get_num_threads() * BLOCK_ELEMENTS // width)
    for start in range(0, rows, size):
        yield slice(start, start + size)
