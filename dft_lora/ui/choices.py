"""Multiple choice on the page: how probable every run finds each choice, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..evaluation.task_results import choice_probabilities
from ..tasks.choice import LETTERS
from .text import rich
from .views import Legend, html_table

if TYPE_CHECKING:  # torch is not needed to show what it computed
    from .session import Question


def choices_view(question: Question, logps: Mapping[str, Sequence[float]]) -> str:
    """For gr.Markdown: a line per choice and a column per run, with each run's pick and the right choice.

    `question` was picked from a task `by_likelihood`; `logps`: run -> the log-probability of each choice.
    """
    label, problem, task = Legend(list(logps)), question.as_problem(), question.task
    assert task is not None
    odds = {run: choice_probabilities(scores) for run, scores in logps.items()}
    picks = {run: problem.choices.index(task.choose(scores, problem)) for run, scores in logps.items()}

    def cell(run: str, place: int) -> str:
        share = odds[run][place]
        bar = f'<span class="bar {label.colour(run)}"><i style="width:{100 * share:.1f}%"></i></span>'
        return f"{bar}{share:.3f}{' <b>◆</b>' if picks[run] == place else ''}"

    rows = []
    for place, (letter, choice) in enumerate(zip(LETTERS, problem.choices, strict=False)):
        right = ' <span class="chip good">✓ right</span>' if letter == problem.answer else ""
        text = "" if choice == letter else f" {rich(choice)}"
        rows.append([f"<b>{letter}</b>{text}{right}", *(cell(run, place) for run in logps)])
    note = (
        "How probable each run finds the text of each choice after the problem, as a share of all choices. "
        "◆ marks the run’s answer. It need not be the most probable choice where a benchmark compares "
        "log-probabilities per character."
    )
    return f'<p class="small">{note}</p>{html_table(["choice", *map(label, logps)], rows)}'
