"""Metrics from the token tables of several runs: plain NLL, histograms, and which tokens changed most.

Legend: T tokens of the reference solutions, E solutions.
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


def _metrics(tables: Mapping[str, TokenTable]) -> dict[str, Any]:
    first = next(iter(tables.values()))
    metrics: dict[str, Any] = {}
    for name, table in tables.items():
        edges = np.linspace(0, 1, BINS + 1)
        bin_T = np.minimum((table.p_T * BINS).astype(int), BINS - 1)
        count = np.bincount(bin_T, minlength=BINS)
        pull = np.bincount(bin_T, table.pull_T, minlength=BINS) / np.maximum(count, 1)
        dft = np.bincount(bin_T, table.pull_T * table.p_T, minlength=BINS) / np.maximum(count, 1)
        metrics[name] = {
            "tokens": len(table.ids_T),
            "nll": float(table.nll_E.mean()),
            "nll_ci95": list(st.unbounded_interval(table.nll_E)),
            "mean_probability": float(table.p_T.mean()),
            "entropy": float(table.entropy_T.mean()),
            "share_below_0.1": float((table.p_T < 0.1).mean()),
            "share_above_0.9": float((table.p_T > 0.9).mean()),
            "edges": edges.tolist(),
            "histogram": count.tolist(),
            "sft_gradient": pull.tolist(),
            "dft_gradient": dft.tolist(),
        }
        if table is not first and np.array_equal(table.ids_T, first.ids_T):
            metrics[name]["nll_change_ci95"] = list(st.unbounded_interval(table.nll_E - first.nll_E))
            metrics[name]["gained"], metrics[name]["suppressed"] = _movers(first, table)
    return metrics


def _movers(before: TokenTable, after: TokenTable) -> tuple[list[list[float]], list[list[float]]]:
    """[id, occurrences, mean change in probability] of the tokens that gained most and lost most."""
    ids, of_T, seen = np.unique(before.ids_T, return_inverse=True, return_counts=True)
    change = np.bincount(of_T, after.p_T - before.p_T) / seen
    order = [int(i) for i in np.argsort(change) if seen[i] >= SEEN]
    entry = [[int(ids[i]), int(seen[i]), float(change[i])] for i in order]
    return [e for e in entry[::-1][:SHOWN] if e[2] > 0], [e for e in entry[:SHOWN] if e[2] < 0]
