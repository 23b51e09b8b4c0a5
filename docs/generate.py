"""Fill the generated parts of README.md and docs/: `python docs/generate.py [--check]`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the function of that name
below makes it, from the JSON beside the measurement or from the code itself. `--check` changes nothing
and fails when a part is stale. The lab's summary for the page is made along with them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
NOT_YET = "Not recorded yet."
LAB_ON_THE_PAGE = ROOT / "dft_lora" / "ui" / "lab.json"
GPUS = ROOT / "docs" / "gpu"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)


SETS = {"train": "8 % wrong steps (`train`)", "train-clean": "no wrong steps (`train-clean`)"}


def demo_reports() -> dict[str, list[dict[str, Any]]]:
    """The recorded demos of each training set, by seed."""
    reports: dict[str, list[dict[str, Any]]] = {split: [] for split in SETS}
    for path in sorted(RESULTS.glob("demo-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        reports[report["runs"]["dft"]["data"]["split"]].append(report)
    return reports


def demo_columns(report: dict[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """(task, sampled or greedy) of each column, and the head of the table."""
    columns = [(task, key) for task in report["runs"]["base"]["tasks"] for key in ("avg", "greedy")]
    return columns, " | ".join(f"{task}, {'greedy' if key == 'greedy' else 'T = 1'}" for task, key in columns)


def demo() -> str:
    """base, SFT and DFT of the demo on both training sets, mean of the recorded seeds."""
    reports = demo_reports()
    results = reports["train"][0]["runs"]["base"]["tasks"]
    columns, head = demo_columns(reports["train"][0])

    def row(label: str, run: str, recorded: list[dict[str, Any]]) -> str:
        values = [[r["runs"][run]["tasks"][task][key] for r in recorded] for task, key in columns]
        return f"| {label} | {run} | " + " | ".join(f"{100 * np.mean(v):.1f}" for v in values) + " |"

    lines = [f"| trained on | | {head} |", "|---" * (2 + len(columns)) + "|"]
    lines.append(row("nothing", "base", reports["train"]))
    for split, recorded in reports.items():
        lines += [row(SETS[split], "sft", recorded), row(SETS[split], "dft", recorded)]
    seeds, samples = len(reports["train"]), results["arithmetic"]["samples"]
    said = f"Percent correct, mean over {seeds} seeds; {results['arithmetic']['problems']} problems a set, "
    return "\n".join([*lines, "", f"{said}{samples} samples per problem."])


def demo_seeds() -> str:
    """DFT minus SFT for each recorded demo."""
    reports = demo_reports()
    columns, head = demo_columns(reports["train"][0])
    lines = [f"| trained on | seed | {head} |", "|---" * (2 + len(columns)) + "|"]
    for split, recorded in reports.items():
        for seed, report in enumerate(recorded):
            cells = [lead(report, task, key) for task, key in columns]
            lines.append(f"| {SETS[split]} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lead(report: dict[str, Any], task: str, key: str) -> str:
    """DFT minus SFT on a task, in points, with its interval."""
    (entry,) = (e for e in report["paired"] if (e["a"], e["b"], e["task"]) == ("sft", "dft", task))
    prefix = "" if key == "avg" else "greedy_"
    low, high = entry[f"{prefix}ci95"]
    return f"{100 * entry[f'{prefix}difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def real_demo() -> str:
    """`make real`: base, SFT and DFT on a real base, with intervals and the share of answers that ended."""
    if not (RESULTS / "make-real.json").is_file():
        return NOT_YET
    report = json.loads((RESULTS / "make-real.json").read_text(encoding="utf-8"))
    tasks = list(report["runs"]["base"]["tasks"])
    head = [f"{task}, {mode}" for task in tasks for mode in ("T = 1", "greedy", "ended")]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, run in report["runs"].items():
        cells = []
        for task in tasks:
            found = run["tasks"][task]
            for key in ("avg", "greedy"):
                low, high = found["ci95" if key == "avg" else "greedy_ci95"]
                cells.append(f"{100 * found[key]:.1f} ({100 * low:.0f} to {100 * high:.0f})")
            cells.append(f"{100 * (1 - found['truncated']):.0f} %")
        lines.append(f"| {shown(name)} | {' | '.join(cells)} |")
    leads = [f"{lead(report, task, key)} | " for task in tasks for key in ("avg", "greedy")]
    lines.append(
        "| DFT - SFT | " + "".join(f"{a}{b}| " for a, b in zip(leads[::2], leads[1::2], strict=True))
    )
    some, made = report["runs"]["base"]["tasks"][tasks[0]], report["provenance"]
    return "\n".join(
        [
            *(line.rstrip() for line in lines),
            "",
            f"Percent correct with 95 % intervals; {some['problems']} problems a set, {some['samples']} "
            f"samples per problem, one seed, {made['weights']}. Made on {made['date'][:10]}, commit "
            f"{made['commit']}, by `{made['command']}`.",
        ]
    )


def demo_training() -> str:
    """The objective's own loss beside plain NLL, from the same recorded demos."""
    lines = ["| trained on | | seeds | own loss | plain NLL | NLL / own loss |", "|---|---|---|---|---|---|"]
    for split, recorded in demo_reports().items():
        for run in ("sft", "dft"):
            figures = [report["runs"][run]["training"] for report in recorded]
            loss, nll = (np.mean([f[key] for f in figures]) for key in ("loss", "nll"))
            lines.append(
                f"| {SETS[split]} | {run} | {len(figures)} | {loss:.3f} | {nll:.3f} | {nll / loss:.1f} |"
            )
    return "\n".join(lines)


def demo_sets() -> str:
    """The two training sets, counted."""
    from dft_lora.tasks import get_task

    drawn = {split: get_task("arithmetic").problems(split) for split in SETS}
    asked = {split: {problem.question for problem in problems} for split, problems in drawn.items()}
    lines = [
        "| set | examples | solutions that end wrong | questions also in the other set |",
        "|---|---|---|---|",
    ]
    for split, problems in drawn.items():
        wrong = sum(not p.solution.endswith(f"#### {p.answer}") for p in problems)
        (other,) = (questions for name, questions in asked.items() if name != split)
        lines.append(f"| `{split}` | {len(problems)} | {wrong} | {len(asked[split] & other)} |")
    return "\n".join(lines)


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
        context = click.Context(command, info_name=" ".join(path), **main.context_settings)
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


def bench_gpu() -> str:
    """What each GPU showed: one table for each file in docs/gpu/."""
    from dft_lora.bench.table import gpu_table

    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(GPUS.glob("*.json"))]
    return "\n\n".join(map(gpu_table, results)) or "No GPU is recorded yet."


def findings() -> str:
    """The lines of the findings with their contrasts, then the accuracy behind them."""
    result = json.loads((RESULTS / "findings.json").read_text(encoding="utf-8"))
    settings = result["settings"]
    lines = claim_table(dict(enumerate(result["lines"], start=1)))
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
    provenance, own = result["provenance"], named["own-samples"]["samples"]
    advice = "; ".join(
        f"{name}, mean probability {found['mean_probability']:.2f}, favours {found['favours']}"
        for name, found in said.items()
    )
    later = [
        f" Line {number} was measured again on {line['date']}, commit {line['commit']}."
        for number, line in enumerate(result["lines"], start=1)
        if line["commit"] != provenance["commit"]
    ]
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
            f"Made on {provenance['date']}, commit {provenance['commit']}, torch "
            f"{provenance['versions']['torch']}, base {provenance['base'][:12]}." + "".join(later),
        ]
    )


def claim_table(claims: dict[int, dict[str, Any]]) -> list[str]:
    """The claims by number with their verdicts, and a row for each contrast that a verdict rests on."""
    lines = [
        "| | claim | verdict | rests on | points, 95 % interval | each seed |",
        "|---|---|---|---|---|---|",
    ]
    for number, line in claims.items():
        rows = [
            (part["what"], difference(part), ", ".join(f"{100 * seed:+.1f}" for seed in part["seeds"]))
            for part in line["parts"]
        ]
        if "peak" in line:
            rows = [(f"best step, {name}", "", ", ".join(map(str, p))) for name, p in line["peak"].items()]
        for i, row in enumerate(rows):
            head = (str(number), line["claim"], f"**{line['verdict']}**") if i == 0 else ("", "", "")
            lines.append(f"| {' | '.join((*head, *row))} |")
    return lines


def claims_on_real_bases() -> dict[str, dict[str, Any]]:
    """Base -> name of a claim -> the recorded part."""
    if not (RESULTS / "real.json").is_file():
        return {}
    bases = json.loads((RESULTS / "real.json").read_text(encoding="utf-8"))["bases"]
    found = {
        base: {
            name.removeprefix("claims/"): part for name, part in parts.items() if name.startswith("claims/")
        }
        for base, parts in bases.items()
    }
    return {base: claims for base, claims in found.items() if claims}


def verdicts() -> str:
    """Each claim's verdict on the embedded base and on the real ones."""
    embedded = json.loads((RESULTS / "findings.json").read_text(encoding="utf-8"))["lines"]
    real = claims_on_real_bases()
    head = ["", "claim", "embedded base", *real]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, line in enumerate(embedded, start=1):
        name, claim = line["name"], line["claim"].replace("long set", "harder set")
        said = [claims[name]["found"]["verdict"] if name in claims else "not run" for claims in real.values()]
        lines.append(f"| {' | '.join([str(number), claim, line['verdict'], *said])} |")
    return "\n".join(lines)


def real_claims() -> str:
    """For each real base: the claims with their contrasts, then the accuracy behind them."""
    embedded = json.loads((RESULTS / "findings.json").read_text(encoding="utf-8"))
    names = [line["name"] for line in embedded["lines"]]
    blocks = []
    for base, claims in claims_on_real_bases().items():
        parts = json.loads((RESULTS / "real.json").read_text(encoding="utf-8"))["bases"][base]
        numbered = {n: claims[name]["found"] for n, name in enumerate(names, start=1) if name in claims}
        lines = [f"### {base}", "", *claim_table(numbered)]
        tables = {n.removeprefix("table/"): p["found"] for n, p in parts.items() if n.startswith("table/")}
        if tables:
            columns = list(next(iter(tables.values()))["accuracy"])
            head = ["", *columns, "ended", "other text, NLL"]
            lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            for kind in sorted(tables, key=list(embedded["accuracy"]).index):
                found = tables[kind]
                cells = [shown(kind), *(f"{100 * found['accuracy'][c]:.1f}" for c in columns)]
                cells.append(", ".join(f"{100 * share:.0f} %" for share in found["ended"].values()))
                cells.append(f"{found['other_text_nll']:.2f}")
                lines.append(f"| {' | '.join(cells)} |")
        days = sorted({part["date"][:10] for part in claims.values()})
        commits = ", ".join(sorted({part["commit"] for part in claims.values()}))
        some = next(iter(claims.values()))
        lines += [
            "",
            f"{plural(len(some['seeds']), 'seed')}, {some['problems']} problems a set. Made on "
            f"{', '.join(days)}, commit {commits}, torch {some['versions']['torch']}.",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or NOT_YET


def remedies() -> str:
    """What ends DFT's answers: one table per base, with each kind against SFT and against plain DFT."""
    if not (RESULTS / "real.json").is_file():
        return NOT_YET
    bases = json.loads((RESULTS / "real.json").read_text(encoding="utf-8"))["bases"]
    blocks = []
    for base, parts in bases.items():
        if "remedies" not in parts:
            continue
        recorded = parts["remedies"]
        kinds = recorded["found"]
        columns = list(next(iter(kinds.values()))["accuracy"])
        first = next(iter(next(iter(kinds.values()))["ended"]))
        head = ["", "rate", *columns, "ended", "p(end)", "all sets minus SFT", f"{first} minus SFT"]
        head += [f"{first} greedy minus SFT", "all sets minus plain DFT", "other text, NLL"]
        lines = [f"### {base}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for kind, found in kinds.items():
            ended = [f"{100 * share:.0f} %" for share in found["ended"].values()]
            cells = [
                seeds_of(kind, recorded),
                f"{found['learning_rate']:g}",
                *(f"{100 * found['accuracy'][column]:.1f}" for column in columns),
                ", ".join(ended),
                f"{found['p_end']:.2f}",
                *(
                    "" if kind == "sft" else difference(part)
                    for part in (
                        found["against_sft"],
                        found["first_set"]["against_sft"],
                        found["first_set"]["against_sft_greedy"],
                    )
                ),
                "" if kind == "plain dft" else difference(found["against_plain"]),
                f"{found['other_text_nll']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        versions = recorded["versions"]
        lines += [
            "",
            f"{plural(len(recorded['seeds']), 'seed')}, {recorded['problems']} problems a set. Made on "
            f"{recorded['date'][:10]}, commit {recorded['commit']}, torch {versions['torch']}.",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


HEADLINE = ("sft", "plain dft", "dft")


def real() -> str:
    """The headline of `remedies`, for the README: the set that resembles the training problems, then all."""
    if not (RESULTS / "real.json").is_file():
        return NOT_YET
    bases = json.loads((RESULTS / "real.json").read_text(encoding="utf-8"))["bases"]
    lines = [
        "| base | | T = 1 | minus SFT | greedy | minus SFT | ended | all sets, T = 1, minus SFT |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    made = []
    for base, parts in bases.items():
        if base.startswith("tiny") or "remedies" not in parts:
            continue
        recorded = parts["remedies"]
        first = next(iter(recorded["found"]["sft"]["ended"]))
        for kind in (kind for kind in HEADLINE if kind in recorded["found"]):
            found = recorded["found"][kind]
            contrasts = (*found["first_set"].values(), found["against_sft"])
            sampled, greedy, everywhere = ("" if kind == "sft" else difference(part) for part in contrasts)
            cells = [
                base,
                seeds_of(kind, recorded),
                f"{100 * found['accuracy'][first]:.1f}",
                sampled,
                f"{100 * found['accuracy'][f'{first} greedy']:.1f}",
                greedy,
                f"{100 * found['ended'][first]:.0f} %",
                everywhere,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        made.append(
            f"{base}: {plural(len(recorded['seeds']), 'seed')}, {recorded['problems']} problems a set with 4 "
            f"samples each, {recorded['date'][:10]}, commit {recorded['commit']}"
        )
    lines += [
        "",
        "Percent correct on `word-problems`; the last column is over all sets. Rows of one seed are compared "
        "with SFT's run of that seed. Differences in points with paired 95 % intervals. "
        f"{'; '.join(made)}.",
    ]
    return "\n".join(lines)


def seeds_of(kind: str, recorded: dict[str, Any]) -> str:
    """The kind, and how many seeds it has where they are fewer than the experiment's."""
    seeds = recorded["found"][kind]["seeds"]
    return shown(kind) if seeds == len(recorded["seeds"]) else f"{shown(kind)} ({plural(seeds, 'seed')})"


def shown(kind: str) -> str:
    """A kind of run by its objective: on real bases `dft` is DFT with a floor, beside `plain dft`."""
    return "dft with a floor" if kind == "dft" else kind


def plural(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def difference(part: dict[str, Any]) -> str:
    """A recorded contrast in points, with its interval."""
    low, high = part["ci95"]
    return f"{100 * part['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def rates() -> str:
    """Sampled accuracy on the validation set by learning rate, one number per seed."""
    if not (RESULTS / "real.json").is_file():
        return NOT_YET
    bases = json.loads((RESULTS / "real.json").read_text(encoding="utf-8"))["bases"]
    lines = []
    for base, parts in bases.items():
        for part, recorded in parts.items():
            if part.startswith("rates/"):
                said = "; ".join(
                    f"{rate}: {', '.join(f'{100 * share:.1f}' for share in by_seed)}"
                    for rate, by_seed in recorded["found"].items()
                )
                lines.append(f"| {base} | {shown(part.removeprefix('rates/'))} | {said} |")
    head = ["| base | | learning rate: percent correct at T = 1, by seed |", "|---|---|---|"]
    return "\n".join(head + lines) if lines else NOT_YET


def commonsense() -> str:
    """SFT and DFT on a commonsense set: in words, by log-likelihood, and what was forgotten."""
    file = RESULTS / "tasks.json"
    bases = json.loads(file.read_text(encoding="utf-8"))["bases"] if file.is_file() else {}
    blocks = []
    for base, parts in bases.items():
        if "objectives" not in parts:
            continue
        recorded = parts["objectives"]
        written, scored, other = ([*recorded["found"]["base"][name]] for name in COMMONSENSE)
        scored = [name for name in scored if not name.endswith(" greedy")]
        head = [
            "",
            "rate",
            *written,
            "minus SFT",
            "greedy minus SFT",
            "ended",
            *(f"{n}, scored" for n in scored),
        ]
        head += ["scored minus SFT", other[0], "other text, NLL"]
        lines = [f"### {base}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for kind, found in recorded["found"].items():
            trained = kind not in ("base", "sft")
            against = [difference(found[name]) if trained else "" for name in AGAINST_SFT]
            cells = [
                shown(kind),
                f"{found['learning_rate']:g}" if kind != "base" else "",
                *(f"{100 * found['accuracy'][column]:.1f}" for column in written),
                *against[:2],
                ", ".join(f"{100 * share:.0f} %" for share in found["ended"].values()),
                *(f"{100 * found['scored'][column]:.1f}" for column in scored),
                against[2],
                f"{100 * found['other_family'][other[0]]:.1f}",
                f"{found['other_text_nll']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            f"Percent correct; differences in points over both sets, with paired 95 % intervals. "
            f"{plural(len(recorded['seeds']), 'seed')}, {recorded['problems']} problems a set. Made on "
            f"{recorded['date'][:10]}, commit {recorded['commit']}, torch {recorded['versions']['torch']}.",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or NOT_YET


def choices() -> str:
    """Multiple choice on the real bases against published figures."""
    return bench("choices") or NOT_YET


def advice() -> str:
    """What `diagnose` advised against what came out, over the recorded experiments."""
    from dft_lora.experiments.advice import advice_table

    return advice_table(RESULTS)


def lab() -> str:
    """The report of the recorded lab."""
    from dft_lora.experiments.lab_report import markdown

    file = RESULTS / "lab.json"
    if not file.is_file():
        return "The lab has not been run in full yet."
    return markdown(json.loads(file.read_text(encoding="utf-8")))


def lab_on_the_page() -> str:
    """The part of the recorded lab that the page shows."""
    from dft_lora.experiments.lab_report import summary

    recorded = json.loads((RESULTS / "lab.json").read_text(encoding="utf-8"))
    return json.dumps(summary(recorded), indent=1, ensure_ascii=False) + "\n"


def rl(file: Path = RESULTS / "rl.json") -> str:
    """For each base: the methods with their accuracy and cost, then the claims."""
    if not file.is_file():
        return NOT_YET
    bases = json.loads(file.read_text(encoding="utf-8"))["bases"]
    return "\n\n".join(
        "\n".join([f"### {name}", "", *rl_table(base), "", *rl_claims(base), "", rl_made(base)])
        for name, base in bases.items()
    )


def rl_table(base: dict[str, Any]) -> list[str]:
    """A line for each method; what its runs cost is the mean over seeds."""
    tasks = base["settings"]["tasks"]
    head = ["", "rate", *tasks, "minus SFT", *(f"{task}, greedy" for task in tasks), "minus SFT, greedy"]
    head += ["pass@4", "entropy", "tokens generated", "tokens trained on", "processor s", "MB", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind, part in base["table"].items():
        line, cost = part["found"], part["found"]["cost"]
        cells = [kind, f"{line['learning_rate']:g}" if cost else ""]
        for suffix, against in (("", "against_sft"), (" greedy", "against_sft_greedy")):
            cells += [f"{100 * line['accuracy'][task + suffix]:.1f}" for task in tasks]
            cells.append("" if kind == "sft" else difference(line[against]))
        cells += [f"{100 * line['pass_at_4']:.1f}", f"{line['entropy']:.3f}"]
        for key in ("generated_tokens", "trained_tokens", "processor_seconds", "peak_memory_mb"):
            cells.append(f"{np.mean([run[key] for run in cost]):,.0f}" if cost else "")
        lines.append(f"| {' | '.join([*cells, str(line['seeds'])])} |")
    return lines


def rl_claims(base: dict[str, Any]) -> list[str]:
    """Each claim with its verdicts and the contrasts of sampled answers behind them."""
    if base["claims"] is None:
        return ["The claims are judged once all methods have run."]
    found = base["claims"]["found"]
    lines = [
        "| claim | T = 1 | greedy | rests on, at T = 1 | points, 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, line in found["sampled"].items():
        rows = [(part["what"], difference(part)) for part in line["parts"]] or [("", "")]
        if "cost_ratio" in line:
            ratios = ", ".join(f"{ratio:.2f}" for ratio in line["cost_ratio"])
            rows.append(("processor seconds, DFT / GRPO, each seed", ratios))
        for i, row in enumerate(rows):
            verdicts = (line["verdict"], found["greedy"][name]["verdict"])
            first = (line["claim"], *(f"**{said}**" for said in verdicts)) if i == 0 else ("", "", "")
            lines.append(f"| {' | '.join((*first, *row))} |")
    return lines


def rl_made(base: dict[str, Any]) -> str:
    """The settings, and where and when the first line was made."""
    settings, made = base["settings"], next(iter(base["table"].values()))
    rates = ", ".join(f"{rate:g}" for rate in settings["rates_tried"])
    return (
        f"At most {settings['problems']} problems a set, {settings['samples']} samples each. Learning rates "
        f"that every method tried: {rates}. Made from {made['date']} on, commit {made['commit']}, torch "
        f"{made['versions']['torch']}."
    )


COMMONSENSE = ("accuracy", "scored", "other_family")
AGAINST_SFT = ("against_sft", "against_sft_greedy", "against_sft_scored")

PARTS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-seeds": demo_seeds,
    "demo-training": demo_training,
    "demo-sets": demo_sets,
    "recipes": recipes,
    "cli": cli,
    "findings": findings,
    "real": real,
    "real-demo": real_demo,
    "remedies": remedies,
    "verdicts": verdicts,
    "real-claims": real_claims,
    "rates": rates,
    "rl": rl,
    "objectives": objectives,
    "hardware": hardware,
    "commonsense": commonsense,
    "advice": advice,
    "lab": lab,
    "bench-choices": choices,
    "bench-loss": partial(bench, "loss"),
    "bench-train": partial(bench, "train"),
    "bench-trainer": partial(bench, "trainer"),
    "bench-rl": partial(bench, "rl"),
    "bench-generation": partial(bench, "generation"),
    "bench-packing": partial(bench, "packing"),
    "bench-memory": partial(bench, "memory"),
    "bench-gpu": bench_gpu,
    "bench-longest": lambda: bench("longest") or NOT_YET,
}


def fill(text: str) -> str:
    """`text` with every generated part made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main(check: bool = False) -> int:
    stale = []
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for path in (*documents, *([LAB_ON_THE_PAGE] if (RESULTS / "lab.json").is_file() else [])):
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        after = lab_on_the_page() if path == LAB_ON_THE_PAGE else fill(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'stale; run python docs/generate.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
