"""The benchmarks of the paper and GSM8K, as tasks.

A row comes from the Hub, or from a local file with the same fields in the folder that the environment
variable DFT_LORA_DATA names (`eval/math500.jsonl` and so on); a local file takes precedence. To add a
benchmark, write one function from a row to a Problem and one entry in TASKS.

Solutions end in a boxed answer, as the prompts require: if a published solution does not, its answer is
appended.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from dft_lora.errors import DataError
from dft_lora.hub import unreachable
from dft_lora.tasks.base import Problem, Task
from dft_lora.tasks.extraction import clean_gsm8k, extract, has_box

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark(Task):
    """A published benchmark: where its rows come from, and how a row becomes a Problem.

    `hub`: a dataset of the Hub, or the address of a JSON file. `sources`: for each split, its name on the Hub
    and the local file. `keep`: which problems belong to the task; they are then shuffled.
    """

    name: str
    description: str
    hub: str
    sources: Mapping[str, tuple[str, str]]
    problem: Callable[[str, Row], Problem]
    subset: str | None = None
    max_new_tokens: int = 4096  # the paper's
    keep: Callable[[Problem], bool] | None = None

    def problems(self, split: str = "test") -> list[Problem]:
        if split not in self.sources:
            raise DataError(f"split: {self.name} has no split {split!r}; it has {', '.join(self.sources)}")
        problems = []
        for number, row in enumerate(self._rows(split), start=1):
            try:
                problems.append(self.problem(f"{self.name}/{split}/{number}", row))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, SyntaxError) as error:
                reason = f"no field {error}" if isinstance(error, KeyError) else error
                raise DataError(
                    f"{self.name}: row {number} of split {split!r} is not usable: {reason}"
                ) from None
        if self.keep is not None:
            problems = [problem for problem in problems if self.keep(problem)]
            Random(self.name).shuffle(problems)
        return problems

    def _rows(self, split: str) -> Iterable[Row]:
        hub_split, file = self.sources[split]
        folder = os.environ.get("DFT_LORA_DATA")
        if folder and (path := Path(folder, file)).is_file():
            return _json_array(path) if path.suffix == ".json" else _json_lines(path)
        offline = unreachable()
        from datasets import load_dataset

        try:
            if self.hub.startswith("https://"):
                return load_dataset("json", data_files=self.hub, split=hub_split)
            return load_dataset(self.hub, self.subset, split=hub_split)
        except Exception as error:  # the Hub client raises many kinds of errors; the remedy is the same
            where = f"no file {Path(folder, file)}" if folder else "DFT_LORA_DATA is not set"
            raise DataError(
                f"{self.name}: {where}, and its source {self.hub!r} could not be loaded "
                f"({offline or type(error).__name__}); connect to it, or set DFT_LORA_DATA to a folder with "
                f"{file}"
            ) from None


def _json_lines(path: Path) -> list[Row]:
    rows = []
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable ({error})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def _json_array(path: Path) -> list[Row]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None


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


def _school(id: str, row: Row) -> Problem:
    """LLM-Adapters' collection. Its solutions were written by a model, so only the answers are used."""
    question, answer = " ".join(row["instruction"].split()), row["answer"].removesuffix(".0")
    return Problem.ask(id, question, answer=answer)


def _small_numbers(problem: Problem) -> bool:
    """Whether all numbers of a question are whole and at most 12, and its answer is whole."""
    numbers = re.findall(r"\d[\d,.]*", problem.question)
    written = [number.rstrip(",.") for number in numbers]
    whole = all(number.isdigit() and int(number) <= 12 for number in written)
    return bool(written) and whole and (problem.answer or "").isdigit()


TASKS = (
    Benchmark(
        "school-problems",
        "word problems written by people (AddSub, MultiArith, SVAMP and others), numbers up to 12",
        "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/"
        "816657208af4db747803f87ba40a4c71383fed7a/ft-training_set/math_data.json",
        {"test": ("train", "train/llm_adapters_math_data.json")},
        _school,
        max_new_tokens=64,
        keep=_small_numbers,
    ),
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
