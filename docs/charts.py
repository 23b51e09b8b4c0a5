"""Draw the README's charts from recorded results: `python docs/charts.py`.

real.png        SFT, DFT and its remedies on a real base (docs/results/real.json)
accuracy.png    the demo: base, SFT and DFT after each training set (docs/results/demo-*.json)
loss.png        the loss engine against its peers (dft_lora/bench/results/loss-cpu-prescribed-bfloat16.json)
lab.png         mean rank of every objective over the lab's regimes (docs/results/lab.json, where it is there)
step.png        a training step against TRL's (dft_lora/bench/results/train-peers-bfloat16.json)
rl.png          accuracy against cost of SFT, DFT and RL methods (docs/results/rl.json), once it is recorded
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.transforms import Bbox

DOCS = Path(__file__).resolve().parent
CHARTS, RESULTS, BENCH = DOCS / "charts", DOCS / "results", DOCS.parent / "dft_lora" / "bench" / "results"
SETS = {"train": "8 % wrong steps", "train-clean": "no wrong steps"}
COLOURS = {"base": "#6b7280", "sft": "#2563eb", "dft": "#d97706"}
OURS, PEER = "#d97706", "#9ca3af"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def save(figure: Any, name: str) -> None:
    CHARTS.mkdir(exist_ok=True)
    figure.savefig(
        CHARTS / name, dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None}
    )
    plt.close(figure)


def real() -> None:
    """SFT, DFT and its remedies on the real bases: sampled accuracy as bars, greedy as diamonds."""
    recorded = read(RESULTS / "real.json")["bases"]
    bases = {
        base: parts["remedies"]["found"]
        for base, parts in recorded.items()
        if "remedies" in parts and not base.startswith("tiny")
    }
    if not bases:
        return
    across = max(len(found["sft"]["ended"]) for found in bases.values())
    size = (10, 2.8 * len(bases))
    figure, rows = plt.subplots(
        len(bases), across, figsize=size, sharey="row", squeeze=False, layout="constrained"
    )
    for (base, found), row in zip(bases.items(), rows, strict=True):
        for axis, task in zip(row, found["sft"]["ended"], strict=False):  # a base may lack the last set
            remedies_of(axis, found, task)
            axis.set_title(f"{base}: {task}" if len(bases) > 1 else task, fontsize=10)
    for axis in rows[-1]:
        axis.set_xlabel("percent correct (right: ended)", fontsize=9)
    axis = rows[0][-1]
    axis.plot([], [], "D", color="white", markeredgecolor="black", label="greedy")
    axis.bar([0], [0], color="#d1d5db", label="sampled at T = 1")
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=2)
    save(figure, "real.png")


def remedies_of(axis: plt.Axes, found: dict[str, Any], task: str) -> None:
    """A bar, a diamond and the share of ended answers for each kind of run on one test set."""
    labels = []
    for y, (kind, line) in enumerate(reversed(found.items())):
        colour = COLOURS["sft"] if kind == "sft" else PEER if kind == "plain dft" else COLOURS["dft"]
        greedy = 100 * line["accuracy"][f"{task} greedy"]
        axis.barh(y, 100 * line["accuracy"][task], color=colour, height=0.7)
        axis.plot(greedy, y, "D", color="white", markeredgecolor="black", markersize=6)
        axis.text(101, y, f"{100 * line['ended'][task]:.0f} %", va="center", ha="right", fontsize=8)
        labels.append("dft with a floor" if kind == "dft" else kind)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlim(0, 102)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.2)


def accuracy() -> None:
    """Sampled accuracy as bars (mean of seeds; the line spans them), greedy as diamonds."""
    reports = [read(path) for path in sorted(RESULTS.glob("demo-*.json"))]
    tasks = list(reports[0]["runs"]["base"]["tasks"])
    figure, axes = plt.subplots(1, len(tasks), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, task in zip(axes, tasks, strict=True):
        places, labels = [], []
        for s, (split, name) in enumerate(SETS.items()):
            recorded = [r for r in reports if r["runs"]["dft"]["data"]["split"] == split]
            for i, run in enumerate(COLOURS):
                results = [r["runs"][run]["tasks"][task] for r in recorded]
                sampled = [100 * result["avg"] for result in results]
                x = s * 4 + i
                axis.bar(
                    x,
                    np.mean(sampled),
                    color=COLOURS[run],
                    width=0.8,
                    label=run if axis is axes[0] and not s else None,
                )
                axis.plot([x, x], [min(sampled), max(sampled)], color="black", lw=1.2)
                greedy = np.mean([100 * result["greedy"] for result in results])
                axis.plot(x, greedy, "D", color="white", markeredgecolor="black", markersize=6)
            places.append(s * 4 + 1)
            labels.append(f"trained on\n{name}")
        axis.set_xticks(places, labels)
        axis.set_title(task, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.2)
    axes[0].set_ylabel("percent correct")
    axes[0].legend(frameon=False, ncols=3, fontsize=9, loc="upper center")
    axes[0].set_ylim(0, 95)
    axes[1].plot([], [], "D", color="white", markeredgecolor="black", label="greedy")
    axes[1].bar([0], [0], color="#d1d5db", label="sampled at T = 1; the line spans the seeds")
    axes[1].legend(frameon=False, fontsize=9, loc="upper right")
    save(figure, "accuracy.png")


def loss() -> None:
    """Time over two bare GEMMs, with peak memory beside each bar."""
    result = read(BENCH / "loss-cpu-prescribed-bfloat16.json")
    rows = [(name, row) for name, row in result["variants"].items() if not row["missing"]]
    rows.sort(key=lambda row: row[1]["ratio"])
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(rows) + 0.9), layout="constrained")
    for y, (name, row) in enumerate(reversed(rows)):
        colour = OURS if name.startswith("ours") else "#374151" if "bare" in name else PEER
        axis.barh(y, row["ratio"], color=colour)
        axis.text(
            row["ratio"] * 1.05, y, f"{row['ratio']:.2f}x, {row['peak_mb']:,.0f} MiB", va="center", fontsize=8
        )
    axis.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axis.minorticks_off()
    axis.set_xlim(0.8, 200)
    axis.set_xlabel("time of forward and backward pass over two bare GEMMs (log scale), peak memory")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "loss.png")


def step() -> None:
    """Seconds and memory of one training step."""
    result = read(BENCH / "train-peers-bfloat16.json")
    rows = [(name, row) for name, row in result["variants"].items() if row["runs"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(rows) + 0.9), sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes, ("seconds", "above_loaded_mb"), ("seconds per step", "MB above the loaded model"), strict=True
    ):
        for y, (name, row) in enumerate(reversed(rows)):
            axis.barh(y, row[key], color=OURS if name == "ours" else PEER)
            axis.text(
                row[key],
                y,
                f" {row[key]:,.2f}" if row[key] < 100 else f" {row[key]:,.0f}",
                va="center",
                fontsize=8,
            )
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
    save(figure, "step.png")


def lab() -> None:
    """Each objective's mean rank over the regimes that all have, best at the top, with its interval."""
    from dft_lora.experiments.lab_report import complete, ranks, scores_of

    if not (RESULTS / "lab.json").is_file():
        return
    if not (lines := complete(read(RESULTS / "lab.json"))):
        return
    found = list(ranks(scores_of(lines)).items())
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(found) + 1.1), layout="constrained")
    for y, (label, row) in enumerate(reversed(found)):
        colour = COLOURS.get(label, PEER)
        axis.plot(row["ci95"], [y, y], color=colour, lw=2.5, solid_capstyle="round")
        axis.plot(row["mean_rank"], y, "o", color=colour, ms=8)
    axis.set_yticks(range(len(found)), [label for label, _ in reversed(found)], fontsize=9)
    axis.set_xlabel(
        f"mean rank at T = 1 over {len(lines)} regimes; 1 is best; lines: 95 % intervals", fontsize=9
    )
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "lab.png")


def rl() -> None:
    """For each base: mean accuracy on its test sets against processor seconds of training."""
    file = RESULTS / "rl.json"
    if not file.is_file():
        return
    bases = read(file)["bases"]
    figure, axes = plt.subplots(
        len(bases), 2, figsize=(9, 3.6 * len(bases)), squeeze=False, layout="constrained"
    )
    found: list[tuple[plt.Axes, list[tuple[str, float, float, str]]]] = []
    for (name, base), row in zip(bases.items(), axes, strict=True):
        lines = {kind: part["found"] for kind, part in base["table"].items()}
        for axis, suffix in zip(row, ("", " greedy"), strict=True):
            columns = [task + suffix for task in base["settings"]["tasks"]]
            points: list[tuple[str, float, float, str]] = []
            for kind, line in lines.items():
                share = 100 * np.mean([line["accuracy"][column] for column in columns])
                if line["cost"] is None:
                    axis.axhline(share, color=COLOURS["base"], linestyle="--", linewidth=1)
                    continue
                seconds = np.mean([run["processor_seconds"] for run in line["cost"]])
                colour = OURS if kind.startswith("dft") else COLOURS["sft"] if kind == "sft" else "#374151"
                axis.plot(seconds, share, "o", color=colour, markersize=5)
                points.append((kind, seconds, share, colour))
            axis.set_xscale("log")
            axis.margins(x=0.45, y=0.12)
            for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
                ticks(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "125" else "")
            axis.set_title(f"{name}, {'greedy' if suffix else 'T = 1'}; dashed: the base", fontsize=10)
            axis.set_xlabel("processor seconds of training, sampling included (log scale)")
            axis.set_ylabel("percent correct, mean of the test sets")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.2)
            found.append((axis, points))
    figure.canvas.draw()  # labels are placed where the points have come to lie
    for axis, points in found:
        name_points(axis, points)
    save(figure, "rl.png")


def name_points(axis: plt.Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each name beside its point, at the first of eight places where it covers nothing."""
    places = [(5, 3, "left"), (-5, 3, "right"), (5, -9, "left"), (-5, -9, "right")]
    places += [(5, 12, "left"), (-5, 12, "right"), (5, -18, "left"), (-5, -18, "right")]
    dots = [axis.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in dots]
    for (name, x, y, colour), own in zip(points, list(taken), strict=True):
        for dx, dy, side in places:
            text = axis.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", fontsize=7, color=colour, ha=side
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken if other is not own):
                break
            text.remove()
        else:
            text = axis.annotate(name, (x, y), (5, 3), textcoords="offset points", fontsize=7, color=colour)
        taken.append(text.get_window_extent())


if __name__ == "__main__":
    for draw in (real, accuracy, loss, step, rl, lab):
        draw()
