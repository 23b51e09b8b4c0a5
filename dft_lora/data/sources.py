"""Rows of a task, a file or a Hub dataset, read and checked one by one, as Problems.

Every row is read before training. A row that cannot be used is refused with its number, or counted and
skipped as long as the share of such rows stays within `data.skip_bad_rows`.

Texts are used unchanged, with one exception. A completion in GSM8K's form (its last line is `#### number`,
and no other line begins with `####`) loses its `<<...>>` marks and has its answer boxed; that answer becomes
the row's answer. This applies only to rows without an answer column: a row with one (`data.answer`; if the
recipe names none, `answer`) is used unchanged, and so is a `messages` row. Files written by
`experiments/own_samples.py` have that column, so they are read back unchanged.

Preference pairs are rows with a question and two texts, `chosen` and `rejected`: two problems that differ in
their solution.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import DataConfig
from ..errors import DataError, did_you_mean, one_line
from ..hub import unreachable
from ..tasks import get_task, task_names
from ..tasks.base import Problem
from ..tasks.extraction import clean_gsm8k, gsm8k_answer

SUFFIXES = (".jsonl", ".json", ".parquet")
LONGEST_FIELD = 1_000_000  # characters; a longer string is an accident (a file in a cell), not a problem
ROLES = ("system", "user", "assistant")
ANSWER = "answer"  # the column of reference answers, if the recipe names none and the rows have it
CHOSEN, REJECTED = "chosen", "rejected"  # the columns of a preference pair
PROMPT = "prompt"  # the Hub's usual name of a pair's question, where rows lack the column data.prompt


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number in the source (from 1) and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """What a source contains: its usable problems, in order, and the rows that were skipped.

    `total` counts the rows that were kept or skipped. A `messages` row has one problem per assistant turn.
    """

    problems: list[Problem]
    bad: list[BadRow]
    total: int


Kind = Literal["solutions", "pairs", "prompts"]


class _Unusable(Exception):
    """Raised by row checks with the reason."""


def load_problems(data: DataConfig, seed: int = 0, kind: Kind = "solutions") -> Rows:
    """Read all of a source; keep at most `data.sample` usable rows, drawn at random with `seed`.

    `pairs`: each row gives two problems in a row, the chosen and the rejected one. `prompts`: a row needs no
    solution.

    Raises DataError if the source or a column does not exist, if a field does not apply to this kind of
    source, if no row is left, or if more than `data.skip_bad_rows` of the rows are unusable (naming the first
    ones).
    """
    _refuse_ignored(data)
    if kind == "pairs" and data.source in task_names():
        raise DataError(
            f"data.source {data.source!r}: a task has no preference pairs; name a file with the columns "
            f"{CHOSEN} and {REJECTED} (dft-lora sample RECIPE --pairs pairs.jsonl writes one), or give the "
            "recipe a section rollouts"
        )
    if data.source in task_names():
        good = [[problem] for problem in get_task(data.source).problems(data.split)]
        bad: list[BadRow] = []
    else:
        good, bad = _read(data, _ROWS[kind])
    total = len(good) + len(bad)
    if not total:
        raise DataError(f"data.source {data.source!r} has no rows")
    if len(bad) > data.skip_bad_rows * total:
        remedy = "fix them, or allow a share of bad rows with data.skip_bad_rows"
        if not good and kind != "pairs" and all("no column" in row.reason for row in bad):
            remedy = "fix them, or name the columns in data.prompt and data.completion"
        raise DataError(f"{data.source}: {_counted(bad, total)}; {remedy}")
    if not good:
        raise DataError(f"data.source {data.source!r}: {_counted(bad, total)}")
    if data.sample is not None and data.sample < len(good):
        chosen = sorted(random.Random(seed).sample(range(len(good)), data.sample))
        good = [good[i] for i in chosen]
    return Rows([problem for row in good for problem in row], bad, len(good) + len(bad))


def load_tests(path: str, data: DataConfig) -> list[Problem]:
    """The problems of a test set: its rows have a solution, a reference answer, or both.

    Columns are named as in `data`, or by default in a row without its prompt. Raises DataError if a row
    cannot be used (naming the first ones), or if there is none.
    """
    good, bad = _read(data.model_copy(update={"source": path}), _test)
    if bad:
        remedy = "fix them"
        if not good and all("no column" in row.reason for row in bad):
            remedy += "; the columns are those of the recipe's data, or problem, solution and answer"
        raise DataError(f"{path}: {_counted(bad, len(good) + len(bad))}; {remedy}")
    if not good:
        raise DataError(f"{path}: has no rows")
    return [problem for row in good for problem in row]


def _counted(bad: Sequence[BadRow], total: int) -> str:
    if len(bad) > 3 and len({row.reason for row in bad}) == 1:
        return f"{len(bad)} of {total} rows cannot be used (row {bad[0].number} and others: {bad[0].reason})"
    first = "; ".join(f"row {row.number}: {row.reason}" for row in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{len(bad)} of {total} rows cannot be used ({first}{more})"


def judgeable(rows: Rows, data: DataConfig) -> list[Problem]:
    """The problems that have a reference answer. Raises DataError if there are none."""
    problems = [problem for problem in rows.problems if problem.answer is not None]
    if not problems:
        raise DataError(
            f"data.source {data.source!r}: no row has a reference answer to judge answers by; "
            "name its column in data.answer"
        )
    return problems


def _refuse_ignored(data: DataConfig) -> None:
    """Raises DataError for a field that does not apply to this kind of source."""
    if data.source in task_names():
        if data.subset is not None:
            raise DataError(
                f"data.subset {data.subset!r}: the task {data.source!r} has no subsets; leave it out (only "
                "Hub datasets have them)"
            )
    elif data.source.endswith(SUFFIXES):
        if data.subset is not None:
            raise DataError(f"data.subset {data.subset!r}: a file has no subsets; leave it out")
        if data.split != DataConfig.model_fields["split"].default:
            raise DataError(
                f"data.split {data.split!r}: a file has no splits; leave it out, and name the file with "
                "those rows in data.source"
            )


def _read(
    data: DataConfig, problems_of: Callable[[int, Any, DataConfig], list[Problem]]
) -> tuple[list[list[Problem]], list[BadRow]]:
    """The problems of each usable row, and the rows that cannot be used."""
    good: list[list[Problem]] = []
    bad: list[BadRow] = []
    for number, row in _raw_rows(data):
        try:
            if isinstance(row, _Unusable):
                raise row
            good.append(problems_of(number, row, data))
        except _Unusable as reason:
            bad.append(BadRow(number, str(reason)))
    return good, bad


# --- rows of a source -------------------------------------------------------------------------


def _raw_rows(data: DataConfig) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and row; an unreadable line yields an _Unusable in place of the row."""
    source = data.source
    if not source.lower().endswith(SUFFIXES):
        if os.path.exists(source):
            kind = f"{', '.join(SUFFIXES)} file"
            what = f"a folder, not a {kind}" if os.path.isdir(source) else f"not a {kind}"
            raise DataError(f"data.source {source!r} is {what}; name one")
        yield from _hub_rows(data)
        return
    path = Path(source)
    if not os.path.isfile(path):
        what = f"{source!r} is a folder" if os.path.isdir(path) else f"no file {source!r}"
        raise DataError(f"data.source: {what}")
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _json_lines(path)
        elif path.suffix.lower() == ".json":
            yield from _json_array(path)
        else:
            yield from _parquet_rows(path)
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or one_line(error)}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a broken file, an invalid date
        raise DataError(f"{path}: not readable as parquet ({one_line(error)})") from None
    yield from enumerate(rows, start=1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except UnicodeDecodeError:
                    yield number, _Unusable("not UTF-8 text")
                except (ValueError, RecursionError) as error:
                    yield number, _Unusable(f"broken JSON ({error})")


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json source must be an array of rows, this is a {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _hub_rows(data: DataConfig) -> Iterator[tuple[int, Any]]:
    offline = unreachable()
    from datasets import load_dataset

    try:
        rows = load_dataset(data.source, data.subset, split=data.split)
    except Exception as error:  # the Hub client raises many kinds of errors; the remedy is the same
        near = did_you_mean(data.source, task_names())
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(
            f"data.source {data.source!r} is no task{near} or {'/'.join(SUFFIXES)} file, and could not be "
            + (
                f"found in the local cache, and {offline}; connect, or name a local file"
                if offline
                else f"loaded from the Hub ({reason})"
            )
        ) from None
    yield from enumerate(rows, start=1)


# --- one row ----------------------------------------------------------------------------------


def _pair(number: int, row: Any, data: DataConfig) -> list[Problem]:
    """The two sides of a preference pair: the same question with the chosen and the rejected text."""
    _check_row(row)
    asked = _prompt(row, PROMPT if data.prompt not in row and PROMPT in row else data.prompt)
    sides = {side: _text(row, side) for side in (CHOSEN, REJECTED)}
    if sides[CHOSEN] == sides[REJECTED]:
        raise _Unusable(f"{CHOSEN} and {REJECTED} are the same text")
    return [Problem(f"row-{number}/{side}", asked, text) for side, text in sides.items()]


def _asked(number: int, row: Any, data: DataConfig) -> list[Problem]:
    """The problems of a row that may lack a solution, or have turns that end with the question."""
    row = _without_nulls(row, data)
    turns = "messages" in row and data.prompt not in row
    if turns and _ends_with_user(row["messages"]):
        asked = tuple(_turns(row["messages"], last="user"))
    elif turns or row.get(data.completion, "") != "":  # where the answer may be
        return _problems(number, row, data)
    else:
        asked = _prompt(row, data.prompt)
    return [Problem(f"row-{number}", asked, answer=_own_answer(row, data))]


def _test(number: int, row: Any, data: DataConfig) -> list[Problem]:
    """The problems of a row of a test set. An answer may be missing or null, but not of a wrong type.

    Where the recipe's solutions are in the column `answer`, only a single word there is a reference answer.
    """
    _check_row(row)
    if not _has_prompt(row, data.prompt) and DataConfig().prompt in row:
        data = DataConfig(source=data.source)
    column = data.answer or ANSWER
    given = row.get(column)
    solution = data.answer is None and data.completion == column and len(str(given).split()) > 1
    data = data.model_copy(update={"answer": None if given is None or solution else column})
    found = _asked(number, {k: v for k, v in row.items() if v is not None or k != column}, data)
    if found[-1].solution is None and found[-1].answer is None:
        raise _Unusable(f"has neither a solution ({data.completion!r}) nor a reference answer ({column!r})")
    return found


def _ends_with_user(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "user"


def _has_prompt(row: dict[str, Any], prompt: str) -> bool:
    """Whether a row has the column `prompt`, or all columns of a text with columns in braces."""
    return prompt in row or (
        "{" in prompt and all(name in row for name in re.findall(r"\{([^{}]+)\}", prompt))
    )


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise _Unusable(f"a row must be an object of named fields, not a {type(row).__name__}")


def _without_nulls(row: Any, data: DataConfig) -> dict[str, Any]:
    """A row without its nulls: rows of a table have all columns, and null for what they lack."""
    _check_row(row)
    optional = [data.completion, "messages", *([data.prompt] if row.get("messages") else [])]
    return {name: value for name, value in row.items() if value is not None or name not in optional}


def _problems(number: int, row: Any, data: DataConfig) -> list[Problem]:
    """The problems of one row: one, or one for each assistant turn of a `messages` row."""
    row = _without_nulls(row, data)
    identity = f"row-{number}"
    answer = _own_answer(row, data)
    if "messages" in row and data.prompt not in row:
        turns = _turns(row["messages"], last="assistant")
        *earlier, final = [
            Problem(f"{identity}.{i}", tuple(turns[:i]), turn["content"])
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
        return [*earlier, replace(final, id=identity, answer=answer)]
    asked, solution = _prompt(row, data.prompt), _text(row, data.completion, taken=data.prompt)
    if answer is None and gsm8k_answer(solution):
        solution, answer = clean_gsm8k(solution)
    if answer is None and data.answer == data.completion:
        answer = solution
    return [Problem(identity, asked, solution, answer)]


_ROWS: dict[Kind, Callable[[int, Any, DataConfig], list[Problem]]] = {
    "solutions": _problems,
    "pairs": _pair,
    "prompts": _asked,
}
"""What a row of each kind of data becomes."""


def _own_answer(row: dict[str, Any], data: DataConfig) -> str | None:
    """The row's answer from its own column; None if it has no such column.

    A column that the recipe names must hold text or a number in every row. The default column need not.
    """
    column = data.answer or ANSWER
    if column in (data.prompt, data.completion) or (data.answer is None and column not in row):
        return None
    try:
        value = row.get(column)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(value)
        return _text(row, column)
    except _Unusable:
        if data.answer is None:
            return None
        raise


def _prompt(row: dict[str, Any], column: str) -> tuple[dict[str, str], ...]:
    """The turns before the completion: the column's text as one user turn, or the column's list of turns.

    `column` may also be a text with columns in braces.
    """
    if isinstance(row.get(column), list):
        return tuple(_turns(row[column], last="user", column=column))
    text = _filled(row, column) if "{" in column and column not in row else _text(row, column)
    return ({"role": "user", "content": text},)


def _filled(row: dict[str, Any], pattern: str) -> str:
    """A text with columns in braces; a column may be empty or null in some rows."""

    def content(place: re.Match[str]) -> str:
        value = row.get(place[1])
        return "" if value in (None, "") and place[1] in row else _text(row, place[1])

    return _check_text(re.sub(r"\{([^{}]+)\}", content, pattern).strip(), f"the prompt {pattern!r}")


def _text(row: dict[str, Any], column: str, taken: str | None = None) -> str:
    """The text of a column; `taken`: a column in use, which a hint does not suggest."""
    if column not in row:
        hint = did_you_mean(column, [name for name in row if name != taken])
        raise _Unusable(f"no column {column!r}{hint}; it has {', '.join(map(str, row))}")
    return _check_text(row[column], f"column {column!r}")


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"{where} is {type(value).__name__}, not text")
    if not value.strip():
        raise _Unusable(f"{where} is empty")
    if len(value) > LONGEST_FIELD:
        raise _Unusable(f"{where} has {len(value):,} characters (at most {LONGEST_FIELD:,})")
    if "\x00" in value:
        raise _Unusable(f"{where} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable(f"{where} contains a lone surrogate") from None
    return value


def readable(text: str) -> bool:
    """Whether a row may contain this text."""
    try:
        _check_text(text, "text")
    except _Unusable:
        return False
    return True


def _turns(messages: Any, last: str, column: str = "messages") -> list[dict[str, str]]:
    """Checked turns: at most one system turn, then user and assistant alternating, ending with `last`."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise _Unusable(f"{column!r} is not a list of {{role, content}}")
    turns = []
    for i, turn in enumerate(messages, start=1):
        role = turn.get("role")
        if role not in ROLES:
            raise _Unusable(f"turn {i} has role {role!r}; known: {', '.join(ROLES)}")
        if role == "system" and i != 1:
            raise _Unusable(f"turn {i} is a system turn; only the first turn may be one")
        turns.append({"role": role, "content": _check_text(turn.get("content"), f"turn {i}")})
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    alternating = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if spoken != alternating or spoken[-1:] != [last]:
        raise _Unusable(f"{column!r} must alternate user and assistant and end with {last}")
    return turns
