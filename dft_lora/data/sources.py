"""Rows of a task, a file or a Hub dataset, read and checked one by one, as Problems.

Every row is read before training. A row that cannot be used is refused by its number, or counted
and skipped while the share stays under `data.skip_bad_rows`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import DataError, did_you_mean
from ..hub import unreachable
from ..tasks import get_task, task_names
from ..tasks.base import Problem
from ..tasks.extraction import clean_gsm8k

SUFFIXES = (".jsonl", ".json", ".parquet")
LONGEST_FIELD = 1_000_000  # characters; longer strings are accidents (a file in a cell), not problems
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number in the source (from 1) and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """What a source held: usable problems, in order, and the rows that were passed over."""

    problems: list[Problem]
    bad: list[BadRow]

    @property
    def total(self) -> int:
        return len(self.problems) + len(self.bad)


class _Unusable(Exception):
    """Raised by row checks with the reason."""


def load_problems(data: DataConfig, seed: int = 0) -> Rows:
    """Read a source whole; `data.sample` rows of it, drawn at random with `seed`, are kept.

    Raises DataError when the source or a column does not exist, when nothing is left, or when more
    than `data.skip_bad_rows` of the rows are unusable (naming the first ones).
    """
    if data.source in task_names():
        rows = Rows(get_task(data.source).problems(data.split), [])
    else:
        rows = _read(data)
    if not rows.total:
        raise DataError(f"data.source {data.source!r} holds no rows")
    if len(rows.bad) > data.skip_bad_rows * rows.total:
        first = "; ".join(f"row {bad.number}: {bad.reason}" for bad in rows.bad[:3])
        more = f"; and {len(rows.bad) - 3} more" if len(rows.bad) > 3 else ""
        raise DataError(
            f"{data.source}: {len(rows.bad)} of {rows.total} rows cannot be used ({first}{more}); "
            "mend them or allow a share with data.skip_bad_rows"
        )
    problems = rows.problems
    if data.sample is not None and data.sample < len(problems):
        chosen = sorted(random.Random(seed).sample(range(len(problems)), data.sample))
        problems = [problems[i] for i in chosen]
    if not problems:
        raise DataError(f"data.source {data.source!r}: no row can be used")
    return Rows(problems, rows.bad)


def _read(data: DataConfig) -> Rows:
    problems: list[Problem] = []
    bad: list[BadRow] = []
    for number, row in _raw_rows(data):
        try:
            if isinstance(row, _Unusable):
                raise row
            problems.extend(_problems(number, row, data))
        except _Unusable as reason:
            bad.append(BadRow(number, str(reason)))
    return Rows(problems, bad)


# --- rows of a source -------------------------------------------------------------------------


def _raw_rows(data: DataConfig) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and row; an unreadable line comes as an _Unusable in the row's place."""
    source = data.source
    if not source.endswith(SUFFIXES):
        if os.path.exists(source):
            raise DataError(f"data.source {source!r} is not a {', '.join(SUFFIXES)} file; name one")
        yield from _hub_rows(data)
        return
    path = Path(source)
    if not os.path.isfile(path):
        raise DataError(f"data.source: no file {source!r}")
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
        elif path.suffix == ".json":
            yield from _json_array(path)
        else:
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    yield number, _Unusable(f"broken JSON ({error})")


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json source is an array of rows, this is a {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _hub_rows(data: DataConfig) -> Iterator[tuple[int, Any]]:
    offline = unreachable()
    from datasets import load_dataset

    try:
        rows = load_dataset(data.source, data.subset, split=data.split)
    except Exception as error:  # whatever the Hub client raises, the remedy is the same
        near = did_you_mean(data.source, task_names())
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(
            f"data.source {data.source!r} is no task{near}, no {'/'.join(SUFFIXES)} file, and could not be "
            + (
                f"found in the local cache, and {offline}; connect, or name a local file"
                if offline
                else f"loaded from the Hub ({reason})"
            )
        ) from None
    yield from enumerate(rows, start=1)


# --- one row ----------------------------------------------------------------------------------


def _problems(number: int, row: Any, data: DataConfig) -> list[Problem]:
    """The problems of one row: one, or one for each assistant turn of a `messages` row."""
    if not isinstance(row, dict):
        raise _Unusable(f"a row is an object of named fields, not a {type(row).__name__}")
    identity = f"row-{number}"
    answer = _text(row, data.answer) if data.answer else None
    if "messages" in row and data.prompt not in row:
        turns = _turns(row["messages"])
        return [
            Problem(
                f"{identity}.{i}" if i != len(turns) - 1 else identity,
                tuple(turns[:i]),
                turn["content"],
                answer,
            )
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
    question, solution = _text(row, data.prompt), _text(row, data.completion)
    if "####" in solution:
        solution, boxed = clean_gsm8k(solution)
        answer = answer or boxed
    return [Problem.ask(identity, question, solution=solution, answer=answer)]


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise _Unusable(f"no column {column!r}{did_you_mean(column, row)}; it has {', '.join(map(str, row))}")
    return _check_text(row[column], f"column {column!r}")


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"{where} is {type(value).__name__}, not text")
    if not value.strip():
        raise _Unusable(f"{where} is empty")
    if len(value) > LONGEST_FIELD:
        raise _Unusable(f"{where} holds {len(value):,} characters (at most {LONGEST_FIELD:,})")
    if "\x00" in value:
        raise _Unusable(f"{where} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable(f"{where} holds a lone surrogate") from None
    return value


def _turns(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise _Unusable("'messages' is not a list of {role, content}")
    turns = []
    for i, turn in enumerate(messages, start=1):
        role = turn.get("role")
        if role not in ROLES:
            raise _Unusable(f"turn {i} has role {role!r}; known: {', '.join(ROLES)}")
        if role == "system" and i != 1:
            raise _Unusable(f"turn {i} is a system turn; only the first may be")
        turns.append({"role": role, "content": _check_text(turn.get("content"), f"turn {i}")})
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise _Unusable("'messages' must alternate user and assistant and end with assistant")
    return turns
