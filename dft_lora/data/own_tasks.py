"""A person's own test set: a file of rows, as a task beside those that come with the package.

A row with a reference answer is judged like a problem of any other task. From a row that has a solution
alone nothing is sampled: its tokens are scored, since there is no answer that a text could be judged by.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import DataConfig
from ..errors import DataError, RequestError
from ..tasks import get_task, task_names
from ..tasks.base import Problem, Task
from .sources import SUFFIXES, load_tests

TAKEN = ("other-text",)  # what an evaluation writes beside its tasks


@dataclass(frozen=True)
class OwnTask(Task):
    """The rows of a file, named after it."""

    name: str
    rows: tuple[Problem, ...]
    path: str
    file: str | None
    max_new_tokens: int = 1024
    description: str = "an own test set"

    def problems(self, split: str = "test") -> list[Problem]:
        if split != "test":
            raise DataError(f"split: {self.path} is a test set and has no split {split!r}")
        return list(self.rows)

    def judges(self, problem: Problem) -> bool:
        return problem.answer is not None


def is_file(name: str) -> bool:
    """Whether the name of a task is meant as a file."""
    return name.endswith(SUFFIXES) or (name not in task_names() and os.path.isfile(name))


def task_title(name: str) -> str:
    """The name under which a task is reported: its own, or the stem of its file."""
    return Path(name).stem if is_file(name) else name


def find_task(name: str, data: DataConfig) -> Task:
    """The task of that name, or the test set in that file, whose columns are named as in `data`.

    A file with other columns is read by the default ones: problem, solution, answer. Raises RequestError for
    an unknown name, and for a file that is missing, cannot be used, or is named like a task.
    """
    if os.path.isdir(name) and name not in task_names():
        raise RequestError(f"--task {name}: is a folder; name a task or a file")
    if not is_file(name):
        return get_task(name)
    if not name.endswith(SUFFIXES):
        raise RequestError(f"--task {name}: not a {', '.join(SUFFIXES)} file")
    title = task_title(name)
    if not re.fullmatch(r"[\w-]+", title):
        raise RequestError(
            f"--task {name}: a test set is named after its file, and {title!r} has other characters than "
            "letters, digits, - and _; rename the file"
        )
    if title in (*task_names(), *TAKEN):
        raise RequestError(
            f"--task {name}: {title!r} is the name of a task that comes with the package; rename the file"
        )
    if not os.path.isfile(name):
        raise RequestError(f"--task: no file {name!r}")
    content = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    return OwnTask(title, tuple(load_tests(name, data)), name, content)
