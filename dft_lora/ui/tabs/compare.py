"""Compare: every run answers one problem at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import gradio as gr

from ...errors import RequestError
from ..choices import choices_view
from ..events import FRAME, MODEL, on_gpu, one_line_errors, validate
from ..session import MAX_REFERENCE, Answer, Question, Session
from ..text import DELIMITERS
from ..views import MAX_COLUMNS, answers_view
from .picker import ProblemSets, connect_picker, picker


@dataclass(frozen=True)
class Comparison:
    """A visitor's last comparison; the Tokens tab shows its answers."""

    question: Question
    answers: list[Answer]
    runs: list[str]

    def of(self, run: str) -> Answer:
        return next(answer for answer in self.answers if answer.run == run)


@dataclass(frozen=True)
class CompareInputs:
    """The components of the Compare tab that other tabs read."""

    problem: gr.Textbox
    reference: gr.Textbox
    solution: gr.Textbox
    max_new_tokens: gr.Slider
    seed: gr.Number
    picked: gr.State
    comparison: gr.State
    columns: gr.Dropdown


def compare_tab(session: Session, sets: ProblemSets) -> CompareInputs:
    name, example, why = sets.proposed
    with gr.Tab("Compare", id="compare"):
        comparison, picked = gr.State(None), gr.State(sets.picked(name, example))
        with gr.Row(elem_classes="ask"):
            problem = gr.Textbox(
                example.question,
                label="Problem",
                info=why,
                lines=4,
                max_lines=12,
                max_length=8000,
                elem_id="problem",
                scale=3,
                min_width=300,
            )
            with gr.Column(scale=1, min_width=280):
                reference = gr.Textbox(
                    example.answer,
                    label="Reference answer",
                    placeholder="Optional. Answers are judged against it.",
                    max_length=MAX_REFERENCE,
                    elem_id="reference",
                )
                with gr.Row(elem_classes="buttons"):
                    go = gr.Button("Compare", variant="primary", elem_id="go", scale=2, min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        with gr.Row(elem_classes="more"):
            with gr.Column(min_width=280), gr.Accordion("Pick a problem", open=False):
                task, level, pick = picker(sets, name)
            with gr.Column(min_width=280), gr.Accordion("Sampling", open=False):
                temperature = gr.Slider(0, 1.5, 1.0, step=0.1, label="Temperature", info="0 means greedy")
                samples = gr.Slider(1, 8, 1, step=1, label="Samples per run")
                most = max(16, min(4096, session.positions // 2))
                max_new_tokens = gr.Slider(16, most, min(most, 512), step=16, label="Max new tokens")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Column(min_width=280), gr.Accordion("Reference solution", open=False):
                solution = gr.Textbox(
                    example.solution,
                    label="Reference solution",
                    info="The Tokens tab colours this text.",
                    lines=4,
                    max_length=8000,
                    elem_id="solution",
                )
        columns = gr.Dropdown(
            session.runs,
            value=session.runs,
            multiselect=True,
            max_choices=MAX_COLUMNS,
            label="Columns",
            visible=False,  # until there are more runs than the page's own
            elem_id="columns",
        )
        answers = gr.Markdown(
            answers_view(session.runs, []),
            latex_delimiters=[*DELIMITERS],
            sanitize_html=True,
            elem_id="answers",
        )

    inputs = [problem, reference, temperature, max_new_tokens, seed, samples, picked, columns]

    @one_line_errors
    @on_gpu
    def ask(*asked) -> Iterator[tuple]:
        *fields, runs = asked
        question, runs = Question(*fields), chosen(session, runs)
        if question.task and question.task.by_likelihood:
            yield choices_view(question, session.choices(question, runs)), None
            return
        shown = 0.0
        for written in session.answers(question, runs):
            over = all(answer.state != "writing" for answer in written)
            if over or time.perf_counter() - shown > FRAME:
                shown = time.perf_counter()
                yield answers_view(runs, written), Comparison(question, written, runs)
            else:
                yield gr.skip(), Comparison(question, written, runs)

    def stopped(last: Comparison | None):
        if last is None:
            return gr.skip()
        for answer in last.answers:
            answer.state = "stopped" if answer.state == "writing" else answer.state
        return answers_view(last.runs, last.answers)

    run = gr.on(
        [go.click, problem.submit],
        ask,
        inputs,
        [answers, comparison],
        validator=validate,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **MODEL,
    )
    stop.click(None, cancels=[run], api_visibility="private").then(
        stopped, comparison, answers, show_progress="hidden", api_visibility="private"
    )
    connect_picker(sets, task, level, pick, [problem, reference, solution, picked])
    return CompareInputs(problem, reference, solution, max_new_tokens, seed, picked, comparison, columns)


def chosen(session: Session, runs: Sequence[str]) -> list[str]:
    """The columns that a visitor chose; the page's own if none. Raises RequestError for too many."""
    if len(runs) > MAX_COLUMNS:
        raise RequestError(f"columns: {len(runs)} runs; choose at most {MAX_COLUMNS}")
    return list(dict.fromkeys(runs)) or session.runs


def shown_columns(session: Session, names: Sequence[str] = ()) -> gr.Dropdown:
    """The choice of columns, once there is one: the base and the runs `names`, or the page's own columns."""
    value = [*(["base"] if "base" in session.adapters else []), *names][-MAX_COLUMNS:]
    return gr.Dropdown(
        session.every, value=value if names else session.runs, visible=session.every != session.runs
    )
