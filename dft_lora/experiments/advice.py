"""What `diagnose` advised before training against what came out, over all recorded experiments.

A case is one comparison of a kind of DFT with SFT on one base and training set. Its outcome is `dft` or `sft`
where the 95 % interval of the difference excludes zero, else `either`. The advice is

    right        it names the outcome
    wrong        it names one objective, and the other one won
    open         it names one objective, and neither won
    undecided    it names neither, and one of them won

The advice that DFT will not learn to end its answers is right where plain DFT ends fewer than ENDED of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..evaluation.diagnosis import advice, diagnose

MEASURED = ("mean_probability", "share_below_0.1", "share_above_0.9", "nll", "p_end", "p_first")
ENDED = 0.5
VERDICTS = ("right", "wrong", "open", "undecided")


@dataclass(frozen=True)
class Case:
    """One comparison; `favours`: what `diagnose` advised when it was recorded.

    `ends`: (whether it was said to end its answers, the share that it ended).
    """

    experiment: str
    base: str
    trained_on: str
    compared: str
    mean_probability: float
    favours: str
    difference: float
    ci95: tuple[float, float]
    p_first: float | None = None
    ends: tuple[bool, float] | None = None

    @property
    def now(self) -> str:
        """What `diagnose` advises of the same measurements today."""
        return self.favours if self.p_first is None else advice(self.mean_probability, self.p_first)[0]

    @property
    def outcome(self) -> str:
        low, high = self.ci95
        return "dft" if low > 0 else "sft" if high < 0 else "either"

    def verdict(self, said: str) -> str:
        if said == self.outcome:
            return "right"
        if said == "either":
            return "undecided"
        return "open" if self.outcome == "either" else "wrong"

    @property
    def end_verdict(self) -> str:
        if self.ends is None:
            return ""
        said, share = self.ends
        return "right" if said == (share >= ENDED) else "wrong"


def before_training(recipe: Recipe, examples: int = 128) -> dict[str, Any]:
    """What `diagnose` measures and says about the recipe: the quantities of MEASURED and both verdicts."""
    found = diagnose(recipe, examples)
    said = ("favours", "verdict", "learns_to_end", "dft_learns_to_end", "end_verdict", "examples")
    return {key: found[key] for key in (*MEASURED, *said)}


def cases(results: Path) -> list[Case]:
    """The cases of all recorded experiments in a folder: findings, real, tasks and lab."""
    readers = {"findings": _findings, "real": _real, "tasks": _tasks, "lab": _lab}
    files = {name: results / f"{name}.json" for name in readers}
    return [
        case
        for name, file in files.items()
        if file.is_file()
        for case in readers[name](json.loads(file.read_text(encoding="utf-8")))
    ]


def advice_table(results: Path) -> str:
    """Advice against outcome as Markdown, and how often it was right."""
    found = cases(results)
    lines = [
        "| experiment, base | trained on | mean p | advice | compared | points (interval) | advice was "
        "| present rule |",
        "|---|---|---:|---|---|---:|---|---|",
    ]
    for case in found:
        low, high = (100 * bound for bound in case.ci95)
        cells = [f"{case.experiment}, {case.base}", case.trained_on, f"{case.mean_probability:.2f}"]
        cells += [case.favours, case.compared, f"{100 * case.difference:+.1f} ({low:+.1f} to {high:+.1f})"]
        ends = f"; on the end: {case.end_verdict}" if case.ends else ""
        now = f"{case.now}: {case.verdict(case.now)}" if case.now != case.favours else "the same"
        lines.append(f"| {' | '.join(cells)} | {case.verdict(case.favours)}{ends} | {now} |")
    then = _counts([case.verdict(case.favours) for case in found])
    now = _counts([case.verdict(case.now) for case in found])
    said = f"{len(found)} cases. Advice then: {then}; present rule: {now}. Intervals are paired, 95 %."
    return "\n".join([*lines, "", said])


def _counts(verdicts: Sequence[str]) -> str:
    return ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in VERDICTS)


def _findings(result: Mapping[str, Any]) -> Iterator[Case]:
    lines = {line["name"]: line for line in result["lines"]}
    yield from _claims("findings", "tiny", lines, "DFT - SFT")


def _real(result: Mapping[str, Any]) -> Iterator[Case]:
    for base, parts in result["bases"].items():
        claims = {
            name.removeprefix("claims/"): part["found"]
            for name, part in parts.items()
            if name.startswith("claims/")
        }
        if {"new-facts", "above-sft"} <= set(claims):
            yield from _claims("real", base, claims, "DFT with floor 0.1 - SFT")
        if {"diagnosis", "remedies"} <= set(parts):
            said, plain = parts["diagnosis"]["found"], parts["remedies"]["found"]["plain dft"]
            ends = _ends(said, plain)
            yield _case("real", base, "its own", "plain DFT - SFT", said, plain["against_sft"], ends)


def _claims(experiment: str, base: str, lines: Mapping[str, Any], compared: str) -> Iterator[Case]:
    """Two cases: the paper's main claim, and new facts. Both record what `diagnose` said."""
    facts = lines["new-facts"]
    (task, said), (facts_task, facts_said) = facts["diagnosis"].items()
    yield _case(experiment, base, task, compared, said, lines["above-sft"]["parts"][0])
    recalled = facts["parts"][0]  # SFT - DFT
    turned = {
        "difference": -recalled["difference"],
        "ci95": [-bound for bound in reversed(recalled["ci95"])],
    }
    yield _case(experiment, base, facts_task, compared, facts_said, turned)


def _tasks(result: Mapping[str, Any]) -> Iterator[Case]:
    for base, parts in result["bases"].items():
        if not {"diagnosis", "objectives"} <= set(parts):
            continue
        said, found = parts["diagnosis"]["found"], parts["objectives"]["found"]
        for kind, compared in (("plain dft", "plain DFT - SFT"), ("dft", "DFT with floor 0.1 - SFT")):
            ends = _ends(said, found[kind]) if kind == "plain dft" else None
            yield _case("tasks", base, "openbookqa", compared, said, found[kind]["against_sft"], ends)


def _lab(result: Mapping[str, Any]) -> Iterator[Case]:
    for regime, parts in result["bases"].items():
        if {"diagnosis", "test/dft"} <= set(parts):
            said, found = parts["diagnosis"]["found"], parts["test/dft"]["found"]
            part = found["against"]["sft"]["sampled"]
            yield _case("lab", regime, "as named", "plain DFT - SFT", said, part, _ends(said, found))


def _ends(said: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[bool, float]:
    """Whether plain DFT was said to end its answers, and the share that it ended."""
    ended = list(found["ended"].values())
    return said["dft_learns_to_end"], sum(ended) / len(ended)


def _case(
    experiment: str,
    base: str,
    trained_on: str,
    compared: str,
    said: Mapping[str, Any],
    part: Mapping[str, Any],
    ends: tuple[bool, float] | None = None,
) -> Case:
    low, high = part["ci95"]
    return Case(
        experiment,
        base,
        trained_on,
        compared,
        said["mean_probability"],
        said["favours"],
        part["difference"],
        (low, high),
        said.get("p_first"),
        ends,
    )
