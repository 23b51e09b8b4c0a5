"""Pictures of runs and reports. matplotlib is imported here only, late, without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .run_folder import RunFolder

COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")


def _figure(columns: int, width: float = 4.2) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def accuracy(report: Mapping[str, Any], file: Path) -> None:
    """Sampled accuracy with its 95 % interval, greedy as a mark; a panel a task."""
    tasks = sorted({task for run in report["runs"].values() for task in run["tasks"]})
    figure, axes = _figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        runs = [(name, run["tasks"][task]) for name, run in report["runs"].items() if task in run["tasks"]]
        for i, (_, r) in enumerate(runs):
            error = [[r["avg"] - r["ci95"][0]], [r["ci95"][1] - r["avg"]]]
            axis.bar(i, r["avg"], yerr=error, capsize=4, color=COLOURS[i % len(COLOURS)], width=0.6)
            axis.plot(i, r["greedy"], marker="D", color="black", markersize=5, linestyle="none")
        axis.set_xticks(range(len(runs)), [name for name, _ in runs])
        axis.set_ylim(0, 1)
        axis.set_title(task, fontsize=11)
        axis.set_ylabel("share correct")
    figure.suptitle("bars: sampled, with 95 % interval; diamonds: greedy", fontsize=9)
    _save(figure, file)


def curves(folders: Mapping[str, RunFolder], file: Path) -> None:
    """Plain NLL, mean target probability and entropy of each training step, whatever the objective."""
    panels = {
        "nll": "NLL (nats a token)",
        "mean_probability": "mean target probability",
        "entropy": "entropy (nats)",
    }
    figure, axes = _figure(len(panels))
    for i, (name, folder) in enumerate(folders.items()):
        lines = folder.metrics()
        for axis, key in zip(axes, panels, strict=True):
            if lines:
                steps = [line["step"] for line in lines]
                axis.plot(
                    steps, [line[key] for line in lines], label=name, color=COLOURS[i % len(COLOURS)], lw=1.4
                )
    for axis, label in zip(axes, panels.values(), strict=True):
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=11)
    if axes[0].get_lines():
        axes[0].legend(frameon=False)
    _save(figure, file)
