"""The benchmarks of the paper and GSM8K, as tasks.

A row comes from the Hub, or from a local file with the same fields in the folder that the environment
variable DFT_LORA_DATA names (`eval/math500.jsonl` and so on); a local file takes precedence. To add a
benchmark, write one function from a row to a Problem and one entry in TASKS.

Solutions end in a boxed answer, as the prompts require: if a published solution does not, its answer is
appended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft_lora.errors import DataError
from dft_lora.hub import unreachable
from dft_lora.tasks.base import Problem, Task
from dft_lora.tasks.extraction import clean_gsm8k, extract, has_box

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark(Task):
    """A published benchmark: where its rows come from, and how a row becomes a Problem.

    `sources`: for each split, its name on the Hub and the local file.
    """

    name: str
    description: str
    hub: str
    sources: Mapping[str, tuple[str, str]]
    problem: Callable[[str, Row], Problem]
    subset: str | None = None
    max_new_tokens: int = 4096  # the paper's

    def problems(self, split: str = "test") -> list[Problem]:
        if split not in self.sources:
            raise DataError(f"split: {self.name} has no split {split!r}; it has {', '.join(self.sources)}")
        problems = []
        for number, row in enumerate(self._rows(split), start=1):
            try:
                problems.append(self.problem(f"{self.name}/{split}/{number}", row))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                reason = f"no field {error}" if isinstance(error, KeyError) else error
                raise DataError(
                    f"{self.name}: row {number} of split {split!r} is not usable: {reason}"
                ) from None
        return problems

    def _rows(self, split: str) -> Iterable[Row]:
        hub_split, file = self.sources[split]
        folder = os.environ.get("DFT_LORA_DATA")
        if folder and (path := Path(folder, file)).is_file():
            return _json_lines(path)
        offline = unreachable()
        from datasets import load_dataset

        try:
            return load_dataset(self.hub, self.subset, split=hub_split)
        except Exception as error:  # the Hub client raises many kinds of errors; the remedy is the same
            where = f"no file {Path(folder, file)}" if folder else "DFT_LORA_DATA is not set"
            raise DataError(
                f"{self.name}: {where}, and its source, the Hub dataset {self.hub!r}, could not be loaded "
                f"({offline or type(error).__name__}); connect to the Hub, or set DFT_LORA_DATA to a folder "
                f"with {file}"
            ) from None


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def _boxed(solution: str, answer: str) -> str:
    """The solution, with its answer boxed at the end if nothing in it is boxed."""
    return solution if has_box(solution) else f"{solution.rstrip()}\n\nThe answer is $\\boxed{{{answer}}}$."


def _math(id: str, row: Row) -> Problem:
    tags = {"level": row["level"], "subject": row["subject"]}
    return Problem.ask(id, row["problem"], solution=row["solution"], answer=row["answer"], tags=tags)


def _minerva(id: str, row: Row) -> Problem:
    """The OCW set has boxed solutions in the paper's harness, and bare answers on the Hub."""
    if "solution" not in row:
        return Problem.ask(id, row["question"], answer=row["answer"])
    solution = row["solution"]
    return Problem.ask(
        id, row["problem"], solution=solution, answer=extract(solution), tags={"course": row["type"]}
    )


def _olympiad(id: str, row: Row) -> Problem:
    """Several final answers form one list of values; the unit, a field of its own, belongs to the answer."""
    answer = ", ".join(value.replace("$", "") for value in row["final_answer"])
    if row["unit"]:
        answer = f"{answer} \\text{{ {row['unit'].strip('$')}}}"
    tags = {"subject": row["subfield"], "type": row["answer_type"]}
    return Problem.ask(
        id, row["question"], solution=_boxed(row["solution"][0], answer), answer=answer, tags=tags
    )


def _contest(id: str, row: Row) -> Problem:
    """AIME and AMC: an integer answer; the solution, if there is one, is a page by several people."""
    question = row["problem"] if "problem" in row else row["question"]
    answer = row["answer"] if isinstance(row["answer"], str) else f"{row['answer']:.0f}"
    solution = _boxed(row["solution"], answer) if "solution" in row else None
    return Problem.ask(id, question, solution=solution, answer=answer)


def _gsm8k(id: str, row: Row) -> Problem:
    solution, answer = clean_gsm8k(row["answer"])
    return Problem.ask(id, row["question"], solution=solution, answer=answer)


TASKS = (
    Benchmark(
        "math500",
        "500 problems of MATH's test set",
        "HuggingFaceH4/MATH-500",
        {"test": ("test", "eval/math500.jsonl")},
        _math,
    ),
    Benchmark(
        "minerva",
        "272 problems of MIT OpenCourseWare in science and mathematics",
        "math-ai/minervamath",
        {"test": ("test", "eval/minerva_math.jsonl")},
        _minerva,
    ),
    Benchmark(
        "olympiadbench",
        "OlympiadBench, 675 English open-ended competition problems without pictures",
        "Hothan/OlympiadBench",
        {"test": ("train", "eval/olympiadbench.jsonl")},
        _olympiad,
        subset="OE_TO_maths_en_COMP",
    ),
    Benchmark(
        "aime24",
        "AIME 2024, 30 problems",
        "HuggingFaceH4/aime_2024",
        {"test": ("train", "eval/aime24.jsonl")},
        _contest,
    ),
    Benchmark(
        "amc23", "AMC 2023, 40 problems", "math-ai/amc23", {"test": ("test", "eval/amc23.jsonl")}, _contest
    ),
    Benchmark(
        "aime25",
        "AIME 2025, 30 problems",
        "math-ai/aime25",
        {"test": ("test", "eval/aime25.jsonl")},
        _contest,
    ),
    Benchmark(
        "gsm8k",
        "1,319 school word problems",
        "openai/gsm8k",
        {"test": ("test", "eval/gsm8k_test.jsonl"), "train": ("train", "train/gsm8k_train.jsonl")},
        _gsm8k,
        subset="main",
        max_new_tokens=1024,
    ),
)
