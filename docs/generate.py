"""Fill the generated parts of README.md and docs/: `python docs/generate.py [--check]`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the function of that name
below makes it, from the JSON beside the measurement or from the code itself. `--check` changes nothing
and fails when a part is stale.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


def demo() -> str:
    """base, SFT and DFT of the demo, mean of its recorded seeds; paired differences seed by seed."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo-seed-*.json"))]
    first = reports[0]

    def mean(run: str, task: str, key: str) -> str:
        return f"{100 * np.mean([r['runs'][run]['tasks'][task][key] for r in reports]):.1f}"

    lines = [
        "| | "
        + " | ".join(f"{task}, T = 1 | {task}, greedy" for task in first["runs"]["base"]["tasks"])
        + " |",
        "|---|" + "---|" * (2 * len(first["runs"]["base"]["tasks"])),
    ]
    for run, values in first["runs"].items():
        cells = [mean(run, task, key) for task in values["tasks"] for key in ("avg", "greedy")]
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    differences = []
    for task in first["runs"]["base"]["tasks"]:
        pairs = [
            e for r in reports for e in r["paired"] if (e["a"], e["b"], e["task"]) == ("sft", "dft", task)
        ]
        each = "; ".join(
            f"{100 * e['difference']:+.1f} ({100 * e['ci95'][0]:+.1f} to {100 * e['ci95'][1]:+.1f})"
            for e in pairs
        )
        differences.append(f"{task}: {each}")
    problems, samples = (first["runs"]["base"]["tasks"]["arithmetic"][key] for key in ("problems", "samples"))
    return (
        "\n".join(lines)
        + f"\n\nPercent correct, mean over {len(reports)} seeds; {problems} problems a set, "
        + f"{samples} samples a problem. "
        + "DFT minus SFT at T = 1, in points, each seed with its paired 95 % interval: "
        + "; ".join(differences)
        + "."
    )


def recipes() -> str:
    """The shipped recipes and their first line."""
    from dft_lora.config import shipped_recipes

    lines = ["| recipe | what it is |", "|---|---|"]
    for name, path in shipped_recipes().items():
        lines.append(f"| `{name}` | {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')} |")
    return "\n".join(lines)


def cli() -> str:
    """The help of every command."""
    import click

    from dft_lora.cli import main

    def walk(command: click.Command, path: list[str]) -> list[str]:
        context = click.Context(command, info_name=" ".join(path), max_content_width=100)
        text = [f"## {' '.join(path)}\n\n```\n{command.get_help(context)}\n```"]
        for name, sub in sorted(getattr(command, "commands", {}).items()):
            text += walk(sub, [*path, name])
        return text

    return "\n\n".join(walk(main, ["dft-lora"]))


def objectives() -> str:
    """Every objective with the first line of its docstring."""
    from dft_lora.loss import objective, objective_names

    lines = ["| objective | loss of a token, and where it comes from |", "|---|---|"]
    for name in objective_names():
        formula = (type(objective(name)).__doc__ or "").strip().splitlines()[0].replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} |")
    return "\n".join(lines)


def hardware() -> str:
    """The dtype rules, in the order in which they are tried."""
    from dft_lora.model.hardware import RULES

    lines = ["| device | what computes in what |", "|---|---|"]
    return "\n".join([*lines, *(f"| {rule.where} | {rule.consequence} |" for rule in RULES)])


def bench(kind: str) -> str:
    """The committed results of one bench."""
    from dft_lora.bench.table import tables

    return tables(kind=kind)


def findings() -> str:
    """The lines of the findings with their contrasts, then the accuracy behind them."""
    result = json.loads((RESULTS / "findings.json").read_text(encoding="utf-8"))
    settings = result["settings"]

    def points(share: float) -> str:
        return f"{100 * share:+.1f}"

    lines = [
        "| | claim | verdict | rests on | points, 95 % interval | each seed |",
        "|---|---|---|---|---|---|",
    ]
    for number, line in enumerate(result["lines"], start=1):
        rows = [
            (
                part["what"],
                f"{points(part['difference'])} ({points(part['ci95'][0])} to {points(part['ci95'][1])})",
                ", ".join(points(seed) for seed in part["seeds"]),
            )
            for part in line["parts"]
        ]
        if "peak" in line:
            rows = [(f"best step, {name}", "", ", ".join(map(str, p))) for name, p in line["peak"].items()]
        for i, row in enumerate(rows):
            head = (str(number), line["claim"], f"**{line['verdict']}**") if i == 0 else ("", "", "")
            lines.append(f"| {' | '.join((*head, *row))} |")
    named = {line["name"]: line for line in result["lines"]}
    said = named["new-facts"]["diagnosis"]
    kinds = result["accuracy"]
    columns = list(next(iter(kinds.values())))
    table = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    table += [
        f"| {kind} | {' | '.join(f'{100 * values[c]:.1f}' for c in columns)} |"
        for kind, values in kinds.items()
    ]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in settings["rates"].items())
    tried = ", ".join(f"{rate:g}" for rate in settings["rates_tried"])
    temperatures = ", ".join(f"{t:.2f}" for t in named["sharpening"]["temperatures"])
    birth, own = result["provenance"], named["own-samples"]["samples"]
    advice = "; ".join(
        f"{name}, mean probability {found['mean_probability']:.2f}, favours {found['favours']}"
        for name, found in said.items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"What `diagnose` said before: {advice}. SFT has DFT's entropy at T = {temperatures}.",
            "",
            "Percent correct at temperature 1 and greedy, mean of the seeds:",
            "",
            *table,
            "",
            f"{settings['seeds']} seeds, {settings['examples']} examples in batches of {settings['batch']}, "
            f"{settings['problems']} problems a set, {settings['samples']} samples each. Learning rates "
            f"tried: {tried}; best on the validation set: {rates}. Own samples: {own['correct']} of "
            f"{own['answers']} were correct; {own['kept']} different ones are trained on. "
            f"Made on {birth['date']}, commit {birth['commit']}, torch "
            f"{birth['versions']['torch']}, base {birth['base'][:12]}.",
        ]
    )


PARTS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "recipes": recipes,
    "cli": cli,
    "findings": findings,
    "objectives": objectives,
    "hardware": hardware,
    "bench-loss": partial(bench, "loss"),
    "bench-train": partial(bench, "train"),
    "bench-packing": partial(bench, "packing"),
}


def fill(text: str) -> str:
    """`text` with every generated part made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main(check: bool = False) -> int:
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'stale; run python docs/generate.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
