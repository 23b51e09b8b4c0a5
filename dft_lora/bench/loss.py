"""`python -m dft_lora.bench loss`: time, memory and error of one forward and backward pass at the head.

Time: all variants in turn, round after round on the same inputs, the first round thrown away, medians;
process CPU time on a CPU, wall time around a synchronisation on a GPU. Memory: each variant once in a fresh
process, the peak above what was resident before; a variant slower than ten floors there is not timed again.
Error: relative Frobenius distance of the hidden states' gradient to float64.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..loss import naive_token_logps, token_logps
from ..model.memory import MIB, memory_of
from ..runs.provenance import certificate, versions
from .inputs import SOURCES, Inputs
from .peers import DFT, FLOOR, VARIANTS, LossVariant

RESULTS = Path(__file__).parent / "results"
SLOW = 10
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "triton")


def measure(
    *, source: str, N: int, D: int, V: int, dtype: str, device: str, rounds: int, threads: int, only: str = ""
) -> dict[str, Any]:
    """Every variant whose name contains `only`, and the floor: a JSON value with its provenance."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = SOURCES[source](N, D, V, dtype=getattr(torch, dtype))
    chosen = [variant for variant in VARIANTS if only in variant.name or variant is FLOOR]
    rows: dict[str, dict[str, Any]] = {v.name: {"missing": v.missing(device)} for v in chosen}
    variants = [variant for variant in chosen if not variant.missing(device)]
    x = x.to(device)
    truth_ND = true_gradient(x)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(vars(x), Path(folder) / "inputs.pt")
        for variant in variants:
            rows[variant.name] |= _in_fresh_process(variant, Path(folder), device, threads, truth_ND)
            _say("alone", variant, rows[variant.name]["first"])
    first = {variant: rows[variant.name]["first"] for variant in variants}
    fast = [variant for variant in variants if first[variant] <= SLOW * first[FLOOR]]
    seconds = {variant.name: [] if variant in fast else [first[variant]] for variant in variants}
    for round_ in range(rounds + 1):
        for variant in fast:
            spent, _ = run_variant(variant, x)
            _say(f"round {round_}", variant, spent)
            if round_:
                seconds[variant.name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    for name, spent in seconds.items():
        rows[name] |= {
            "seconds": spent,
            "median": medians[name],
            "ratio": medians[name] / medians[FLOOR.name],
        }
    return {
        "kind": "loss",
        "input": x.description,
        "shape": {"N": N, "M": len(x.supervised), "D": D, "V": V},
        "dtype": dtype,
        "device": _device_name(device),
        "threads": threads,
        "clock": "process CPU time" if device == "cpu" else "wall time, synchronised",
        "probability": _spread(x),
        "skip": _skip(x, truth_ND),
        "variants": rows,
        "provenance": certificate(peers=versions(PEERS)),
    }


def relative(gradient_ND: Tensor, truth_ND: Tensor) -> float:
    return float((gradient_ND.double() - truth_ND).norm() / truth_ND.norm())


def true_gradient(x: Inputs, rows: int = 32) -> Tensor:
    """The gradient of DFT's loss in float64 by the naive twin, a few rows at a time [N, D]."""
    weight_VD = x.weight_VD.double()
    gradients = []
    for h_CD, y_C in zip(x.hidden_ND.split(rows), x.targets_N.split(rows), strict=True):
        h_CD = h_CD.double().requires_grad_()
        DFT(naive_token_logps(h_CD, weight_VD, y_C)).backward()
        gradients.append(h_CD.grad)
    return torch.cat(gradients)


def run_variant(variant: LossVariant, x: Inputs) -> tuple[float, Tensor | None]:
    """(seconds, gradient) of one forward and backward pass."""
    cuda = x.hidden_ND.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    h_ND = x.hidden_ND.detach().clone().requires_grad_()
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    variant.run(h_ND, x)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start, h_ND.grad


def _skip(x: Inputs, truth_ND: Tensor) -> dict[str, float]:
    """What skip=1e-3 drops, the error it adds and its bound: norms in the summed loss's gradient."""

    def gradient(**options):
        h_ND = x.hidden_ND.detach().clone().requires_grad_()
        scores = token_logps(h_ND, x.weight_VD, x.targets_N, **options)
        DFT(scores).backward()
        return scores, h_ND.grad

    scores, skipping_ND = gradient(skip=1e-3, token_weight=DFT.token_weight)
    _, whole_ND = gradient()
    return {
        "rows": scores.skipped_rows / len(scores.index),
        "error": float((skipping_ND.double() - whole_ND.double()).norm()),
        "bound": scores.skip_bound,
        "gradient": float(truth_ND.norm()),
    }


def _spread(x: Inputs) -> dict[str, float]:
    p_M = token_logps(x.hidden_ND, x.weight_VD, x.targets_N).probability
    return {
        "mean": float(p_M.mean()),
        "below_0.1": float((p_M < 0.1).float().mean()),
        "above_0.9": float((p_M > 0.9).float().mean()),
    }


def _in_fresh_process(
    variant: LossVariant, folder: Path, device: str, threads: int, truth_ND: Tensor
) -> dict[str, float]:
    """Peak MiB above the resident inputs in one pass, its seconds and its gradient's error."""
    child = [sys.executable, "-m", "dft_lora.bench.loss", variant.name, str(folder), device, str(threads)]
    row = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
    if variant.exact:
        row["gradient_error"] = relative(torch.load(folder / "gradient.pt").to(truth_ND.device), truth_ND)
    return row


def _alone(name: str, folder: str, device: str, threads: str) -> dict[str, float]:
    """The child: one pass, alone in its process."""
    torch.set_num_threads(int(threads))
    variant = next(variant for variant in VARIANTS if variant.name == name)
    x = Inputs(**torch.load(Path(folder) / "inputs.pt"))
    warm_up(variant, x)
    memory = memory_of(x.hidden_ND.device)
    before = memory.now()
    memory.reset()
    first, gradient_ND = run_variant(variant, x)
    peak = memory.peak()
    torch.save(gradient_ND, Path(folder) / "gradient.pt")
    return {"peak_mb": (peak - before) / MIB, "first": first}


def warm_up(variant: LossVariant, x: Inputs) -> None:
    """A pass over four tokens and 512 words, so that imports and library set-up are not counted later."""
    some = torch.cat([x.supervised[:2], (x.targets_N == -100).nonzero()[:2, 0]])
    run_variant(
        variant, Inputs(x.hidden_ND[some], x.weight_VD[:512].clone(), x.targets_N[some].clamp(max=511), "")
    )


def _say(when: str, variant: LossVariant, seconds: float) -> None:
    print(f"{when:8} {variant.name:45} {seconds:8.3f} s", file=sys.stderr, flush=True)


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    print(json.dumps(_alone(*sys.argv[1:])))
