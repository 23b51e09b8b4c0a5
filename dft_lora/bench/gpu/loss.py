"""The loss against its peers, and the Triton row kernel against torch operations.

Shapes (docs/shapes.md): N positions, C rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from ...loss.forward import kernel_missing
from ...loss.head import Head
from ...loss.row_statistics import torch_row_sums_
from ...model.memory import MIB
from ..inputs import Inputs, prescribed
from ..loss import relative, run_variant, true_gradient, warm_up
from ..peers import FLOOR, VARIANTS, LossVariant
from .lab import Lab, Result, attempt, synchronize

V, SMALL_V = 151_936, 700
ROUNDS = 3
CHECKED = 256
"""Supervised rows whose gradient is compared with float64; each row's depends on that row alone."""


def against_peers(lab: Lab, D: int, N: int) -> Iterator[tuple[str, Result]]:
    """Every variant in turn: time against the bare GEMMs, peak memory, error of the gradient."""
    D, N, vocabulary = (32, 60, SMALL_V) if lab.small else (D, N, V)
    x = prescribed(N, D, vocabulary, dtype=lab.dtype, device=lab.device)
    checked_C = x.supervised[:CHECKED]
    truth_CD = true_gradient(Inputs(x.hidden_ND[checked_C], x.weight_VD, x.targets_N[checked_C], ""))
    floor = None
    for variant in VARIANTS:
        if why := variant.missing(lab.device.type):
            yield variant.name, {"missing": why}
            continue
        found = attempt(lambda variant=variant: _figures(lab, variant, x, checked_C, truth_CD))
        floor = found.get("seconds") if variant is FLOOR else floor
        if floor and "seconds" in found:
            found["ratio"] = found["seconds"] / floor
        yield variant.name, found


def _figures(
    lab: Lab, variant: LossVariant, x: Inputs, checked_C: torch.Tensor, truth_CD: torch.Tensor
) -> Result:
    warm_up(variant, x)
    with lab.gauge() as memory:
        memory.reset()
        before = memory.now()
        _, gradient_ND = run_variant(variant, x)
        found: Result = {"peak_mb": (memory.peak() - before) / MIB}
    seconds = [run_variant(variant, x)[0] for _ in range(ROUNDS)]
    found["seconds"] = statistics.median(seconds)
    if variant.exact and gradient_ND is not None:
        found["gradient_error"] = relative(gradient_ND[checked_C], truth_CD)
    return found


def row_kernel(lab: Lab) -> Iterator[tuple[str, Result]]:
    """The pass over 512 rows of logits: the kernel, and the same in torch operations."""
    rows, vocabulary = (4, SMALL_V) if lab.small else (512, V)
    generator = torch.Generator(lab.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 6 * torch.randn(*shape, generator=generator, device=lab.device)

    u_CV, shift_C = draw(rows, vocabulary).to(lab.dtype), draw(rows).to(lab.dtype)
    y_C = torch.arange(rows, device=lab.device)
    head = Head(torch.empty(vocabulary, 1, device=lab.device), None, 1.0, None)

    def seconds(row_sums_: Callable) -> float:
        work = [u_CV.clone() for _ in range(ROUNDS + 1)]
        took = []
        for u in work:
            synchronize(lab.device)
            started = time.perf_counter()
            row_sums_(u, shift_C, y_C, head, write=True, needs=frozenset())
            synchronize(lab.device)
            took.append(time.perf_counter() - started)
        return statistics.median(took[1:])

    plain = seconds(torch_row_sums_)
    yield "torch operations", {"seconds": plain}
    if why := kernel_missing():
        yield "kernel", {"missing": why}
        return
    from ...loss.row_kernel import row_sums_

    kernel = seconds(row_sums_)
    moved = 3 * u_CV.nbytes / kernel / 1e9
    yield "kernel", {"seconds": kernel, "times_as_fast": plain / kernel, "gb_per_second": moved}
