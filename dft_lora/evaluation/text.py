"""A report as text: the table that commands print, and report.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..data.templates import shown
from .protocol import FORGETTING


def report_table(report: dict[str, Any]) -> str:
    """One row per run and task, then the paired differences; the same for texts that are only scored."""
    parts = [_accuracy_table(report), _texts_table(report)]
    return "\n\n".join(part for part in parts if part)


def _accuracy_table(report: dict[str, Any]) -> str:
    if not any(run["tasks"] for run in report["runs"].values()):
        return ""
    head = ["run", "task", "avg@n", "95 % interval", "greedy", "ended", "unparsable"]
    rows = [
        [
            run,
            task,
            f"{percent(r['avg'])} (n={r['samples']})",
            f"{percent(r['ci95'][0])} to {percent(r['ci95'][1])}",
            percent(r["greedy"]),
            percent(1 - r["truncated"]),
            percent(r["unparsable"]),
        ]
        for run, entry in report["runs"].items()
        for task, r in entry["tasks"].items()
    ]
    text = aligned(head, rows)
    for run, task, r in _results(report):
        if r["template"] != (trained := report["runs"][run]["template"]):
            text += f"\n\n{run} answered {task} with template {shown(r['template'])}, "
            text += f"not with {shown(trained)} as trained."
    if report["paired"]:
        head = ["difference", "task", "sampled", "95 % interval", "p", "p (Holm)", "detectable", "greedy", ""]
        rows = [
            [
                f"{e['b']} - {e['a']}",
                e["task"],
                points(e["difference"]),
                f"{points(e['ci95'][0])} to {points(e['ci95'][1])}",
                f"{e['p_value']:.4f}",
                f"{e['p_holm']:.4f}",
                f"{100 * e['smallest_detectable']:.1f}",
                points(e["greedy_difference"]),
                "noise" if e["noise"] else "",
            ]
            for e in report["paired"]
        ]
        text += "\n\n" + aligned(head, rows)
    return text


def _texts_table(report: dict[str, Any]) -> str:
    """Solutions of an own test set without reference answers: nothing is sampled, their tokens are scored."""
    found = [
        (run, task, r) for run, entry in report["runs"].items() for task, r in entry.get("texts", {}).items()
    ]
    if not found:
        return ""
    head = ["run", "text", "rows", "NLL", "95 % interval", "token accuracy", "mean p", "p(end)"]
    rows = [
        [
            run,
            task,
            str(r["rows"]),
            f"{r['nll']:.3f}",
            f"{r['nll_ci95'][0]:.3f} to {r['nll_ci95'][1]:.3f}",
            percent(r["token_accuracy"]),
            f"{r['mean_probability']:.3f}",
            f"{r['p_end']:.3f}",
        ]
        for run, task, r in found
    ]
    text = aligned(head, rows)
    if changes := report.get("paired_texts"):
        rows = [
            [
                f"{e['b']} - {e['a']}",
                e["task"],
                f"{e['nll_difference']:+.3f}",
                f"{e['ci95'][0]:+.3f} to {e['ci95'][1]:+.3f}",
            ]
            for e in changes
        ]
        text += "\n\n" + aligned(["difference", "text", "NLL", "95 % interval"], rows)
    return text


def report_markdown(report: dict[str, Any]) -> str:
    """report.md: the table, accuracy by tag, sharpening, tokens, plots, provenance."""
    parts = ["# Comparison", report_table(report)]
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
            aligned(["run", "task", tag, "avg@n", "95 % interval", "greedy", "problems"], rows),
        ]
    judged = any(run["tasks"] for run in report["runs"].values())
    parts += (_sharpening(report) if judged else []) + _tokens(report)
    parts += ["## Plots", *(["![Accuracy](plots/accuracy.png)"] if judged else [])]
    parts.append("![Training](plots/training.png)")
    parts += [
        f"![Token probabilities, {title}](plots/probabilities-{title}.png)"
        for title in report["tokens"]
        if title != FORGETTING
    ]
    if any(report["steps"].values()):
        parts.append("![Accuracy against step](plots/steps.png)")
    made = report["provenance"]
    weights = f", base {made['weights']}" if "weights" in made else ""
    parts.append(
        f"Made by `{made['command']}` on {made['date']}, commit {made['commit']}, "
        f"torch {made['versions']['torch']}{weights}."
    )
    return "\n\n".join(parts) + "\n"


def _sharpening(report: dict[str, Any]) -> list[str]:
    """Greedy accuracy and pass@k, which sharpening alone does not raise."""
    ks = sorted({int(k) for _, _, r in _results(report) for k in r["pass_at"]})
    rows = [
        [
            run,
            task,
            percent(r["greedy"]),
            *(percent(r["pass_at"][str(k)]) if str(k) in r["pass_at"] else "" for k in ks),
            percent(r["maj_at"][str(r["samples"])]) if r["maj_at"] else "",
        ]
        for run, task, r in _results(report)
    ]
    return [
        "## Sharpening",
        "At temperature 1 a sharper distribution scores higher although the model knows no more. Greedy "
        "accuracy and pass@k show the difference: a gain that disappears there was sharpening.",
        aligned(["run", "task", "greedy", *(f"pass@{k}" for k in ks), "maj@n"], rows),
    ]


def _tokens(report: dict[str, Any]) -> list[str]:
    """Plain NLL of texts outside the training data, and the tokens whose probability changed most."""
    if not report["tokens"]:
        return []
    head = ["run", "text", "NLL", "95 % interval", "change", "mean p", "p(end)", "entropy"]
    head += ["p < 0.1", "p > 0.9"]
    rows = []
    for title, metrics in report["tokens"].items():
        for run, m in metrics.items():
            change = m.get("nll_change_ci95")
            rows.append(
                [
                    run,
                    title,
                    f"{m['nll']:.3f}",
                    f"{m['nll_ci95'][0]:.3f} to {m['nll_ci95'][1]:.3f}",
                    f"{change[0]:+.3f} to {change[1]:+.3f}" if change else "",
                    f"{m['mean_probability']:.3f}",
                    f"{m['p_end']:.3f}" if title != FORGETTING else "",
                    f"{m['entropy']:.3f}",
                    percent(m["share_below_0.1"]),
                    percent(m["share_above_0.9"]),
                ]
            )
    moved = [
        [run, title, _movement(m["gained"]), _movement(m["suppressed"])]
        for title, metrics in report["tokens"].items()
        if title != FORGETTING
        for run, m in metrics.items()
        if "gained" in m
    ]
    parts = [
        "## Tokens of the reference solutions",
        "Plain NLL in nats per token, whatever the objective. The change is the 95 % interval of the "
        f"difference from the first run. `{FORGETTING}` is English prose: a rise there means forgetting.",
        aligned(head, rows),
    ]
    if moved:
        parts += [
            "Mean change in a token's probability, in percentage points:",
            aligned(["run", "text", "gained", "suppressed"], moved),
        ]
    return parts


def _movement(entries: list[list[Any]]) -> str:
    quoted = [
        (json.dumps(text, ensure_ascii=False).replace("|", "\\|"), change) for text, _, change in entries
    ]
    return ", ".join(f"`{text}` {points(change)}" for text, change in quoted[:6])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def aligned(head: list[str], rows: list[list[str]]) -> str:
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
