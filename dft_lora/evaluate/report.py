"""From answers on disk to numbers with intervals: report.json, report.md and plots.

Reads run folders only; nothing is generated, judged or loaded here.

Legend: P problems, N samples of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from ..provenance import certificate
from ..run_folder import RunFolder, read_json, write_json, write_text
from . import statistics as st
from .sampling import GREEDY, read_attempts


@dataclass(frozen=True)
class Answered:
    """One run's answers to one task, as arrays. `correct_PN` holds 0 and 1; `greedy_P` too."""

    protocol: dict[str, Any]
    problems: list[str]
    tags: dict[str, dict[str, Any]]
    correct_PN: np.ndarray
    greedy_P: np.ndarray
    truncated: float
    unparsable: float
    timed_out: float
    mean_tokens: float

    @classmethod
    def read(cls, folder: RunFolder, task: str) -> Answered:
        """Raises RequestError when the evaluation is missing or was cut short."""
        facts_file = folder.evaluation(task).with_suffix(".json")
        if not facts_file.is_file():
            raise RequestError(
                f"{folder.path}: not evaluated on {task!r}; run dft-lora evaluate {folder.path}"
            )
        facts = read_json(facts_file)
        samples, problems = facts["protocol"]["samples"], list(facts["problems"])
        attempts = read_attempts(folder.evaluation(task))
        where = {problem: i for i, problem in enumerate(problems)}
        correct = np.full((len(problems), samples + 1), -1)  # greedy in the last column, as index -1
        for attempt in attempts:
            correct[where[attempt.problem], attempt.sample] = attempt.verdict.correct
        if (correct < 0).any():
            raise RequestError(
                f"{folder.path}: {int((correct < 0).sum())} answers to {task!r} are missing "
                "(an evaluation was interrupted); run dft-lora evaluate again to complete it"
            )
        drawn = [attempt for attempt in attempts if attempt.sample != GREEDY]
        statuses = [attempt.verdict.status for attempt in drawn]
        return cls(
            protocol=facts["protocol"],
            problems=problems,
            tags={problem: values["tags"] for problem, values in facts["problems"].items()},
            correct_PN=correct[:, :-1],
            greedy_P=correct[:, -1],
            truncated=_share(attempt.truncated for attempt in drawn),
            unparsable=_share(status == "unparsable" for status in statuses),
            timed_out=_share(status == "timed_out" for status in statuses),
            mean_tokens=float(np.mean([attempt.tokens for attempt in drawn])),
        )

    def summary(self) -> dict[str, Any]:
        """One task's entry of report.json."""
        return {
            "avg": float(self.correct_PN.mean()),
            "ci95": list(st.interval(st.avg_at_n(self.correct_PN))),
            "greedy": float(self.greedy_P.mean()),
            "greedy_ci95": list(st.interval(self.greedy_P)),
            "pass_at": {
                str(k): float(st.pass_at_k(self.correct_PN, k).mean())
                for k in _powers(self.correct_PN.shape[1])
            },
            "samples": self.correct_PN.shape[1],
            "problems": len(self.problems),
            "truncated": self.truncated,
            "unparsable": self.unparsable,
            "timed_out": self.timed_out,
            "mean_tokens": self.mean_tokens,
            "by_tag": self._by_tag(),
        }

    def _by_tag(self) -> dict[str, dict[str, Any]]:
        """Accuracy per value of each tag that has few values: steps, level, subject."""
        groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, problem in enumerate(self.problems):
            for tag, value in self.tags[problem].items():
                groups[tag][str(value)].append(i)
        return {
            tag: {
                value: {
                    "avg": float(self.correct_PN[rows].mean()),
                    "ci95": list(st.interval(st.avg_at_n(self.correct_PN[rows]))),
                    "greedy": float(self.greedy_P[rows].mean()),
                    "problems": len(rows),
                }
                for value, rows in sorted(values.items())
            }
            for tag, values in groups.items()
            if len(values) <= 20
        }


def build(folders: Sequence[RunFolder], tasks: Iterable[str] = ()) -> dict[str, Any]:
    """The report of some runs, over `tasks` or all that were evaluated.

    Raises RequestError when two runs answered a task under different protocols, naming the difference.
    """
    names = _names(folders)
    answered: dict[str, dict[str, Answered]] = {}
    for name, folder in zip(names, folders, strict=True):
        evaluated = tasks or sorted(path.stem for path in (folder.path / "evaluation").glob("*.jsonl"))
        if not evaluated:
            raise RequestError(f"{folder.path}: no evaluation there; run dft-lora evaluate {folder.path}")
        answered[name] = {task: Answered.read(folder, task) for task in evaluated}
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        runs[name] = {
            "path": str(folder.path),
            "objective": folder.recipe().objective.name if folder.has_adapter else None,
            "tasks": {task: answers.summary() for task, answers in answered[name].items()},
        }
    paired = [
        entry
        for a, b in combinations(names, 2)
        for task in answered[a]
        if task in answered[b]
        for entry in [_compare(a, b, task, answered[a][task], answered[b][task])]
    ]
    return {"runs": runs, "paired": paired, "provenance": certificate()}


def _compare(a: str, b: str, task: str, left: Answered, right: Answered) -> dict[str, Any]:
    """One paired entry: b - a over the same problems, at temperature and greedy."""
    differing = [
        f"{k}: {left.protocol[k]!r} / {right.protocol[k]!r}"
        for k in left.protocol
        if left.protocol[k] != right.protocol[k]
    ]
    if differing:
        raise RequestError(
            f"{a} and {b} answered {task!r} under different protocols ({'; '.join(differing)})"
        )
    drawn = st.compare(st.avg_at_n(left.correct_PN), st.avg_at_n(right.correct_PN))
    greedy = st.compare(left.greedy_P, right.greedy_P)
    return {
        "a": a,
        "b": b,
        "task": task,
        **_paired(drawn),
        **{f"greedy_{k}": v for k, v in _paired(greedy).items()},
    }


def _paired(comparison: st.Comparison) -> dict[str, Any]:
    return {
        "difference": comparison.difference,
        "ci95": list(comparison.ci95),
        "p_value": comparison.p_value,
        "smallest_detectable": comparison.smallest_detectable,
        "noise": comparison.noise,
    }


def write_report(folders: Sequence[RunFolder], out: Path | None, tasks: Iterable[str] = ()) -> dict[str, Any]:
    """Build the report and, where `out` is given, write report.json, report.md and plots/ there."""
    report = build(folders, tasks)
    if out is not None:
        from .. import plots

        write_json(out / "report.json", report)
        plots.accuracy(report, out / "plots" / "accuracy.png")
        plots.curves(dict(zip(_names(folders), folders, strict=True)), out / "plots" / "training.png")
        write_text(out / "report.md", markdown(report))
    return report


# --- text -------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """One row a run and task: avg@n with its interval, greedy, shares; then the paired differences."""
    head = ["run", "task", "avg@n", "95 % interval", "greedy", "truncated", "unparsable"]
    rows = [
        [
            run,
            task,
            f"{percent(r['avg'])} (n={r['samples']})",
            f"{percent(r['ci95'][0])} to {percent(r['ci95'][1])}",
            percent(r["greedy"]),
            percent(r["truncated"]),
            percent(r["unparsable"]),
        ]
        for run, entry in report["runs"].items()
        for task, r in entry["tasks"].items()
    ]
    text = _aligned(head, rows)
    if report["paired"]:
        head = ["difference", "task", "sampled", "95 % interval", "p", "greedy", "95 % interval"]
        rows = [
            [
                f"{e['b']} - {e['a']}",
                e["task"],
                points(e["difference"]),
                f"{points(e['ci95'][0])} to {points(e['ci95'][1])}",
                f"{e['p_value']:.4f}",
                points(e["greedy_difference"]),
                f"{points(e['greedy_ci95'][0])} to {points(e['greedy_ci95'][1])}",
            ]
            for e in report["paired"]
        ]
        text += "\n\n" + _aligned(head, rows)
    return text


def markdown(report: dict[str, Any]) -> str:
    """report.md: the table, accuracy by tag, figures, birth certificate."""
    parts = ["# Comparison", table(report)]
    for tag in sorted({tag for _, _, r in _results(report) for tag in r["by_tag"]}):
        rows = [
            [
                run,
                task,
                value,
                percent(r["avg"]),
                f"{percent(r['ci95'][0])} to {percent(r['ci95'][1])}",
                percent(r["greedy"]),
                str(r["problems"]),
            ]
            for run, task, result in _results(report)
            for value, r in result["by_tag"].get(tag, {}).items()
        ]
        parts += [
            f"## By {tag}",
            _aligned(["run", "task", tag, "avg@n", "95 % interval", "greedy", "problems"], rows),
        ]
    parts += ["## Figures", "![Accuracy](plots/accuracy.png)", "![Training](plots/training.png)"]
    birth = report["provenance"]
    made = f"Made by `{birth['command']}` on {birth['date']}, commit {birth['commit']}"
    parts += [f"{made}, torch {birth['versions']['torch']}."]
    return "\n\n".join(parts) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as plain text."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [head, *rows]
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _results(report: dict[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    return ((run, task, r) for run, entry in report["runs"].items() for task, r in entry["tasks"].items())


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """Folder names; with their parents' where two are equal."""
    names = [folder.name for folder in folders]
    return [
        name if names.count(name) == 1 else "/".join(folder.path.resolve().parts[-2:])
        for name, folder in zip(names, folders, strict=True)
    ]


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [2**i for i in range(n.bit_length())]
