"""The recorded results of runs, read from their folders without a model or a plotting library.

Accuracy with intervals, paired differences, token probabilities of the reference solutions, how often each
problem was solved, and training curves: tables and SVG for gr.HTML, in the page's own colours.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..runs.folder import RunFolder, read_json, read_lines
from .text import plain
from .views import Legend, html_table, interval_bar

CURVES = (
    ("nll", "NLL, nats per token"),
    ("mean_probability", "mean probability of the target token"),
    ("p_end", "mean probability of the end token"),
    ("entropy", "entropy, nats"),
)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 170, 40, 24, 8
BINS = 5  # at most, for the share of a problem's samples that are correct
LEAST = 1e-4  # share of tokens at the bottom of the log scale


@dataclass(frozen=True)
class Recorded:
    """What was found on disk: the report, and the folders behind it by run name.

    `outdated` are runs whose report is of another adapter than they have now: they are named, not shown.
    """

    report: Mapping[str, Any]
    folders: Mapping[str, RunFolder]
    outdated: Sequence[RunFolder] = ()

    @classmethod
    def read(cls, folders: Sequence[RunFolder]) -> Recorded | None:
        """The report beside the runs that compares them; else their own reports together; else None.

        Raises DataError for a broken file.
        """
        by_name = {folder.name: folder for folder in folders}
        together = {folder.path.resolve().parent / "report.json" for folder in folders}
        for file in together if len(together) == 1 else ():
            said = _runs(read_json(file), file) if file.is_file() else {}
            if all(name in said and _current(folder, said[name]) for name, folder in by_name.items()):
                return cls(read_json(file), by_name)
        outdated = []
        runs: dict[str, Any] = {}
        tokens: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, folder in by_name.items():
            if folder.report_file.is_file():
                report = read_json(folder.report_file)
                own = _runs(report, folder.report_file)
                said = name if name in own else next(iter(own), name)
                if not _current(folder, own.get(said, {})):
                    outdated.append(folder)
                    continue
                runs[name] = own.get(said, {"tasks": {}})
                for text, figures in report.get("tokens", {}).items():
                    tokens[text] |= {name: figures[said]} if said in figures else {}
        if not runs and not outdated:
            return None
        shown = {name: folder for name, folder in by_name.items() if folder not in outdated}
        return cls({"runs": runs, "paired": [], "tokens": tokens}, shown, outdated)


def _current(folder: RunFolder, reported: Mapping[str, Any]) -> bool:
    return reported.get("adapter") == folder.adapter_digest


def _runs(report: Any, file: Path) -> dict[str, Any]:
    try:
        assert all("tasks" in run for run in report["runs"].values())
        return report["runs"]
    except (AssertionError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file}: not a report (no runs with tasks)") from None


def results_view(folders: Sequence[RunFolder]) -> str:
    """For gr.HTML: the folders' reports and training logs, or the command that makes a report."""
    recorded = Recorded.read(folders)
    label = Legend([folder.name for folder in folders])
    curves = _curves(label, {folder.name: folder.metrics() for folder in folders})
    if recorded is None:
        command = f"dft-lora evaluate {' '.join(str(folder.path) for folder in folders)}"
        how = f"To make them, run <code>{plain(command)}</code>."
        return f'<p class="nothing">No results yet. {how}</p>{curves}'
    report = recorded.report
    return "".join(
        (
            *map(_outdated, recorded.outdated),
            _accuracy(label, recorded),
            _texts(label, recorded),
            _paired(label, report.get("paired", []), set(recorded.folders)),
            _probabilities(label, recorded),
            _solved(label, recorded),
            curves,
            _provenance(report.get("provenance")),
        )
    )


def _outdated(folder: RunFolder) -> str:
    command = plain(f"dft-lora evaluate {folder.path} --overwrite")
    return (
        f'<p class="nothing">{plain(folder.name)}: its results are not of the adapter that it has now; '
        f"<code>{command}</code> makes new ones.</p>"
    )


def _entries(recorded: Recorded) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """[(task, [(run, its figures)])], in the report's order."""
    found = [
        (task, name, figures)
        for name in recorded.folders
        for task, figures in recorded.report["runs"].get(name, {"tasks": {}})["tasks"].items()
    ]
    order = list(dict.fromkeys(task for task, _, _ in found))
    found.sort(key=lambda entry: order.index(entry[0]))
    return [(task, [entry[1:] for entry in group]) for task, group in groupby(found, lambda entry: entry[0])]


# --- tables ---------------------------------------------------------------------------------------


def _accuracy(label: Legend, recorded: Recorded) -> str:
    head = [
        "run",
        "accuracy, 0 to 100 %",
        "sampled",
        "95 % interval",
        "greedy",
        "ended",
        "no answer",
    ]
    blocks = []
    for task, entries in _entries(recorded):
        rows = []
        for run, r in entries:
            low, high = r["ci95"]
            bar = f'<div class="wide">{interval_bar(100 * low, 100 * r["avg"], 100 * high)}</div>'
            shares = [_percent(r["greedy"]), _percent(1 - r["truncated"]), _percent(r["unparsable"])]
            interval = f"{_percent(low)} to {_percent(high)}"
            rows.append(
                [
                    label(run),
                    bar,
                    f"<b>{_percent(r['avg'])}</b>",
                    interval,
                    *shares,
                ]
            )
        size = f"{entries[0][1]['problems']} problems, {entries[0][1]['samples']} samples each"
        title = f'<h3>{plain(task)} <span class="small">{size}</span></h3>'
        blocks.append(title + html_table(head, rows, numbers=range(2, 7)))
    return "".join(blocks)


def _texts(label: Legend, recorded: Recorded) -> str:
    """Solutions of own test sets without reference answers, which are scored and not sampled."""
    rows = [
        [
            label(name),
            plain(text),
            str(r["rows"]),
            f"<b>{r['nll']:.3f}</b>",
            f"{r['nll_ci95'][0]:.3f} to {r['nll_ci95'][1]:.3f}",
            _percent(r["token_accuracy"]),
            f"{r['mean_probability']:.3f}",
            f"{r['p_end']:.3f}",
        ]
        for name in recorded.folders
        for text, r in recorded.report["runs"].get(name, {}).get("texts", {}).items()
    ]
    if not rows:
        return ""
    head = ["run", "text", "rows", "NLL", "95 % interval", "token accuracy", "mean p", "p(end)"]
    note = '<span class="small">without reference answers: scored token by token, nothing sampled</span>'
    return f"<h3>Texts {note}</h3>" + html_table(head, rows, numbers=range(2, 8))


def _paired(label: Legend, paired: Sequence[Mapping[str, Any]], known: set[str]) -> str:
    rows = [
        [
            f'<span class="pair">{label(e["b"])} − {label(e["a"])}</span>',
            plain(e["task"]),
            f"<b>{100 * e['difference']:+.1f}</b>",
            f"{100 * e['ci95'][0]:+.1f} to {100 * e['ci95'][1]:+.1f}",
            f"{e['p_value']:.4f}",
        ]
        for e in paired
        if {e["a"], e["b"]} <= known
    ]
    if not rows:
        return ""
    head = ["runs", "task", "difference", "95 % interval", "p"]
    title = '<h3>Differences on the same problems <span class="small">in percentage points</span></h3>'
    return title + html_table(head, rows, numbers=range(2, 5))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _provenance(provenance: Mapping[str, Any] | None) -> str:
    if not provenance:
        return ""
    facts = [provenance.get("command"), provenance.get("date"), f"commit {provenance.get('commit')}"]
    facts += [f"base {provenance['weights']}"] if "weights" in provenance else []
    return f'<p class="small">Produced by {plain(", ".join(map(str, facts)))}.</p>'


# --- charts ---------------------------------------------------------------------------------------


def _probabilities(label: Legend, recorded: Recorded) -> str:
    """The paper's bimodal figure: the reference solutions' tokens by probability, for each run."""
    charts, tables = [], recorded.report.get("tokens", {})
    for task, _ in _entries(recorded):
        figures = tables.get(task, {})
        if shown := {run: figures[run]["histogram"] for run in recorded.folders if run in figures}:
            charts.append(_figure(plain(task), _shares(label, shown)))
    if not charts:
        return ""
    legend = " ".join(map(label, recorded.folders))
    note = f'<span class="small">{legend} · share of the reference solutions’ tokens, log scale</span>'
    return f'<h3>How likely each token is {note}</h3><div class="charts">{"".join(charts)}</div>'


def _shares(label: Legend, histograms: Mapping[str, Sequence[int]]) -> str:
    """The share of tokens in each of equal steps of probability, as stairs."""
    across, down = _axes((0, 1), (math.log10(LEAST), 0))
    stairs = ""
    for run, counts in histograms.items():
        heights = [down(math.log10(max(LEAST, n / (sum(counts) or 1)))) for n in counts]
        edges = [across(i / len(counts)) for i in range(len(counts) + 1)]
        corners = [(x, y) for i, y in enumerate(heights) for x in edges[i : i + 2]]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        stairs += f'<polyline class="{label.colour(run)} line" points="{points}">'
        stairs += f"<title>{plain(run)}</title></polyline>"
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{down(n):.1f}" y2="{down(n):.1f}"></line>'
        f"{_text(LEFT - 5, down(n) + 4, f'{10.0 ** (n + 2):g}%', 'end')}"
        for n in range(round(math.log10(LEAST)), 1)
    )
    ends = "".join(
        _text(across(p), HEIGHT - 6, said, anchor)
        for p, said, anchor in ((0, "p = 0", "start"), (0.5, "0.5", "middle"), (1, "p = 1", "end"))
    )
    return _svg(grid + stairs + ends, "share of tokens by probability")


def _solved(label: Legend, recorded: Recorded) -> str:
    """One histogram per run and task: problems by their share of correct samples."""
    charts = []
    for task, entries in _entries(recorded):
        counted = {run: _by_share(recorded.folders[run].evaluation(task)) for run, _ in entries}
        most = max((max(bins) for bins in counted.values() if bins), default=0)
        for run, bins in counted.items():
            if bins:
                chart = _bars(bins, most, label.colour(run))
                charts.append(_figure(f"{label(run)} {plain(task)}", chart))
    if not charts:
        return ""
    note = '<span class="small">number of problems by share of correct samples</span>'
    return f'<h3>How often each problem was solved {note}</h3><div class="charts">{"".join(charts)}</div>'


def _by_share(file: Path) -> list[int]:
    """Number of problems per step of their share of correct samples; [] without a file. No more steps than
    samples can fill."""
    if not file.is_file():
        return []
    correct: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for line in read_lines(file):
        if line["sample"] >= 0:
            samples[line["problem"]] += 1
            correct[line["problem"]] += line["verdict"] == "correct"
    bins = [0] * min(BINS, max(samples.values(), default=0) + 1)
    for problem, n in samples.items():
        bins[min(len(bins) - 1, len(bins) * correct[problem] // n)] += 1
    return bins


def _bars(bins: Sequence[int], most: int, colour: str) -> str:
    across, down = _axes((0, 1), (0, most or 1))
    width = (WIDTH - LEFT) / len(bins)
    bars = "".join(
        f'<rect class="{colour} fill" x="{LEFT + i * width + 2:.1f}" y="{down(n):.1f}" '
        f'width="{width - 4:.1f}" height="{down(0) - down(n):.1f}"><title>{n} problems</title></rect>'
        f"{_text(LEFT + (i + 0.5) * width, max(down(n) - 4, 10), n)}"
        for i, n in enumerate(bins)
    )
    ticks = "".join(
        _text(across(i / len(bins)), HEIGHT - 6, f"{100 * i // len(bins)} %", anchor)
        for i, anchor in enumerate(["middle"] * len(bins) + ["end"])
    )
    return _svg(bars + ticks, "problems by share of correct samples")


def _curves(label: Legend, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    metrics = {run: lines for run, lines in metrics.items() if lines}
    if not metrics:
        return ""
    legend = " ".join(label(run) for run in metrics)
    charts = "".join(_figure(plain(title), _lines(label, key, metrics)) for key, title in CURVES)
    note = f'<span class="small">{legend} · the same metrics for every objective</span>'
    return f'<h3>Training, step by step {note}</h3><div class="charts">{charts}</div>'


def _lines(label: Legend, key: str, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    points = {
        run: [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        for run, lines in metrics.items()
    }
    values = [y for series in points.values() for _, y in series]
    steps = [x for series in points.values() for x, _ in series]
    if not values:
        return _svg("", "no data")
    low, high = min(0.0, *values), max(values) or 1.0
    across, down = _axes((min(steps), max(steps)), (low, high))
    paths = "".join(
        f'<polyline class="{label.colour(run)} line" points="'
        + " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in series)
        + f'"><title>{plain(run)}</title></polyline>'
        for run, series in points.items()
    )
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{down(y):.1f}" y2="{down(y):.1f}"></line>'
        f"{_text(LEFT - 5, down(y) + 4, f'{y:.2g}', 'end')}"
        for y in (low, (low + high) / 2, high)
    )
    ends = "".join(
        _text(across(x), HEIGHT - 6, said, anchor)
        for x, said, anchor in (
            (min(steps), f"step {min(steps)}", "start"),
            (max(steps), max(steps), "end"),
        )
    )
    return _svg(grid + paths + ends, key)


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Data to pixels."""
    (x0, x1), (y0, y1) = x_range, y_range
    return (
        lambda x: LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - 6),
        lambda y: HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - BOTTOM - TOP - 8),
    )


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _text(x: float, y: float, said: object, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>'


def _svg(body: str, title: str) -> str:
    axis = (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"></line>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{plain(title)}">{axis}{body}</svg>'
