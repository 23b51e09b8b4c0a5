"""Plots of runs and reports. Only this file imports matplotlib, late and without a display."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

from .folder import RunFolder

HEIGHT = 3.4
LINE = 48  # characters below a panel
COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")


def _figure(columns: int, width: float = 4.2) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, HEIGHT))
    FigureCanvasAgg(figure)
    wide = width * columns
    # Margins in inches. A layout engine would draw everything twice, at the end of every run.
    figure.subplots_adjust(0.7 / wide, 0.55 / HEIGHT, 1 - 0.15 / wide, 1 - 0.55 / HEIGHT, wspace=0.3)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def accuracy(report: Mapping[str, Any], file: Path) -> None:
    """Sampled accuracy with its 95 % interval, greedy as a diamond; one panel per task."""
    tasks = sorted({task for run in report["runs"].values() for task in run["tasks"]})
    figure, axes = _figure(len(tasks))
    lines = []
    for axis, task in zip(axes, tasks, strict=True):
        runs = [(name, run["tasks"][task]) for name, run in report["runs"].items() if task in run["tasks"]]
        for i, (name, r) in enumerate(runs):
            colour = COLOURS[list(report["runs"]).index(name) % len(COLOURS)]
            error = [[r["avg"] - r["ci95"][0]], [r["ci95"][1] - r["avg"]]]
            axis.bar(i, r["avg"], yerr=error, capsize=4, color=colour, width=0.6)
            axis.plot(i, r["greedy"], marker="D", color="black", markersize=5, linestyle="none")
        names = [fill(name, max(8, LINE // len(runs))) for name, _ in runs]
        axis.set_xticks(range(len(runs)), names, fontsize=8)
        lines.append(max(name.count("\n") for name in names))
        axis.set_ylim(0, 1)
        axis.set_title(task, fontsize=11)
        axis.set_ylabel("share correct")
    figure.subplots_adjust(bottom=min(0.6, (0.4 + 0.14 * max(lines)) / HEIGHT))
    figure.suptitle("bars: sampled, with 95 % interval; diamonds: greedy", fontsize=9)
    _save(figure, file)


def curves(folders: Mapping[str, RunFolder], file: Path) -> None:
    """Plain NLL, probabilities and entropy over the training steps, whatever the objective."""
    panels = {
        "nll": "NLL (nats per token)",
        "mean_probability": "mean target probability",
        "p_end": "mean probability of the end token",
        "entropy": "entropy (nats)",
    }
    figure, axes = _figure(len(panels))
    for i, (name, folder) in enumerate(folders.items()):
        lines = folder.metrics()
        for axis, key in zip(axes, panels, strict=True):
            if lines:
                steps = [line["step"] for line in lines]
                values = [line.get(key) for line in lines]  # older runs lack p_end
                axis.plot(steps, values, label=name, color=COLOURS[i % len(COLOURS)], lw=1.4)
    for axis, label in zip(axes, panels.values(), strict=True):
        axis.locator_params("y", nbins=4)
        axis.locator_params("x", nbins=4, integer=True)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=11)
    if axes[0].get_lines():
        axes[0].legend(frameon=False)
    _save(figure, file)


def probabilities(report: Mapping[str, Any], title: str, file: Path) -> None:
    """The paper's bimodal figure, target tokens by probability (log scale), and their gradient norms."""
    figure, (counts, pulls) = _figure(2)
    metrics = report["tokens"][title]
    for i, name in enumerate(report["runs"]):
        if name not in metrics:
            continue
        run = metrics[name]
        shares = [n / run["tokens"] for n in run["histogram"]]
        counts.stairs(shares, run["edges"], label=name, color=COLOURS[i % len(COLOURS)], lw=1.6)
    counts.set_yscale("log")
    counts.set_xlabel("probability of the target token")
    counts.set_title("share of tokens", fontsize=11)
    counts.legend(frameon=False)
    first, run = next(iter(metrics.items()))
    middles = [(a + b) / 2 for a, b in pairwise(run["edges"])]
    for key, label, colour in (
        ("sft_gradient", "SFT", COLOURS[1]),
        ("dft_gradient", "DFT (times p)", COLOURS[2]),
    ):
        drawn = [(x, y) for x, y, n in zip(middles, run[key], run["histogram"], strict=True) if n]
        pulls.plot(*zip(*drawn, strict=True), marker="o", markersize=3, label=label, color=colour, lw=1.4)
    pulls.set_xlabel("probability of the target token")
    pulls.set_title(f"mean gradient norm at the hidden state, {first}", fontsize=11)
    pulls.legend(frameon=False)
    _save(figure, file)


def steps(curves: Mapping[str, Mapping[str, list[dict[str, Any]]]], file: Path) -> None:
    """Sampled accuracy of the checkpoints with its 95 % interval; one panel per task."""
    tasks = sorted({task for by_task in curves.values() for task in by_task})
    figure, axes = _figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for i, (name, by_task) in enumerate(curves.items()):
            if entries := by_task.get(task):
                xs = [entry["step"] for entry in entries]
                low, high = zip(*(entry["ci95"] for entry in entries), strict=True)
                colour = COLOURS[i % len(COLOURS)]
                axis.plot(xs, [entry["avg"] for entry in entries], marker="o", label=name, color=colour)
                axis.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
        axis.set_xlabel("step")
        axis.set_ylabel("share correct")
        axis.set_title(task, fontsize=11)
        axis.legend(frameon=False)
    _save(figure, file)
