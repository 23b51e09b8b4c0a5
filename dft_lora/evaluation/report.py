"""From answers on disk to numbers with intervals: report.json, report.md, plots, LLM Comparator files.

Reads run folders only; nothing is generated, judged or loaded here.

Legend: P problems, N samples of each, T tokens of the reference solutions, E solutions.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from ..provenance import certificate
from ..run_folder import RunFolder, read_json, write_json, write_text
from ..tasks.audit import Audit, audit
from ..tasks.base import Attempt
from . import statistics as st
from .sampling import FORGETTING, GREEDY, Protocol, read_attempts
from .tokens import TokenTable

BINS = 20  # of a probability
SHOWN = 12  # tokens that gained or lost most
SEEN = 3  # times a token must occur to be listed


@dataclass(frozen=True)
class Answered:
    """One run's answers to one task, as arrays. `correct_PN` holds 0 and 1; `greedy_P` too."""

    protocol: dict[str, Any]
    problems: list[str]
    questions: dict[str, str | None]
    tags: dict[str, dict[str, Any]]
    correct_PN: np.ndarray
    greedy_P: np.ndarray
    truncated: float
    unparsable: float
    timed_out: float
    mean_tokens: float
    answers_PN: list[list[str | None]]
    """Extracted answers; all correct ones carry the reference, since they mean the same."""
    greedy_text_P: list[str]
    second_opinion: Audit

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
        cells: list[list[Attempt | None]] = [[None] * (samples + 1) for _ in problems]
        for attempt in attempts:
            correct[where[attempt.problem], attempt.sample] = attempt.verdict.correct
            cells[where[attempt.problem]][attempt.sample] = attempt
        if (correct < 0).any():
            raise RequestError(
                f"{folder.path}: {int((correct < 0).sum())} answers to {task!r} are missing "
                "(an evaluation was interrupted); run dft-lora evaluate again to complete it"
            )
        drawn = [attempt for row in cells for attempt in row[:-1] if attempt]
        reference = {problem: values["answer"] for problem, values in facts["problems"].items()}
        statuses = [attempt.verdict.status for attempt in drawn]
        return cls(
            protocol=facts["protocol"],
            problems=problems,
            questions={problem: values.get("question") for problem, values in facts["problems"].items()},
            tags={problem: values["tags"] for problem, values in facts["problems"].items()},
            correct_PN=correct[:, :-1],
            greedy_P=correct[:, -1],
            truncated=_share(attempt.truncated for attempt in drawn),
            unparsable=_share(status == "unparsable" for status in statuses),
            timed_out=_share(status == "timed_out" for status in statuses),
            mean_tokens=float(np.mean([attempt.tokens for attempt in drawn])),
            answers_PN=[
                [reference[a.problem] if a.verdict.correct else a.verdict.extracted for a in row[:-1] if a]
                for row in cells
            ],
            greedy_text_P=[row[GREEDY].text for row in cells if row[GREEDY]],
            second_opinion=audit((attempt.verdict, reference[attempt.problem]) for attempt in drawn),
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
            "maj_at": {
                str(k): float(st.maj_at_k(self.answers_PN, self.correct_PN, k).mean())
                for k in _powers(self.correct_PN.shape[1])
            },
            "audit": {
                "compared": self.second_opinion.compared,
                "disagreement": self.second_opinion.rate,
            },
            "samples": self.correct_PN.shape[1],
            "problems": len(self.problems),
            "template": self.protocol["template"],
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


def build(
    folders: Sequence[RunFolder], tasks: Iterable[str] = (), free: Collection[str] = ()
) -> dict[str, Any]:
    """The report of some runs, over `tasks` or all that were evaluated.

    Raises RequestError when two runs answered a task under different protocols, naming the difference;
    the fields of the protocol named in `free` may differ.
    """
    names = run_names(folders)
    answered: dict[str, dict[str, Answered]] = {}
    for name, folder in zip(names, folders, strict=True):
        evaluated = tasks or evaluated_tasks(folder)
        if not evaluated:
            raise RequestError(f"{folder.path}: no evaluation there; run dft-lora evaluate {folder.path}")
        answered[name] = {task: Answered.read(folder, task) for task in evaluated}
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        runs[name] = {
            "path": str(folder.path),
            "template": folder.run()["template"],
            "objective": folder.recipe().objective.name if folder.has_adapter else None,
            "tasks": {task: answers.summary() for task, answers in answered[name].items()},
        }
    pairs = [_compare(a, b, answered[a], answered[b], free) for a, b in combinations(names, 2)]
    return {
        "runs": runs,
        "paired": _with_holm([entry for entries in pairs for entry in entries]),
        "tokens": token_figures(dict(zip(names, folders, strict=True))),
        "steps": {name: steps(folder) for name, folder in zip(names, folders, strict=True)},
        "provenance": certificate(),
    }


def evaluated_tasks(folder: RunFolder) -> list[str]:
    """Tasks with answers in a run folder; a name with a dot is a part of an evaluation that was cut."""
    files = (folder.path / "evaluation").glob("*.jsonl")
    return sorted(file.stem for file in files if "." not in file.stem)


def _compare(
    a: str, b: str, left: Mapping[str, Answered], right: Mapping[str, Answered], free: Collection[str]
) -> list[dict[str, Any]]:
    """Paired entries of two runs: b - a over the same problems, at temperature and greedy, task by task."""
    shared = [task for task in left if task in right]
    if not shared:
        raise RequestError(
            f"{a} was evaluated on {', '.join(left)}, {b} on {', '.join(right)}: no task in common to compare"
        )
    entries = []
    for task in shared:
        if differing := _differences(left[task], right[task], free):
            raise RequestError(f"{a} and {b} answered {task!r} under different protocols: {differing}")
        drawn = st.compare(st.avg_at_n(left[task].correct_PN), st.avg_at_n(right[task].correct_PN))
        greedy = st.compare(left[task].greedy_P, right[task].greedy_P)
        entries.append(
            {
                "a": a,
                "b": b,
                "task": task,
                **paired(drawn),
                **{f"greedy_{k}": v for k, v in paired(greedy).items()},
            }
        )
    return entries


def _differences(left: Answered, right: Answered, free: Collection[str]) -> str:
    """What differs between two protocols, in words; empty where nothing does."""
    known = {f.name for f in fields(Protocol)} - {*free, "problems", "problems_hash", "template_hash"}
    said = [
        f"{k} {left.protocol[k]!r} and {right.protocol[k]!r}"
        for k in left.protocol
        if k in known and left.protocol[k] != right.protocol[k]
    ]
    only = [len(set(x.problems) - set(y.problems)) for x, y in ((left, right), (right, left))]
    if any(only):
        said.append(
            f"{only[0]} of {len(left.problems)} and {only[1]} of {len(right.problems)} problems differ"
        )
    elif left.protocol["problems_hash"] != right.protocol["problems_hash"]:
        said.append("problems of the same names have other texts or answers")
    if not said and left.protocol["template_hash"] != right.protocol["template_hash"]:
        said.append(f"template {left.protocol['template']!r} renders other ids")
    return "; ".join(said)


def paired(comparison: st.Comparison) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "difference": comparison.difference,
        "ci95": list(comparison.ci95),
        "p_value": comparison.p_value,
        "smallest_detectable": comparison.smallest_detectable,
        "noise": comparison.noise,
    }


def _with_holm(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """p-values adjusted over everything that the report compares at temperature."""
    if entries:
        for entry, p in zip(entries, st.holm([entry["p_value"] for entry in entries]), strict=True):
            entry["p_holm"] = float(p)
    return entries


# --- tokens of the reference solutions --------------------------------------------------------


def token_figures(folders: Mapping[str, RunFolder]) -> dict[str, Any]:
    """For each text that was scored: plain figures of every run, and which tokens gained on the first run.

    Runs whose tables hold other tokens than the first one's are left out of the comparison.
    """
    found: dict[str, dict[str, TokenTable]] = defaultdict(dict)
    for name, folder in folders.items():
        for file in sorted((folder.path / "evaluation").glob("*.tokens.safetensors")):
            found[file.name.removesuffix(".tokens.safetensors")][name] = TokenTable.load(file)
    return {title: _figures(tables) for title, tables in found.items()}


def _figures(tables: Mapping[str, TokenTable]) -> dict[str, Any]:
    first = next(iter(tables.values()))
    figures: dict[str, Any] = {}
    for name, table in tables.items():
        edges = np.linspace(0, 1, BINS + 1)
        bin_T = np.minimum((table.p_T * BINS).astype(int), BINS - 1)
        count = np.bincount(bin_T, minlength=BINS)
        pull = np.bincount(bin_T, table.pull_T, minlength=BINS) / np.maximum(count, 1)
        dft = np.bincount(bin_T, table.pull_T * table.p_T, minlength=BINS) / np.maximum(count, 1)
        figures[name] = {
            "tokens": len(table.ids_T),
            "nll": float(table.nll_E.mean()),
            "nll_ci95": list(_mean_interval(table.nll_E)),
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
            figures[name]["nll_change_ci95"] = list(_mean_interval(table.nll_E - first.nll_E))
            figures[name]["gained"], figures[name]["suppressed"] = _movers(first, table)
    return figures


def _movers(before: TokenTable, after: TokenTable) -> tuple[list[list[float]], list[list[float]]]:
    """[id, times seen, mean change of its probability] of the tokens that gained and lost most."""
    ids, of_T, seen = np.unique(before.ids_T, return_inverse=True, return_counts=True)
    change = np.bincount(of_T, after.p_T - before.p_T) / seen
    order = [int(i) for i in np.argsort(change) if seen[i] >= SEEN]
    entry = [[int(ids[i]), int(seen[i]), float(change[i])] for i in order]
    return [e for e in entry[::-1][:SHOWN] if e[2] > 0], [e for e in entry[:SHOWN] if e[2] < 0]


def _mean_interval(value_E: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over solutions (percentile, seed 0)."""
    drawn = np.random.default_rng(0).integers(len(value_E), size=(2000, len(value_E)))
    low, high = np.quantile(value_E[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def steps(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of the checkpoints that were evaluated (`steps/`), by task."""
    curve: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((folder.path / "steps").glob("step-*")):
        run = RunFolder.open(path)
        for task in evaluated_tasks(run):
            answers = Answered.read(run, task)
            scores_P = st.avg_at_n(answers.correct_PN)
            entry = {"step": run.run()["step"], "avg": float(scores_P.mean())}
            curve[task].append(entry | {"ci95": list(st.interval(scores_P))})
    return curve


def write_report(
    folders: Sequence[RunFolder], out: Path | None, tasks: Iterable[str] = (), comparator: bool = False
) -> dict[str, Any]:
    """Build the report and, where `out` is given, write report.json, report.md and plots/ there.

    With `comparator` also a file for Google's LLM Comparator a pair of runs and task.
    """
    report = build(folders, tasks)
    named = dict(zip(run_names(folders), folders, strict=True))
    _name_tokens(report, folders)
    if out is not None:
        from .. import plots

        write_json(out / "report.json", report)
        plots.accuracy(report, out / "plots" / "accuracy.png")
        plots.curves(named, out / "plots" / "training.png")
        for title, figures in report["tokens"].items():
            if title != FORGETTING:
                plots.probabilities(figures, out / "plots" / f"probabilities-{title}.png")
        if any(report["steps"].values()):
            plots.steps(report["steps"], out / "plots" / "steps.png")
        write_text(out / "report.md", markdown(report))
        if comparator:
            for entry in report["paired"]:
                a, b, task = entry["a"], entry["b"], entry["task"]
                pair = [Answered.read(named[name], task) for name in (a, b)]
                name = f"{a}-{b}-{task}.json".replace("/", "_")
                write_json(out / "llm-comparator" / name, llm_comparator(a, b, *pair))
    return report


def llm_comparator(a: str, b: str, left: Answered, right: Answered) -> dict[str, Any]:
    """Greedy answers side by side in the JSON format that Google's LLM Comparator opens.

    Its score is above 0 where A is better: here 1, 0 or -1 by the verdicts.
    """
    examples = []
    for i, problem in enumerate(left.problems):
        score = float(left.greedy_P[i] - right.greedy_P[i])
        examples.append(
            {
                "index": i,
                "input_text": left.questions[problem] or problem,
                "tags": [f"{tag} {value}" for tag, value in left.tags[problem].items()],
                "output_text_a": left.greedy_text_P[i],
                "output_text_b": right.greedy_text_P[i],
                "score": score,
                "individual_rater_scores": [],
                "custom_fields": {
                    "correct_a": str(bool(left.greedy_P[i])),
                    "correct_b": str(bool(right.greedy_P[i])),
                },
            }
        )
    schema = [{"name": name, "type": "string"} for name in ("correct_a", "correct_b")]
    return {
        "metadata": {"source_path": left.protocol["task"], "custom_fields_schema": schema},
        "models": [{"name": a}, {"name": b}],
        "examples": examples,
    }


def _name_tokens(report: dict[str, Any], folders: Sequence[RunFolder]) -> None:
    """Put the text of each listed token in place of its id."""
    listed = [
        entry
        for figures in report["tokens"].values()
        for run in figures.values()
        for entry in (*run.get("gained", ()), *run.get("suppressed", ()))
    ]
    if listed:
        from ..model.load import load_tokenizer

        tokenizer = load_tokenizer(folders[0].recipe().model)
        for entry in listed:
            entry[0] = tokenizer.decode([entry[0]])


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
    text = aligned(head, rows)
    for run, task, r in _results(report):
        if r["template"] != (trained := report["runs"][run]["template"]):
            text += f"\n\n{run} answered {task} with template {r['template']!r}, "
            text += f"not with {trained!r} as trained."
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
            aligned(["run", "task", tag, "avg@n", "95 % interval", "greedy", "problems"], rows),
        ]
    parts += _sharpening(report) + _tokens(report)
    parts += ["## Figures", "![Accuracy](plots/accuracy.png)", "![Training](plots/training.png)"]
    parts += [
        f"![Token probabilities, {title}](plots/probabilities-{title}.png)"
        for title in report["tokens"]
        if title != FORGETTING
    ]
    if any(report["steps"].values()):
        parts.append("![Accuracy against step](plots/steps.png)")
    compared = sum(r["audit"]["compared"] for _, _, r in _results(report))
    differing = sum(r["audit"]["compared"] * r["audit"]["disagreement"] for _, _, r in _results(report))
    if compared:
        parts.append(
            f"A second, independent comparison differs from the judge in {differing:.0f} of {compared} "
            "verdicts."
        )
    birth = report["provenance"]
    made = f"Made by `{birth['command']}` on {birth['date']}, commit {birth['commit']}"
    parts += [f"{made}, torch {birth['versions']['torch']}."]
    return "\n\n".join(parts) + "\n"


def _sharpening(report: dict[str, Any]) -> list[str]:
    """What remains of a gain when nothing is left to chance (greedy), or when one of k answers may hit."""
    ks = sorted({int(k) for _, _, r in _results(report) for k in r["pass_at"]})
    rows = [
        [
            run,
            task,
            percent(r["greedy"]),
            *(percent(r["pass_at"][str(k)]) if str(k) in r["pass_at"] else "" for k in ks),
            percent(r["maj_at"][str(r["samples"])]),
        ]
        for run, task, r in _results(report)
    ]
    return [
        "## Sharpening",
        "At temperature 1 a sharper model scores higher without knowing more. Greedy and pass@k tell the two "
        "apart: a gain that is gone there was sharpening.",
        aligned(["run", "task", "greedy", *(f"pass@{k}" for k in ks), "maj@n"], rows),
    ]


def _tokens(report: dict[str, Any]) -> list[str]:
    """Plain NLL of texts that nobody trained on, and the tokens that moved."""
    if not report["tokens"]:
        return []
    head = ["run", "text", "NLL", "95 % interval", "change", "mean p", "entropy", "p < 0.1", "p > 0.9"]
    rows = []
    for title, figures in report["tokens"].items():
        for run, f in figures.items():
            change = f.get("nll_change_ci95")
            rows.append(
                [
                    run,
                    title,
                    f"{f['nll']:.3f}",
                    f"{f['nll_ci95'][0]:.3f} to {f['nll_ci95'][1]:.3f}",
                    f"{change[0]:+.3f} to {change[1]:+.3f}" if change else "",
                    f"{f['mean_probability']:.3f}",
                    f"{f['entropy']:.3f}",
                    percent(f["share_below_0.1"]),
                    percent(f["share_above_0.9"]),
                ]
            )
    moved = [
        [run, title, _movement(f["gained"]), _movement(f["suppressed"])]
        for title, figures in report["tokens"].items()
        if title != FORGETTING
        for run, f in figures.items()
        if "gained" in f
    ]
    parts = [
        "## Tokens of the reference solutions",
        "Plain NLL in nats a token, whatever the objective; the change is the 95 % interval of the "
        f"difference to the first run. `{FORGETTING}` is English prose: what rises there was forgotten.",
        aligned(head, rows),
    ]
    if moved:
        parts += [
            "Mean change of a token's probability, in points:",
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


def run_names(folders: Sequence[RunFolder]) -> list[str]:
    """Folder names; with their parents' where two are equal."""
    names = [folder.name for folder in folders]
    return [
        name if names.count(name) == 1 else "/".join(folder.path.resolve().parts[-2:])
        for name, folder in zip(names, folders, strict=True)
    ]


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return [*(2**i for i in range((n - 1).bit_length())), n]
