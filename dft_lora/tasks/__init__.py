"""What is asked, and how an answer is judged. A task's module is imported when a task is first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from dft_lora.errors import RequestError, did_you_mean
from dft_lora.tasks.base import Judge, Task

MODULES = ("arithmetic", "codebook", "benchmarks")
"""Modules of this package that hold tasks, each in a tuple TASKS."""


@cache
def _tasks() -> dict[str, Task]:
    return {task.name: task for name in MODULES for task in import_module(f".{name}", __name__).TASKS}


def task_names() -> list[str]:
    """The names that `get_task` knows."""
    return list(_tasks())


def get_task(name: str) -> Task:
    """The task of that name; RequestError with the nearest name where there is none."""
    if name not in _tasks():
        raise RequestError(
            f"unknown task {name!r}{did_you_mean(name, _tasks())}; known: {', '.join(_tasks())}"
        )
    return _tasks()[name]


def judge_of(source: str) -> Judge:
    """Who judges answers to the rows of `data.source`: the task of that name, for own data the default."""
    return _tasks().get(source) or Judge()
