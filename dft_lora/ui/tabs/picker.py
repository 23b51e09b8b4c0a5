"""Pick a random problem from a named set, by level or subject; and the one that the page begins with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

import gradio as gr

from ...errors import RequestError
from ...evaluation.attempts import own_problems
from ...evaluation.statistics import avg_at_n
from ...evaluation.task_results import TaskResults, complete_tasks
from ...experiments.shipped import HOME
from ...runs.folder import RunFolder
from ...tasks import available, get_task, task_names
from ...tasks.base import Problem
from ..events import one_line_errors
from ..session import Picked, Question
from ..workshop import EXAMPLE

ANY = "any"
EMBEDDED = "arithmetic"


class ProblemSets:
    """The problem sets of a page: the tasks, and the own test sets that its runs were evaluated on."""

    def __init__(self, folders: Sequence[RunFolder]):
        self.folders = folders
        self.own = {name: rows for folder in folders for name, rows in own_problems(folder).items()}

    @property
    def names(self) -> list[str]:
        return [*self.own, *task_names()]

    @property
    def written(self) -> list[str]:
        """The names of sets whose answers are written, not chosen."""
        return [name for name in self.names if name in self.own or not get_task(name).by_likelihood]

    def problems(self, name: str) -> list[Problem]:
        return self.own[name] if name in self.own else get_task(name).problems()

    def levels(self, name: str) -> list[str]:
        """`tag value` for every tag of the set's problems; the first 40 of them."""
        values = {(tag, value) for problem in self.problems(name) for tag, value in problem.tags.items()}
        return [f"{tag} {value}" for tag, value in sorted(values, key=str)][:40]

    def random(self, name: str, level: str = ANY) -> Problem:
        """A problem of a set and level. Raises RequestError when there is none."""
        fitting = [
            problem
            for problem in self.problems(name)
            if level == ANY or level in {f"{tag} {value}" for tag, value in problem.tags.items()}
        ]
        if not fitting:
            raise RequestError(f"problem set {name!r} has no problem with {level!r}; pick another level")
        return random.choice(fitting)

    @cached_property
    def proposed(self) -> tuple[str, Problem, str]:
        """The set and the problem that the page begins with, and why it was chosen."""
        trained = [folder for folder in self.folders if folder.adapter_digest is not None][-2:]
        answered = [complete_tasks(folder) for folder in trained] if len(trained) == 2 else [[]]
        for name in (name for name in task_names() if all(name in tasks for tasks in answered)):
            if self._is_judged(name) and (problem := self._most_disputed(name, trained)):
                names = " and ".join(folder.name for folder in trained)
                why = f"Chosen because {names} disagree on it; Results shows how often they do."
                return name, problem, why
        recipe = self.folders[0].recipe() if self.folders else None
        if recipe and recipe.model.name != "tiny":
            for name in (name for name in recipe.evaluate.tasks if self._is_judged(name)):
                return name, self.problems(name)[0], f"The first problem of {name}."
        shipped = bool(self.folders) and all(folder.path.parent == HOME for folder in self.folders)
        why = "Chosen because sft and dft disagree on it." if shipped else f"An example of {EMBEDDED}."
        return EMBEDDED, self.problems(EMBEDDED)[EXAMPLE], why

    def _is_judged(self, name: str) -> bool:
        """Whether the set is at hand, and the page itself judges written answers to it."""
        if name not in task_names() or get_task(name).by_likelihood or not available(name):
            return False
        problem = self.problems(name)[0]
        return Question(problem.question, picked=self.picked(name, problem)).judge is not None

    def _most_disputed(self, name: str, runs: Sequence[RunFolder]) -> Problem | None:
        """The problem whose shares of correct samples are furthest apart between two runs, if any differ."""
        results = [TaskResults.read(run, name) for run in runs]
        a, b = (dict(zip(r.problems, avg_at_n(r.correct_PS), strict=True)) for r in results)
        apart = {id: abs(a[id] - b[id]) for id in a.keys() & b.keys()}
        problems = [problem for problem in self.problems(name) if apart.get(problem.id)]
        return max(problems, key=lambda problem: apart[problem.id], default=None)

    def picked(self, name: str, problem: Problem) -> Picked | None:
        """What judges answers to the problem; None for an own test set, which is judged as mathematics."""
        return None if name in self.own else Picked(name, problem)


def picker(sets: ProblemSets, name: str = EMBEDDED) -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    """Problem set, at first `name`; level or subject; and the button that picks."""
    task = gr.Dropdown(sets.names, value=name, label="Problem set", elem_id="task")
    levels = [ANY, *sets.levels(name)]
    level = gr.Dropdown(levels, value=ANY, label="Level or subject", elem_id="level")
    return task, level, gr.Button("Pick at random", elem_id="pick")


def connect_picker(sets: ProblemSets, task, level, pick, fields) -> None:
    """A picked problem goes into `fields`: problem, reference answer, reference solution, and the Picked."""

    @one_line_errors
    def levels(name: str):
        return gr.Dropdown([ANY, *sets.levels(name)], value=ANY)

    @one_line_errors
    def choose(name: str, wanted: str):
        problem = sets.random(name, wanted)
        picked, reference = sets.picked(name, problem), problem.answer or ""
        if Question(problem.question, picked=picked).judge is None:
            gr.Info(f"{name}: answers are programs; the page does not run them, so they get no verdict.")
            reference = ""
        return problem.question, reference, problem.solution or "", picked

    task.change(levels, task, level, show_progress="hidden", api_visibility="private")
    pick.click(choose, [task, level], fields, show_progress="minimal", api_visibility="private")
