"""The recorded results of runs, read from their folders without a model or a plotting library.

Accuracy with intervals, paired differences, token probabilities of the reference solutions, how often each
problem was solved, and training curves: tables and SVG for gr.HTML, in the page's own colours.
"""

from __future__ import annotations

import base64
import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import DataError, RequestError
from ..runs.folder import RunFolder, read_json, read_lines, run_names
from .charts import bars, costs, curves, figure, shares
from .text import plain
from .views import Legend, html_table, interval_bar

BINS = 5  # at most, for the share of a problem's samples that are correct
CHART_WIDTH = 270  # pixels, at least, where the window has them


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
        """The report beside the runs that compares them; else their own reports together, with the difference
        of the two runs that were named last; else None.

        Raises DataError for a broken file.
        """
        by_name = dict(zip(run_names(folders), folders, strict=True))
        outdated = []
        runs: dict[str, Any] = {}
        tokens: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, folder in by_name.items():
            if folder.report_file.is_file():
                report = read_json(folder.report_file)
                own = _runs(report, folder.report_file)
                said = folder.name if folder.name in own else next(iter(own), name)
                if not _current(folder, own.get(said, {})):
                    outdated.append(folder)
                    continue
                runs[name] = own.get(said, {"tasks": {}})
                for text, figures in report.get("tokens", {}).items():
                    tokens[text] |= {name: figures[said]} if said in figures else {}
        together = {folder.path.resolve().parent / "report.json" for folder in folders}
        for file in together if len(together) == 1 else ():
            said = _runs(read_json(file), file) if file.is_file() else {}
            if all(
                name in said
                and _current(folder, said[name])
                and _asked(runs.get(name, {})).items() <= _asked(said[name]).items()
                for name, folder in by_name.items()
            ):
                return cls(read_json(file), by_name)
        if not runs and not outdated:
            return None
        shown = {name: folder for name, folder in by_name.items() if folder not in outdated}
        last = list(runs)[-2:]
        files = [by_name[name].report_file for name in last]
        found = _difference(tuple((file.parent, file.stat().st_mtime_ns) for file in files))
        paired = [{**entry, **dict(zip("ab", last, strict=True))} for entry in found]
        return cls({"runs": runs, "paired": paired, "tokens": tokens}, shown, outdated)


@lru_cache(maxsize=8)
def _difference(reported: tuple[tuple[Path, int], ...]) -> Sequence[Mapping[str, Any]]:
    """The second run against the first on each task that both answered under one protocol.

    `reported`: run folders with the times of their reports, so that new answers are compared anew.
    """
    from ..evaluation.report import build
    from ..evaluation.task_results import complete_tasks

    folders = [RunFolder(path) for path, _ in reported]
    found: list[Mapping[str, Any]] = []
    both: list[str] = []
    with suppress(DataError, RequestError):
        first, *others = map(complete_tasks, folders)
        both = [task for task in first if others and task in others[0]]
        if both:
            return build(folders, both)["paired"]
    for task in both:
        with suppress(DataError, RequestError):  # another protocol: this task alone is left out
            found += build(folders, [task])["paired"]
    return found


def _asked(run: Mapping[str, Any]) -> dict[str, str]:
    """The tasks and texts that a run's report has, with its figures as text."""
    return {name: repr(figures) for name, figures in {**run.get("tasks", {}), **run.get("texts", {})}.items()}


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
    by_name = dict(zip(run_names(folders), folders, strict=True))
    label = Legend(list(by_name))
    training = _training(label, {name: folder.metrics() for name, folder in by_name.items()})
    if recorded is None:
        command = f"dft-lora evaluate {' '.join(str(folder.path) for folder in folders)}"
        how = f"To make them, run <code>{plain(command)}</code>."
        return f'<p class="nothing">No results yet. {how}</p>{training}'
    report = recorded.report
    return "".join(
        (
            *map(_outdated, recorded.outdated),
            _headline(recorded),
            _accuracy(label, recorded),
            _texts(label, recorded),
            _paired(label, report.get("paired", []), set(recorded.folders)),
            '<div class="blocks">',
            _costs(label, recorded),
            _probabilities(label, recorded),
            _solved(label, recorded),
            "</div>",
            training,
            _download(recorded),
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


def _headline(recorded: Recorded) -> str:
    """What the results say, one sentence per task: the difference of the two runs that were named last."""
    paired = recorded.report.get("paired", [])
    said = [_sentence(task, entries, paired) for task, entries in _entries(recorded)]
    return "".join(f'<p class="{"" if i else "headline"}">{line}</p>' for i, line in enumerate(said))


def _sentence(
    task: str, entries: Sequence[tuple[str, Mapping[str, Any]]], paired: Sequence[Mapping[str, Any]]
) -> str:
    figures = dict(entries)
    pairs = [e for e in paired if e["task"] == task and {e["a"], e["b"]} <= figures.keys()]
    if not pairs:
        run, r = max(entries, key=lambda entry: entry[1]["avg"])
        low, high = r["ci95"]
        return (
            f"On {plain(task)}, {_percent(r['avg'])} of {plain(run)}’s sampled answers are correct "
            f"(95 % interval {_percent(low)} to {_percent(high)})."
        )
    last = pairs[-1]
    (low, high), difference = last["ci95"], last["difference"]
    interval = f"95 % interval {_points(low)} to {_points(high)}"
    greedy = " against ".join(_percent(figures[last[side]]["greedy"]) for side in ("b", "a"))
    first, second = plain(last["a"]), plain(last["b"])
    if low <= 0 <= high:
        said = f"sampled answers of {second} and {first} do not differ beyond noise ({interval} points)"
    else:
        size, more = f"{100 * abs(difference):.1f}", "more" if difference > 0 else "less"
        said = (
            f"sampled answers of {second} are correct {size} points {more} often than {first}’s ({interval})"
        )
    return f"On {plain(task)}, {said}; greedy ones {greedy}."


def _accuracy(label: Legend, recorded: Recorded) -> str:
    head = ["run", "accuracy, 0 to 100 %", "sampled", "95 % interval", "greedy", "ended", "no answer"]
    blocks = []
    for task, entries in _entries(recorded):
        rows = []
        for run, r in entries:
            low, high = r["ci95"]
            bar = f'<div class="wide">{interval_bar(100 * low, 100 * r["avg"], 100 * high)}</div>'
            shares = [_percent(r["greedy"]), _percent(1 - r["truncated"]), _percent(r["unparsable"])]
            interval = f"{_percent(low)} to {_percent(high)}"
            rows.append([label(run), bar, f"<b>{_percent(r['avg'])}</b>", interval, *shares])
        size = f"{entries[0][1]['problems']} problems, {entries[0][1]['samples']} samples each"
        title = f'<h2>{plain(task)} <span class="small">{size}</span></h2>'
        blocks.append(title + html_table(head, rows, numbers=range(2, 7), stacked=True))
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
    """The differences, all on one scale around zero."""
    paired = [e for e in paired if {e["a"], e["b"]} <= known]
    if not paired:
        return ""
    most = max(abs(bound) for e in paired for bound in e["ci95"]) or 1.0

    def place(difference: float) -> float:
        return 50 + 50 * difference / most

    rows = []
    for e in paired:
        (low, high), difference = e["ci95"], e["difference"]
        bar = interval_bar(place(low), place(difference), place(high))
        rows.append(
            [
                f'<span class="pair">{label(e["b"])} − {label(e["a"])}</span>',
                plain(e["task"]),
                f'<div class="wide zero">{bar}</div>',
                f"<b>{_points(difference)}</b>",
                f"{_points(low)} to {_points(high)}",
                f"{e['p_value']:.4f}",
            ]
        )
    scale = f"−{100 * most:.0f} to +{100 * most:.0f} points"
    head = ["runs", "task", scale, "difference", "95 % interval", "p"]
    title = '<h2>Differences on the same problems <span class="small">in percentage points</span></h2>'
    return title + html_table(head, rows, numbers=range(3, 6), stacked=True)


def results_csv(recorded: Recorded) -> str:
    """The accuracies, one line per run and task, as CSV; shares from 0 to 1."""
    columns = ("avg", "greedy", "truncated", "unparsable", "samples", "problems")
    written = io.StringIO()
    table = csv.writer(written)
    table.writerow(["task", "run", "low95", "high95", *columns])
    for task, entries in _entries(recorded):
        for run, r in entries:
            table.writerow([task, run, *r["ci95"], *(r[column] for column in columns)])
    return written.getvalue()


def _download(recorded: Recorded) -> str:
    """A link that holds the file itself: the server keeps none."""
    data = base64.b64encode(results_csv(recorded).encode()).decode()
    return (
        f'<p><a class="download" download="results.csv" href="data:text/csv;base64,{data}">'
        "Download the figures as CSV</a></p>"
    )


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _provenance(provenance: Mapping[str, Any] | None) -> str:
    if not provenance:
        return ""
    facts = [provenance.get("command"), provenance.get("date"), f"commit {provenance.get('commit')}"]
    facts += [f"base {provenance['weights']}"] if "weights" in provenance else []
    return f'<p class="small">Produced by {plain(", ".join(map(str, facts)))}.</p>'


# --- charts ---------------------------------------------------------------------------------------


def _costs(label: Legend, recorded: Recorded) -> str:
    """Sampled accuracy over the seconds that training took, for runs that recorded them."""
    charts = []
    for task, entries in _entries(recorded):
        figures = dict(entries)
        metadata = {run: read_json(recorded.folders[run].path / "run.json") for run in figures}
        took = {run: facts.get("figures", {}).get("seconds") for run, facts in metadata.items()}
        points = {
            run: (seconds, figures[run]["ci95"][0], figures[run]["avg"], figures[run]["ci95"][1])
            for run, seconds in took.items()
            if seconds
        }
        if len(points) > 1:
            base = next(
                ((run, r["avg"]) for run, r in entries if recorded.folders[run].adapter_digest is None), None
            )
            charts.append(figure(plain(task), costs(label, points, base)))
    note = "sampled, 95 % interval, over wall-clock seconds of training"
    return _charts("Accuracy against cost", note, charts)


def _probabilities(label: Legend, recorded: Recorded) -> str:
    """The paper's bimodal figure: the reference solutions' tokens by probability, for each run."""
    charts, tables = [], recorded.report.get("tokens", {})
    for task, _ in _entries(recorded):
        figures = tables.get(task, {})
        if shown := {run: figures[run]["histogram"] for run in recorded.folders if run in figures}:
            legend = " ".join(map(label, shown))
            charts.append(figure(f"{plain(task)}: {legend}", shares(label, shown)))
    return _charts("How likely each token is", "share of the reference solutions’ tokens, log scale", charts)


def _solved(label: Legend, recorded: Recorded) -> str:
    """One histogram per run and task: problems by their share of correct samples."""
    charts = []
    for task, entries in _entries(recorded):
        counted = {run: _by_share(recorded.folders[run].evaluation(task)) for run, _ in entries}
        most = max((max(counts) for counts in counted.values() if counts), default=0)
        for run, counts in counted.items():
            if counts:
                chart = bars(counts, most, label.colour(run))
                charts.append(figure(f"{label(run)} {plain(task)}", chart))
    note = "number of problems by share of correct samples"
    return _charts("How often each problem was solved", note, charts)


def _charts(title: str, note: str, charts: Sequence[str]) -> str:
    """A block of charts that is as wide as it needs to be, so that two short blocks stand side by side."""
    if not charts:
        return ""
    heading = f'<h2>{title} <span class="small">{note}</span></h2>'
    style = f"flex-grow: {len(charts)}; flex-basis: {CHART_WIDTH * len(charts)}px"
    return f'<section style="{style}">{heading}<div class="charts">{"".join(charts)}</div></section>'


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


def _training(label: Legend, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    metrics = {run: lines for run, lines in metrics.items() if lines}
    if not metrics:
        return ""
    legend = " ".join(label(run) for run in metrics)
    said = "the same metrics for every objective, with their values at the last step"
    note = f'<span class="small">{legend} · {said}</span>'
    return f"<h2>Training, step by step {note}</h2>{curves(label, metrics)}"
