"""Solved examples before a problem, for base models: drawn from training data, never from a test set."""

from __future__ import annotations

import random
from dataclasses import replace

from ..config import Recipe
from ..data.doctor import normalized
from ..data.sources import load_problems
from ..errors import DataError, RequestError
from ..tasks.base import Problem, Task
from ..tasks.choice import LETTERS


def shots_for(task: Task, recipe: Recipe) -> tuple[Problem, ...]:
    """evaluate.shots solved problems of the task's training split, drawn with evaluate.seed.

    Those of an own test set come from the recipe's data. A problem that the test set asks too is never drawn.
    Raises RequestError where there are too few.
    """
    wanted = recipe.evaluate.shots
    if not wanted:
        return ()
    try:
        known = load_problems(recipe.data).problems if task.file else task.problems("train")
    except DataError as error:
        raise RequestError(f"evaluate.shots: {error}") from None
    asked = {normalized(problem) for problem in task.problems()}
    fitting = [_solved(p) for p in known if len(p.messages) == 1 and normalized(p) not in asked]
    fitting = [problem for problem in fitting if problem.solution is not None]
    if len(fitting) < wanted:
        raise RequestError(
            f"evaluate.shots: {wanted}; {task.name} has {len(fitting)} solved training problems that are not "
            "in its test set"
        )
    return tuple(random.Random(recipe.evaluate.seed).sample(fitting, wanted))


def _solved(problem: Problem) -> Problem:
    """Of multiple choice the solution is the text of the right choice, and what follows it."""
    if problem.solution is not None or not problem.choices:
        return problem
    right = problem.choices[LETTERS.index(problem.answer or "")]
    return replace(problem, solution=f"{right} {problem.ending}".rstrip())
