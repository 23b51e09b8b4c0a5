"""The data doctor: what a careful reader would notice in a data set, counted, with row numbers.

Rows that cannot be used are refused or skipped in `sources.py`; what is found here is reported. An example
that does not fit, or that has nothing to learn from, is left out and never truncated: half a solution would
teach the model to stop in the middle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DataConfig
from ..errors import DataError
from ..tasks.base import Problem
from .own_tasks import find_task
from .sources import Rows
from .templates import Example

SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """An observation about some rows: a sentence, and the rows' names (`row-N`, or the ids of a task)."""

    what: str
    rows: tuple[str, ...]


def usable(examples: Sequence[Example], limit: int) -> list[Example]:
    """Examples of at most `limit` tokens that have at least one token to learn."""
    return [example for example in examples if len(example.ids) <= limit and example.supervised > 0]


Found = tuple[dict[str, int], list[Finding]]
"""A count for each check, and a finding for each count that is not zero."""


def check_data(
    rows: Rows, rendered: Sequence[Example], limit: int, tasks: Iterable[str], data: DataConfig
) -> Found:
    """`check_rows` and `check_examples` together, where all rows were rendered."""
    (counts, findings), (more_counts, more_findings) = (
        check_rows(rows, tasks, data),
        check_examples(rendered, limit),
    )
    return counts | more_counts, findings + more_findings


def check_rows(rows: Rows, tasks: Iterable[str], data: DataConfig, own_answers: bool = False) -> Found:
    """Check the texts of all rows. With `own_answers` they need no solution, but a reference answer.

    `tasks` are those that the run will be evaluated on; `data` names the columns of an own test set. A row
    that asks the same question as one of them, up to case and white space, is an overlap. Raises RequestError
    for a task that does not exist.
    """
    lacking = (
        {"without_answer": ("no answer: left out", [p.id for p in rows.problems if p.answer is None])}
        if own_answers
        else {
            "without_solution": ("no solution: left out", [p.id for p in rows.problems if p.solution is None])
        }
    )
    noted = {
        **lacking,
        "duplicates": ("same text as an earlier row: kept", _repeated(rows.problems)),
    }
    unchecked = []
    for task in [find_task(name, data) for name in tasks]:
        try:
            asked = {normalized(problem) for problem in task.problems()}
        except DataError as error:
            unchecked.append(Finding(f"overlap with {task.name} not checked: {error}", ()))
            continue
        shared = [problem.id for problem in rows.problems if normalized(problem) in asked]
        what = f"same question as in the evaluation task {task.name}: kept"
        noted[f"overlap_with_{task.name}"] = (what, shared)

    by_reason = defaultdict(list)
    for bad in rows.bad:
        by_reason[bad.reason].append(f"row-{bad.number}")
    skipped = [Finding(f"{reason}: skipped", tuple(names)) for reason, names in by_reason.items()]
    counts, findings = _summary(noted)
    return {"rows": rows.total, "bad_rows": len(rows.bad), **counts}, skipped + findings + unchecked


def check_examples(rendered: Sequence[Example], limit: int) -> Found:
    """Check the tokens of the rows that were rendered."""
    counts, findings = _summary(
        {
            "over_long": (
                f"longer than data.max_length {limit}: left out",
                [example.id for example in rendered if len(example.ids) > limit],
            ),
            "prompts_that_fill_max_length": (
                f"the prompt alone fills data.max_length {limit}: left out",
                [example.id for example in rendered if example.prompt_length >= limit],
            ),
            "nothing_to_learn": (
                "no token to learn: left out",
                [example.id for example in rendered if example.supervised <= 0],
            ),
        }
    )
    kept = usable(rendered, limit)
    totals = {
        "examples": len(kept),
        "tokens": sum(len(example.ids) for example in kept),
        "supervised_tokens": sum(example.supervised for example in kept),
    }
    return counts | totals, findings


def _summary(noted: Mapping[str, tuple[str, list[str]]]) -> Found:
    """name -> (sentence, row names), as counts and findings."""
    counts = {name: len(names) for name, (_, names) in noted.items()}
    return counts, [Finding(what, tuple(names)) for what, names in noted.values() if names]


def findings_table(findings: Sequence[Finding]) -> str:
    """The findings as text, one per line, with the first rows of each; empty if there are none."""
    lines = []
    for finding in findings:
        shown = ", ".join(finding.rows[:SHOWN]) + (", …" if len(finding.rows) > SHOWN else "")
        lines.append(f"{len(finding.rows):>7}  {finding.what}" + (f"  ({shown})" if shown else ""))
    return "\n".join(lines)


def _repeated(problems: Sequence[Problem]) -> list[str]:
    """Ids of problems with the same turns and solution as an earlier one."""
    seen: set[tuple[Any, ...]] = set()
    repeated = []
    for problem in problems:
        if problem.solution is None:
            continue
        text = (*((turn["role"], turn["content"]) for turn in problem.messages), problem.solution)
        if text in seen:
            repeated.append(problem.id)
        seen.add(text)
    return repeated


def normalized(problem: Problem) -> str:
    """A question as it is compared with others: without case, and with single spaces."""
    return " ".join(problem.question.casefold().split())
