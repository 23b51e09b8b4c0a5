"""Tokens: a text coloured by the probability of its tokens under each run."""

from __future__ import annotations

import gradio as gr

from ..events import MODEL, on_gpu, one_line_errors
from ..session import Session, check_text
from ..views import tokens_view
from .compare import CompareInputs, Comparison

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
            which = gr.Radio(
                [OWN, EACH, *(f"{run}’s answer" for run in runs)],
                value=OWN,
                label="Text",
                elem_id="which",
                scale=3,
                min_width=300,
            )
            first = gr.Dropdown(runs, value=runs[-min(2, len(runs))], label="Compare run", min_width=120)
            second = gr.Dropdown(runs, value=runs[-1], label="with run", min_width=120)
        view = gr.HTML("", elem_id="strips", js_on_load=None)

    @one_line_errors
    @on_gpu
    def look(which: str, a: str, b: str, problem: str, solution: str, last: Comparison | None) -> str:
        if which == OWN:
            if not solution.strip():
                return NO_SOLUTION
            check_text("solution", solution)
            ids = session.text_ids(solution)
        elif last is None:
            return NO_ANSWERS
        elif which == EACH:
            rows = [(run, session.answer_ids(last.of(run))) for run in runs if last.of(run).ids]
            return tokens_view(runs, _with_runs(rows, session.tokens(last.question.problem, rows)), None)
        else:
            problem, ids = last.question.problem, session.answer_ids(last.of(which.removesuffix("’s answer")))
        if not ids:
            return '<p class="nothing">That answer is empty.</p>'
        rows = [(run, ids) for run in runs]
        return tokens_view(runs, _with_runs(rows, session.tokens(problem, rows)), (a, b))

    inputs = [which, first, second, compare.problem, compare.solution, compare.comparison]
    gr.on(
        [tab.select, which.change, first.change, second.change],
        look,
        inputs,
        view,
        show_progress="minimal",
        api_visibility="private",
        **MODEL,
    )


def _with_runs(rows, scored) -> list:
    return [(run, tokens) for (run, _), tokens in zip(rows, scored, strict=True)]
