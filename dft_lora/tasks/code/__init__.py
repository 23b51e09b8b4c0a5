"""HumanEval and MBPP: an answer is a program, judged by running the published tests.

A model's program may do anything, so it runs in a cell (`cell.py`) and only with permission
(`evaluate --allow-code`). `Problem.answer` is a module of tests that takes the program's functions
`from candidate import`; it runs in another cell, and calls them there. Only the functions that the published
solution defines are imported, so a program cannot replace `len` or `sorted` in its own tests.

Prompts and stop rules are the published ones: HumanEval's prompt is continued as it stands, up to a line that
begins a new definition (Chen et al. 2021, arXiv 2107.03374, section 2); MBPP's shows three solved problems
and ends at [DONE] (Austin et al. 2021, arXiv 2108.07732). A stop rule is applied to the finished text. An
answer in a code block, as chat models write it, is the block.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from dft_lora.errors import RequestError
from dft_lora.tasks.base import Problem
from dft_lora.tasks.benchmarks import Benchmark, Row
from dft_lora.tasks.code.runner import DEFAULT, run_all, walls
from dft_lora.tasks.judge import Verdict

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_CODE = re.compile(r"\A\n*[ \t]|^(?:def|class|import|from|@)\b", re.M)


@dataclass(frozen=True)
class Programs(Benchmark):
    """A benchmark of programming problems. `program`: (answer's code, its problem) -> what is run.

    `stops`: an answer ends before the first of them. `runs_code`: whether `judge_many` may run programs.
    """

    template: ClassVar[str | None] = "raw"
    votes: ClassVar[bool] = False
    stops: tuple[str, ...] = ()
    program: Callable[[str, Problem], str] = lambda code, problem: code
    runs_code: bool = False
    max_new_tokens: int = 512

    def allowed(self, code: bool) -> Programs:
        if not code:
            raise RequestError(
                f"{self.name}: its answers are programs, and judging runs them on this machine; "
                "to allow that, set evaluate.allow_code: true or give evaluate --allow-code"
            )
        _announce(self.name)
        return replace(self, runs_code=True)

    def cut(self, text: str) -> str:
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        end = min(places, default=len(text))
        block = _block(text)
        return text[: block.end()] if block and block.start() < end else text[:end]

    def judge_many(self, pairs: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """Run each program against its tests; `extracted` is the code."""
        if not self.runs_code:
            self.allowed(False)
        cuts = [self.cut(text) for text, _ in pairs]
        codes = [block[1] if (block := _block(text)) else text for text in cuts]
        jobs = [
            (self.program(code, problem), problem.answer or "")
            for code, (_, problem) in zip(codes, pairs, strict=True)
        ]
        return [Verdict(status, code) for status, code in zip(run_all(jobs), codes, strict=True)]


@cache
def _announce(name: str) -> None:
    """Say what is going to be executed, once."""
    rights = "without network, in a file system of its own"
    if (why := walls()) is not None:
        rights = f"WITH your network and your files, since this system gives no namespaces ({why})"
    log.warning(
        "%s: programs that the model writes are run on this machine, each in a process of its own %s, "
        "for at most %d s and %d MB",
        name,
        rights,
        DEFAULT.seconds,
        DEFAULT.memory_mb,
    )


def _block(text: str) -> re.Match[str] | None:
    """The first code block, if only prose stands before it. Otherwise the text is code by itself."""
    block = _BLOCK.search(text)
    return None if block is None or _CODE.search(text[: block.start()]) else block


def _humaneval(id: str, row: Row) -> Problem:
    """The tests may use what the prompt defines beside the function that is asked for."""
    name = row["entry_point"]
    prompt = ast.parse(row["prompt"])
    given = [part for part in prompt.body if getattr(part, "name", None) != name]
    helpers = ast.unparse(ast.Module(given, []))
    tests = f"{helpers}\nfrom candidate import {name}\n{row['test']}\ncheck({name})\n"
    return Problem.ask(id, row["prompt"], solution=row["canonical_solution"], answer=tests)


def _continued(code: str, problem: Problem) -> str:
    """The prompt ends in a function without a body, which the code gives, or defines again."""
    return f"{problem.question}{code}"


@dataclass(frozen=True)
class Mbpp(Programs):
    """MBPP: every prompt shows three solved problems. The Hub has its splits, a local file all rows."""

    task_ids: ClassVar[dict[str, range]] = {
        "prompt": range(2, 5),
        "test": range(11, 511),
        "validation": range(511, 601),
        "train": range(601, 975),
    }

    def problems(self, split: str = "test") -> list[Problem]:
        asked = super().problems(split)
        solved = super().problems("prompt")
        shown = "".join(f"{problem.question}{problem.solution}\n\n" for problem in solved)
        turns = ([{"role": "user", "content": shown + problem.question}] for problem in asked)
        return [replace(problem, messages=tuple(turn)) for problem, turn in zip(asked, turns, strict=True)]

    def _rows(self, split: str) -> Iterable[Row]:
        return [row for row in super()._rows(split) if row.get("task_id") in self.task_ids[split]]


def _mbpp(id: str, row: Row) -> Problem:
    """The prompt without examples. The tests import what the published solution defines and they use.

    They also have its imports, since some of them need one.
    """
    code, setup = (row[field].replace("\r\n", "\n").strip() for field in ("code", "test_setup_code"))
    tests = "\n".join(row["test_list"])
    parts = _parsed(code).body
    imports = [ast.unparse(part) for part in parts if isinstance(part, ast.Import | ast.ImportFrom)]
    defined = {name for part in parts for name in _names(part)}
    used = {node.id for node in ast.walk(_parsed(f"{setup}\n{tests}")) if isinstance(node, ast.Name)}
    if not (asked := sorted(defined & used)):
        raise ValueError("its tests call nothing that its code defines")
    question = (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
    checked = [*imports, f"from candidate import {', '.join(asked)}", setup, tests]
    return Problem.ask(id, question, solution=f"{code}\n[DONE]", answer="\n".join(filter(None, checked)))


def _parsed(code: str) -> ast.Module:
    """The syntax tree; published code may have invalid escape sequences, about which Python would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def _names(part: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(part, ast.Assign):
        return [target.id for target in part.targets if isinstance(target, ast.Name)]
    return [part.name] if isinstance(part, ast.FunctionDef | ast.ClassDef) else []


TASKS = (
    Programs(
        "humaneval",
        "HumanEval, 164 Python functions to complete; runs the answers (--allow-code)",
        "openai/openai_humaneval",
        {"test": ("test", "eval/humaneval.jsonl.gz")},
        _humaneval,
        stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        program=_continued,
    ),
    Mbpp(
        "mbpp",
        "MBPP, 500 small Python problems with three examples; runs the answers (--allow-code)",
        "google-research-datasets/mbpp",
        {split: (split, "eval/mbpp.jsonl") for split in ("test", "validation", "train", "prompt")},
        _mbpp,
        subset="full",
        stops=("[DONE]",),
    ),
)
