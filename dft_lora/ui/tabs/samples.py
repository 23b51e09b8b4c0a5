"""Samples: many answers per run, counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ...errors import RequestError
from ..counts import Tally
from ..events import FRAME, MODEL, on_gpu, one_line_errors, validate
from ..session import Question, Session
from ..views import samples_view
from .compare import CompareInputs, chosen

NO_SAMPLES = (
    '<p class="nothing">The share of correct answers, the distinct answers and the majority answer '
    "will appear here.</p>"
)


def samples_tab(session: Session, compare: CompareInputs) -> None:
    with gr.Tab("Samples", id="samples"):
        gr.HTML("<p>Every run answers the problem from the Compare tab many times.</p>")
        with gr.Row(elem_classes="controls"):
            samples = gr.Slider(2, 64, 16, step=1, label="Samples per run", elem_id="samples", scale=2)
            temperature = gr.Slider(0, 1.5, 1.0, step=0.1, label="Temperature", scale=2)
            go = gr.Button("Draw samples", variant="primary", elem_id="draw", min_width=120)
            stop = gr.Button("Stop", min_width=80)
        view = gr.HTML(
            NO_SAMPLES,
            elem_id="tallies",
            js_on_load=None,
        )

    @one_line_errors
    @on_gpu
    def draw(*values) -> Iterator[Any]:
        *fields, columns = values
        question, shown, runs = Question(*fields), 0.0, chosen(session, columns)
        if question.task and question.task.by_likelihood:
            raise RequestError("the runs choose among this problem's answers, so there is nothing to sample")
        for written in session.answers(question, runs):
            finished = sum(answer.state != "writing" for answer in written)
            if finished == len(written) or time.perf_counter() - shown > 4 * FRAME:
                shown = time.perf_counter()
                tallies = [
                    Tally.of(run, [a for a in written if a.run == run and a.state != "writing"])
                    for run in runs
                ]
                yield samples_view(runs, tallies, finished, len(runs) * int(question.samples))
            else:
                yield gr.skip()

    event = go.click(
        draw,
        [
            compare.problem,
            compare.reference,
            temperature,
            compare.max_new_tokens,
            compare.seed,
            samples,
            compare.picked,
            compare.columns,
        ],
        view,
        validator=validate,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **MODEL,
    )
    stop.click(None, cancels=[event], api_visibility="private")
