"""Metrics from the token tables of several runs: plain NLL, histograms, and which tokens changed most.

Legend: M tokens of the reference solutions, E solutions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..runs.folder import RunFolder
from . import statistics as st
from .token_table import TokenTable

BINS = 20  # of a histogram over probabilities
SHOWN = 12  # tokens listed per run and direction
SEEN = 3  # occurrences that a token needs to be listed


def token_metrics(folders: Mapping[str, RunFolder]) -> dict[str, Any]:
    """The metrics of every run on each scored text, with changes relative to the first run.

    A run whose table holds other tokens than the first run's gets no changes. Tables that were computed with
    another adapter than the run has now are ignored.
    """
    found: dict[str, dict[str, TokenTable]] = defaultdict(dict)
    for name, folder in folders.items():
        for file in sorted((folder.path / "evaluation").glob("*.tokens.safetensors")):
            if TokenTable.weights(file).get("adapter") == (folder.adapter_digest or ""):
                title = file.name.removesuffix(".tokens.safetensors")
                found[title][name] = TokenTable.load(file)
    return {title: _metrics(tables) for title, tables in found.items()}


def summary(table: TokenTable) -> dict[str, Any]:
    """The metrics of one table; `nll` and its interval are means over solutions, the others over tokens."""
    return {
        "tokens": len(table.ids_M),
        "nll": float(table.nll_E.mean()),
        "nll_ci95": list(st.unbounded_interval(table.nll_E)),
        "mean_probability": float(table.p_M.mean()),
        "p_end": float(table.end_E.mean()),
        **({} if table.top1_M is None else {"token_accuracy": float(table.top1_M.mean())}),
        "entropy": float(table.entropy_M.mean()),
        "share_below_0.1": float((table.p_M < 0.1).mean()),
        "share_above_0.9": float((table.p_M > 0.9).mean()),
    }


def _metrics(tables: Mapping[str, TokenTable]) -> dict[str, Any]:
    first = next(iter(tables.values()))
    metrics: dict[str, Any] = {}
    for name, table in tables.items():
        edges = np.linspace(0, 1, BINS + 1)
        bin_M = np.minimum((table.p_M * BINS).astype(int), BINS - 1)
        count = np.bincount(bin_M, minlength=BINS)
        pull = np.bincount(bin_M, table.pull_M, minlength=BINS) / np.maximum(count, 1)
        dft = np.bincount(bin_M, table.pull_M * table.p_M, minlength=BINS) / np.maximum(count, 1)
        metrics[name] = {
            **summary(table),
            "edges": edges.tolist(),
            "histogram": count.tolist(),
            "sft_gradient": pull.tolist(),
            "dft_gradient": dft.tolist(),
        }
        if table is not first and np.array_equal(table.ids_M, first.ids_M):
            metrics[name]["nll_change_ci95"] = list(st.unbounded_interval(table.nll_E - first.nll_E))
            metrics[name]["gained"], metrics[name]["suppressed"] = _movers(first, table)
    return metrics


def _movers(before: TokenTable, after: TokenTable) -> tuple[list[list[float]], list[list[float]]]:
    """[id, occurrences, mean change in probability] of the tokens that gained most and lost most."""
    ids, of_M, seen = np.unique(before.ids_M, return_inverse=True, return_counts=True)
    change = np.bincount(of_M, after.p_M - before.p_M) / seen
    order = [int(i) for i in np.argsort(change) if seen[i] >= SEEN]
    entry = [[int(ids[i]), int(seen[i]), float(change[i])] for i in order]
    return [e for e in entry[::-1][:SHOWN] if e[2] > 0], [e for e in entry[:SHOWN] if e[2] < 0]
