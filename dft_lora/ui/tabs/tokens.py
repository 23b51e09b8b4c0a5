"""Tokens: a text coloured by the probability of its tokens under each run."""

from __future__ import annotations

import gradio as gr

from ..events import MODEL, on_gpu, one_line_errors
from ..session import Session, check_text
from ..views import tokens_view
from .compare import CompareInputs, Comparison, chosen

EMPTY = '<p class="nothing">That answer is empty.</p>'
NO_ANSWERS = '<p class="nothing">No answers yet. Press Compare on the Compare tab first.</p>'
NO_SOLUTION = (
    '<p class="nothing">This problem has no reference solution. Write one on the Compare tab, or choose '
    "an answer above.</p>"
)
OWN, EACH = "Reference solution", "Each run’s own answer"


def tokens_tab(session: Session, compare: CompareInputs) -> None:
    runs = session.runs
    with gr.Tab("Tokens", id="tokens") as tab:
        with gr.Row(elem_classes="controls"):
            which = gr.Radio(_texts(runs), value=OWN, label="Text", elem_id="which", scale=3, min_width=300)
            first = gr.Dropdown(runs, value=runs[-min(2, len(runs))], label="Compare run", min_width=120)
            second = gr.Dropdown(runs, value=runs[-1], label="with run", min_width=120)
        view = gr.HTML("", elem_id="strips", js_on_load=None)

    @one_line_errors
    @on_gpu
    def look(
        which: str, a: str, b: str, problem: str, solution: str, last: Comparison | None, columns: list[str]
    ) -> str:
        runs = chosen(session, columns)
        if which == OWN:
            if not solution.strip():
                return NO_SOLUTION
            check_text("solution", solution)
            ids = session.text_ids(solution)
        elif last is None or (which != EACH and which not in _texts(last.runs)):
            return NO_ANSWERS
        elif which == EACH:
            rows = [(run, session.answer_ids(last.of(run))) for run in last.runs if last.of(run).ids]
            if not rows:
                return EMPTY
            return tokens_view(last.runs, _with_runs(rows, session.tokens(last.question.problem, rows)), None)
        else:
            problem, ids = last.question.problem, session.answer_ids(last.of(which.removesuffix("’s answer")))
        if not ids:
            return EMPTY
        rows = [(run, ids) for run in runs]
        pair = (a, b) if {a, b} <= set(runs) else (runs[-min(2, len(runs))], runs[-1])
        return tokens_view(runs, _with_runs(rows, session.tokens(problem, rows)), pair)

    def offered(columns: list[str]) -> tuple:
        runs = chosen(session, columns)
        return (
            gr.Radio(_texts(runs), value=OWN),
            gr.Dropdown(runs, value=runs[-min(2, len(runs))]),
            gr.Dropdown(runs, value=runs[-1]),
        )

    compare.columns.change(
        one_line_errors(offered),
        compare.columns,
        [which, first, second],
        show_progress="hidden",
        api_visibility="private",
    )
    inputs = [which, first, second, compare.problem, compare.solution, compare.comparison, compare.columns]
    gr.on(
        [tab.select, which.input, first.input, second.input],
        look,
        inputs,
        view,
        show_progress="minimal",
        api_visibility="private",
        **MODEL,
    )


def _texts(runs: list[str]) -> list[str]:
    return [OWN, EACH, *(f"{run}’s answer" for run in runs)]


def _with_runs(rows, scored) -> list:
    return [(run, tokens) for (run, _), tokens in zip(rows, scored, strict=True)]
