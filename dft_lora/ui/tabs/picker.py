"""Pick a random problem from a named set, by level or subject."""

from __future__ import annotations

import random

import gradio as gr

from ...errors import RequestError
from ...tasks import get_task, task_names
from ...tasks.base import Problem
from ..events import one_line_errors
from ..session import Picked, Question

ANY = "any"


def picker() -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    """Problem set, level or subject, and the button that picks."""
    task = gr.Dropdown(task_names(), value="arithmetic", label="Problem set", elem_id="task")
    level = gr.Dropdown([ANY, *_levels("arithmetic")], value=ANY, label="Level or subject", elem_id="level")
    return task, level, gr.Button("Pick at random", elem_id="pick")


def _levels(name: str) -> list[str]:
    """`tag value` for every tag of the set's problems; the first 40 of them."""
    values = {(tag, value) for problem in get_task(name).problems() for tag, value in problem.tags.items()}
    return [f"{tag} {value}" for tag, value in sorted(values, key=str)][:40]


def random_problem(name: str, level: str) -> Problem:
    """A problem of a set and level. Raises RequestError when there is none."""
    fitting = [
        problem
        for problem in get_task(name).problems()
        if level == ANY or level in {f"{tag} {value}" for tag, value in problem.tags.items()}
    ]
    if not fitting:
        raise RequestError(f"problem set {name!r} has no problem with {level!r}; pick another level")
    return random.choice(fitting)


def connect_picker(task, level, pick, fields) -> None:
    """A picked problem goes into `fields`: problem, reference answer, reference solution, and the Picked."""

    @one_line_errors
    def levels(name: str):
        return gr.Dropdown([ANY, *_levels(name)], value=ANY)

    @one_line_errors
    def choose(name: str, wanted: str):
        problem = random_problem(name, wanted)
        picked, reference = Picked(name, problem), problem.answer or ""
        if Question(problem.question, picked=picked).judge is None:
            gr.Info(f"{name}: answers are programs; the page does not run them, so they get no verdict.")
            reference = ""
        return problem.question, reference, problem.solution or "", picked

    task.change(levels, task, level, show_progress="hidden", api_visibility="private")
    pick.click(choose, [task, level], fields, show_progress="minimal", api_visibility="private")
