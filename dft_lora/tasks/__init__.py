"""Problems, and how answers to them are judged. The tasks' modules are imported when first needed."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from dft_lora.errors import DataError, RequestError, did_you_mean
from dft_lora.tasks.base import Judge, Task

MODULES = ("arithmetic", "word_problems", "codebook", "benchmarks", "choice", "code")
"""Modules of this package that define tasks, each in a tuple TASKS."""


@cache
def _tasks() -> dict[str, Task]:
    return {task.name: task for name in MODULES for task in import_module(f".{name}", __name__).TASKS}


def task_names() -> list[str]:
    """The names that `get_task` accepts."""
    return list(_tasks())


def get_task(name: str) -> Task:
    """The task of that name. Raises RequestError with the closest name if there is none."""
    if name not in _tasks():
        raise RequestError(
            f"unknown task {name!r}{did_you_mean(name, _tasks())}; known: {', '.join(_tasks())}"
        )
    return _tasks()[name]


def available(name: str) -> bool:
    """Whether the task's problems can be had here: a benchmark needs the Hub or local files."""
    try:
        return bool(get_task(name).problems())
    except DataError:
        return False


def judge_of(source: str) -> Judge:
    """The judge of answers to the rows of `data.source`: the task of that name, or the default judge."""
    return _tasks().get(source) or Judge()
