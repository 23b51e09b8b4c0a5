"""A problem of a named set, picked by its level or subject."""

from __future__ import annotations

import random

import gradio as gr

from ...errors import RequestError
from ...tasks import get_task, task_names
from ...tasks.base import Problem
from ..events import told

ANY = "any"


def picker() -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    task = gr.Dropdown(task_names(), value="arithmetic", label="Set", elem_id="task")
    level = gr.Dropdown([ANY, *_levels("arithmetic")], value=ANY, label="Level or subject", elem_id="level")
    return task, level, gr.Button("Pick one at random", elem_id="pick")


def _levels(name: str) -> list[str]:
    """`tag value` of every tag that divides a set into few parts."""
    values = {(tag, value) for problem in get_task(name).problems() for tag, value in problem.tags.items()}
    return [f"{tag} {value}" for tag, value in sorted(values, key=str)][:40]


def drawn(name: str, level: str) -> Problem:
    fitting = [
        problem
        for problem in get_task(name).problems()
        if level == ANY or level in {f"{tag} {value}" for tag, value in problem.tags.items()}
    ]
    if not fitting:
        raise RequestError(f"set {name!r} has no problem of {level!r}; pick another level")
    return random.choice(fitting)


def pick_events(task, level, pick, fields) -> None:
    @told
    def levels(name: str):
        return gr.Dropdown([ANY, *_levels(name)], value=ANY)

    @told
    def choose(name: str, wanted: str):
        problem = drawn(name, wanted)
        return problem.question, problem.answer or "", problem.solution or ""

    task.change(levels, task, level, show_progress="hidden", api_visibility="private")
    pick.click(choose, [task, level], fields, show_progress="minimal", api_visibility="private")
