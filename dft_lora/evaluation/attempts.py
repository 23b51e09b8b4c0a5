"""The answers of an evaluation on disk: which are there, which are missing, and how one is added.

    evaluation/TASK.jsonl     one line per answer
    evaluation/TASK.json      the protocol, the problems, the provenance

Under `accelerate launch` each process appends to its own file, TASK.rank-N.jsonl. At the end the main process
merges these files into TASK.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..runs.folder import RunFolder, parsing, read_json, read_lines, write_json, write_text, writing
from ..tasks.base import Attempt, Problem, Task
from ..tasks.judge import Verdict
from .protocol import GREEDY, Protocol
from .shard import Shard
from .token_table import tokens_file

RESUME = "run the same evaluation again; it continues where it stopped"


class Answers:
    """One run's answers to one task on disk. Raises RequestError when they have another protocol."""

    def __init__(
        self,
        folder: RunFolder,
        protocol: Protocol,
        task: Task,
        problems: Sequence[Problem],
        overwrite: bool,
        shard: Shard,
    ):
        self.folder, self.protocol, self.task, self.shard = folder, protocol, task, shard
        self.problems, self.judged = problems, [p for p in problems if task.judges(p)]
        self.file = folder.evaluation(protocol.task)
        self.metadata_file = self.file.with_suffix(".json")
        self.overwrite = overwrite
        if not overwrite and self.metadata_file.is_file():
            differences = protocol.differences(read_json(self.metadata_file)["protocol"])
            if differences:
                raise RequestError(
                    f"{self.file}: its answers were made under another protocol ({'; '.join(differences)}); "
                    "--overwrite replaces them"
                )
        self.done = set() if overwrite else set(self.on_disk())

    @property
    def asked(self) -> int:
        """The number of answers in a complete evaluation, including the greedy ones."""
        return len(self.judged) * (self.protocol.samples + 1)

    @property
    def complete(self) -> bool:
        """Whether all answers were there at the start, those of other processes included."""
        return not self._lacking(self.judged)

    def missing(self) -> list[tuple[Problem, int]]:
        """The (problem, sample) pairs that this process has yet to answer; sample -1 is the greedy answer."""
        return self._lacking(self.judged[self.shard.rank :: self.shard.world])

    def _lacking(self, problems: Sequence[Problem]) -> list[tuple[Problem, int]]:
        samples = (GREEDY, *range(self.protocol.samples))
        return [(p, s) for p in problems for s in samples if (p.id, s) not in self.done]

    def begin(self, provenance: dict[str, Any]) -> None:
        """Record the protocol before the first answer. With `overwrite`, delete the old answers now."""
        with writing(self.file, RESUME):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.overwrite and self.shard.is_main:
                tables = tokens_file(self.folder, self.protocol.task)
                for old in (self.file, self.metadata_file, tables, *self._parts()):
                    old.unlink(missing_ok=True)
            _end_at_a_line(self._mine)
        self.overwrite = False
        if self.shard.is_main and not self.metadata_file.is_file():
            problems = {p.id: _facts(p) | self._own_facts(p) for p in self.problems}
            metadata = {"protocol": self.protocol.recorded(), "provenance": provenance, "problems": problems}
            write_json(self.metadata_file, metadata)

    def _own_facts(self, problem: Problem) -> dict[str, Any]:
        """What only the file of an own test set has: reports and the page do not read it again."""
        if self.task.file is None:
            return {}
        return {
            "judged": self.task.judges(problem),
            "turns": len(problem.messages),
            "solution": problem.solution,
        }

    def add(self, attempts: Iterable[Attempt]) -> None:
        """Append attempts to this process's file."""
        with writing(self._mine, RESUME), self._mine.open("a", encoding="utf-8") as file:
            file.writelines(attempt_line(attempt) for attempt in attempts)

    def gather(self) -> None:
        """Merge the files of several processes, including files left by a killed evaluation."""
        if parts := self._parts():
            write_text(self.file, "".join(map(attempt_line, self.on_disk().values())))
            for part in parts:
                part.unlink()

    def on_disk(self) -> dict[tuple[str, int], Attempt]:
        """All answers by (problem, sample), including those in the files of single processes."""
        files = (self.file, *self._parts())
        return {(a.problem, a.sample): a for file in files for a in read_attempts(file)}

    @property
    def _mine(self) -> Path:
        """The file to which this process appends."""
        if self.shard.world == 1:
            return self.file
        return self.file.with_name(f"{self.protocol.task}.rank-{self.shard.rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{self.protocol.task}.rank-*.jsonl"))


def _end_at_a_line(file: Path) -> None:
    """Remove an incomplete last line, which a killed process left."""
    text = file.read_bytes() if file.is_file() else b""
    if text and not text.endswith(b"\n"):
        file.write_bytes(text[: text.rfind(b"\n") + 1])


def _facts(problem: Problem) -> dict[str, Any]:
    facts = {"question": problem.question, "answer": problem.answer, "tags": dict(problem.tags)}
    return facts | ({"choices": list(problem.choices)} if problem.choices else {})


def own_problems(folder: RunFolder) -> dict[str, list[Problem]]:
    """The problems of each own test set that a run was evaluated on; those of several turns are left out."""
    found: dict[str, list[Problem]] = {}
    for file in sorted((folder.path / "evaluation").glob("*.json")):
        metadata = read_json(file)
        with parsing(file):
            if "file" in metadata["protocol"]:
                problems = [
                    Problem.ask(
                        name, p["question"], solution=p["solution"], answer=p["answer"], tags=p["tags"]
                    )
                    for name, p in metadata["problems"].items()
                    if p["turns"] == 1
                ]
                found |= {file.stem: problems} if problems else {}
    return found


def attempt_line(attempt: Attempt) -> str:
    """One line of `evaluation/TASK.jsonl`."""
    values = asdict(attempt) | {"verdict": attempt.verdict.status, "extracted": attempt.verdict.extracted}
    if attempt.choice_logps is None:
        del values["choice_logps"]
    return json.dumps(values, ensure_ascii=False) + "\n"


def read_attempts(file: Path) -> list[Attempt]:
    """The attempts in a file; none if it does not exist.

    An incomplete last line is left out: it is being written, or a killed process left it.
    """
    if not file.is_file():
        return []
    with parsing(file):
        return [
            Attempt(
                line["problem"],
                line["sample"],
                line["text"],
                line["tokens"],
                line["truncated"],
                Verdict(line["verdict"], line["extracted"]),
                tuple(line["choice_logps"]) if "choice_logps" in line else None,
            )
            for line in read_lines(file, partial=False)
        ]
