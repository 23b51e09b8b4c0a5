"""Tokens: a text coloured by the probability of its tokens under every run."""

from __future__ import annotations

import gradio as gr

from ..events import MODEL, on_gpu, told
from ..session import Session, check_text
from ..views import tokens_view
from .compare import Asked, Comparison

NO_ANSWERS = '<p class="nothing">No answers yet: press Compare on the first tab.</p>'
NO_SOLUTION = (
    '<p class="nothing">This problem has no worked solution: write one on the Compare tab, or look at an '
    "answer.</p>"
)
OWN, EACH = "Reference solution", "Each run’s own answer"


def tokens_tab(session: Session, asked: Asked) -> None:
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
            first = gr.Dropdown(runs, value=runs[-min(2, len(runs))], label="Difference from", min_width=120)
            second = gr.Dropdown(runs, value=runs[-1], label="to", min_width=120)
        view = gr.HTML("", elem_id="strips", js_on_load=None)

    @told
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

    inputs = [which, first, second, asked.problem, asked.solution, asked.comparison]
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
