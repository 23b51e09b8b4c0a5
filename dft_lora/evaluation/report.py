"""Build reports from the answers on disk: report.json, report.md, plots, LLM Comparator files.

Only run folders are read; no model is loaded and nothing is generated or judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

from ..data.templates import shown
from ..errors import RequestError
from ..runs.folder import RunFolder, make_writable, run_names, steps_in, write_json, write_text
from ..runs.provenance import certificate
from . import statistics as st
from .protocol import FORGETTING, WEIGHTS, Protocol, said
from .task_results import TaskResults, complete_tasks, evaluated_tasks
from .text import report_markdown
from .token_metrics import token_metrics


def build(
    folders: Sequence[RunFolder], tasks: Iterable[str] = (), free: Collection[str] = ()
) -> dict[str, Any]:
    """The report on some runs, over `tasks` or every task that they were evaluated on.

    Raises RequestError when two runs were evaluated on a task under different protocols, naming the
    difference. The protocol fields in `free` may differ.
    """
    names = run_names(folders)
    results: dict[str, dict[str, TaskResults]] = {}
    for name, folder in zip(names, folders, strict=True):
        evaluated = tasks or evaluated_tasks(folder)
        if not evaluated:
            raise RequestError(f"{folder.path}: not evaluated yet; run dft-lora evaluate {folder.path}")
        results[name] = {task: TaskResults.read(folder, task) for task in evaluated}
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        runs[name] = {
            "path": str(folder.path),
            "template": folder.run()["template"],
            **(trained(folder) if folder.has_adapter else {"objective": None}),
            "adapter": folder.adapter_digest,
            "tasks": {task: result.summary() for task, result in results[name].items() if result.problems},
        }
        if texts := {task: said for task, r in results[name].items() if (said := r.text_summary())}:
            runs[name]["texts"] = texts
    pairs = [_compare(a, b, results[a], results[b], free) for a, b in combinations(names, 2)]
    paired_texts = [entry for _, entries in pairs for entry in entries]
    return {
        "runs": runs,
        "paired": _with_holm([entry for entries, _ in pairs for entry in entries]),
        **({"paired_texts": paired_texts} if paired_texts else {}),
        "tokens": token_metrics(dict(zip(names, folders, strict=True))),
        "steps": {name: steps(folder) for name, folder in zip(names, folders, strict=True)},
        "provenance": certificate(**_weights(folders)),
    }


def trained(folder: RunFolder) -> dict[str, Any]:
    """What an adapter was trained on, with the means of the objective's own loss and of plain NLL.

    `training` holds means over the logged steps, in nats per token.
    """
    recipe, steps = folder.recipe(), folder.metrics()
    return {
        "objective": recipe.objective.name,
        "data": {"source": recipe.data.source, "split": recipe.data.split},
        "training": {"steps": len(steps), **{key: _mean(steps, key) for key in ("loss", "nll")}},
    }


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a metric over the steps that logged it; a skipped step logs None."""
    values = [line[key] for line in lines if line[key] is not None]
    return sum(values) / len(values) if values else None


def _weights(folders: Sequence[RunFolder]) -> dict[str, str]:
    """{"weights": how the base's weights are held} over all runs; empty if no run recorded it."""
    held = {folder.run().get("provenance", {}).get("weights") for folder in folders} - {None}
    return {"weights": "; ".join(sorted(held))} if held else {}


def _compare(
    a: str, b: str, left: Mapping[str, TaskResults], right: Mapping[str, TaskResults], free: Collection[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries for b - a over the same problems, one per task that both runs have.

    First those of judged answers, sampled and greedy, then those of scored texts: their NLL.
    """
    shared = [task for task in left if task in right]
    if not shared:
        raise RequestError(
            f"{a} was evaluated on {', '.join(left)}, {b} on {', '.join(right)}: no task in common; "
            "evaluate both on the same task"
        )
    entries, texts = [], []
    for task in shared:
        if differing := _differences(left[task], right[task], free):
            raise RequestError(
                f"{a} and {b} were evaluated on {task!r} under different protocols: {differing}"
            )
        scored, again = left[task].texts, right[task].texts
        if scored is not None and again is not None:
            change_E = again.nll_E - scored.nll_E
            texts.append(
                {
                    "a": a,
                    "b": b,
                    "task": task,
                    "nll_difference": float(change_E.mean()),
                    "ci95": list(st.unbounded_interval(change_E)),
                }
            )
        if not left[task].problems:
            continue
        drawn = st.compare(st.avg_at_n(left[task].correct_PS), st.avg_at_n(right[task].correct_PS))
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
    return entries, texts


def _differences(left: TaskResults, right: TaskResults, free: Collection[str]) -> str:
    """The differences between two protocols as text; empty if there are none."""
    reported_below = {"problems", "problems_hash", "template_hash"}
    known = [f.name for f in fields(Protocol) if f.name not in reported_below | {*free, *WEIGHTS}]
    found = [
        f"{k} {said(k, left.protocol)} and {said(k, right.protocol)}"
        for k in known
        if left.protocol.get(k) != right.protocol.get(k)
    ]
    only = [len(set(x.problems) - set(y.problems)) for x, y in ((left, right), (right, left))]
    if any(only):
        found.append(
            f"{only[0]} of {len(left.problems)} and {only[1]} of {len(right.problems)} problems differ"
        )
    elif left.protocol["problems_hash"] != right.protocol["problems_hash"]:
        found.append("problems with the same ids have different texts or answers")
    if not found and left.protocol["template_hash"] != right.protocol["template_hash"]:
        found.append(f"template {shown(left.protocol['template'])} gives different token ids")
    return "; ".join(found)


def paired(comparison: st.Comparison) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        "difference": comparison.difference,
        "ci95": list(comparison.ci95),
        "p_value": comparison.p_value,
        "smallest_detectable": comparison.smallest_detectable,
        "noise": comparison.noise,
    }


def _with_holm(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm-adjusted p-values, over all sampled comparisons of the report."""
    if entries:
        for entry, p in zip(entries, st.holm([entry["p_value"] for entry in entries]), strict=True):
            entry["p_holm"] = float(p)
    return entries


def steps(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of the run's evaluated checkpoints (`steps/`), by task."""
    curve: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in steps_in(folder.path / "steps").values():
        if not RunFolder(path).begun:  # a copy that was interrupted
            continue
        run = RunFolder.open(path)
        for task in complete_tasks(run):
            result = TaskResults.read(run, task)
            if not result.problems:
                continue
            scores_P = st.avg_at_n(result.correct_PS)
            entry = {"step": run.run()["step"], "avg": float(scores_P.mean())}
            curve[task].append(entry | {"ci95": list(st.interval(scores_P))})
    return curve


def write_report(
    folders: Sequence[RunFolder], out: Path | None, tasks: Iterable[str] = (), comparator: bool = False
) -> dict[str, Any]:
    """Build the report and, if `out` is given, write report.json, report.md and plots/ there.

    With `comparator`, also write a file for Google's LLM Comparator per pair of runs and task.
    """
    report = build(folders, tasks)
    named = dict(zip(run_names(folders), folders, strict=True))
    _name_tokens(report, folders)
    if out is not None:
        from ..runs import plots

        make_writable(out, "report")
        write_json(out / "report.json", report)
        if any(run["tasks"] for run in report["runs"].values()):
            plots.accuracy(report, out / "plots" / "accuracy.png")
        plots.curves(named, out / "plots" / "training.png")
        for title in report["tokens"]:
            if title != FORGETTING:
                plots.probabilities(report, title, out / "plots" / f"probabilities-{title}.png")
        if any(report["steps"].values()):
            plots.steps(report["steps"], out / "plots" / "steps.png")
        write_text(out / "report.md", report_markdown(report))
        if comparator:
            for entry in report["paired"]:
                a, b, task = entry["a"], entry["b"], entry["task"]
                pair = [TaskResults.read(named[name], task) for name in (a, b)]
                name = f"{a}-{b}-{task}.json".replace("/", "_")
                write_json(out / "llm-comparator" / name, llm_comparator(a, b, *pair))
    return report


def write_own_report(folder: RunFolder) -> dict[str, Any]:
    """Write the report on one run to its folder, with every task that it has completely answered."""
    return write_report([folder], folder.path, tasks=complete_tasks(folder))


def llm_comparator(a: str, b: str, left: TaskResults, right: TaskResults) -> dict[str, Any]:
    """Greedy answers side by side, in the JSON format of Google's LLM Comparator.

    Its score is positive where A is better; here it is 1, 0 or -1 according to the verdicts.
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
                "custom_fields": {"correct": [bool(left.greedy_P[i]), bool(right.greedy_P[i])]},
            }
        )
    schema = {"name": "correct", "type": "per_model_boolean"}
    return {
        "metadata": {"source_path": left.protocol["task"], "custom_fields_schema": [schema]},
        "models": [{"name": a}, {"name": b}],
        "examples": examples,
    }


def _name_tokens(report: dict[str, Any], folders: Sequence[RunFolder]) -> None:
    """Replace the id of each listed token by its text."""
    listed = [
        entry
        for metrics in report["tokens"].values()
        for run in metrics.values()
        for entry in (*run.get("gained", ()), *run.get("suppressed", ()))
    ]
    if listed:
        from ..model.load import load_tokenizer

        tokenizer = load_tokenizer(folders[0].recipe().model)
        for entry in listed:
            entry[0] = tokenizer.decode([entry[0]])
