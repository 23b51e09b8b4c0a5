"""What is asked, and how an answer is judged. A task's module is imported when the task is asked for."""

from __future__ import annotations

from importlib import import_module

from dft_lora.errors import RequestError, did_you_mean
from dft_lora.tasks.base import Task

_HOMES = {
    "dft_lora.tasks.arithmetic": ("arithmetic", "arithmetic-long", "arithmetic-validation"),
    "dft_lora.tasks.codebook": ("codebook",),
    "dft_lora.tasks.benchmarks": (
        "math500",
        "minerva",
        "olympiadbench",
        "aime24",
        "amc23",
        "aime25",
        "gsm8k",
    ),
}


def task_names() -> list[str]:
    """The names that `get_task` knows."""
    return [name for names in _HOMES.values() for name in names]


def get_task(name: str) -> Task:
    """The task of that name; RequestError with the nearest name where there is none."""
    for home, names in _HOMES.items():
        if name in names:
            return next(task for task in import_module(home).TASKS if task.name == name)
    known = task_names()
    raise RequestError(f"unknown task {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
