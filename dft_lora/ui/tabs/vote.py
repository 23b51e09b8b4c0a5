"""Vote: two answers without run names, and the count of all votes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import gradio as gr

from ...errors import RequestError
from ..events import MODEL, on_gpu, one_line_errors
from ..session import Question, Session
from ..text import DELIMITERS
from ..views import pair_view, standings_view
from ..votes import Ballot, Pair
from .picker import EMBEDDED, ProblemSets


def vote_tab(session: Session, ballot: Ballot, sets: ProblemSets) -> None:
    with gr.Tab("Vote", id="vote") as tab:
        held = gr.State(None)  # the pair stays on the server: the browser learns the names after the vote
        with gr.Row(elem_classes="controls"):
            name = "arithmetic-long" if sets.proposed[0] == EMBEDDED else sets.proposed[0]
            task = gr.Dropdown(sets.written, value=name, label="Problem set", min_width=160)
            new = gr.Button("New pair", variant="primary", elem_id="new-pair", min_width=120)
        pair_shown = gr.Markdown(pair_view(None), latex_delimiters=[*DELIMITERS], elem_id="pair")
        with gr.Row(elem_classes="choices", equal_height=True):
            left = gr.Button("Left is better", interactive=False, elem_id="left")
            tie = gr.Button("No difference", interactive=False, elem_id="tie")
            right = gr.Button("Right is better", interactive=False, elem_id="right")
        standings = gr.HTML(elem_id="standings", js_on_load=None)
    choices = {"left": left, "tie": tie, "right": right}

    def switched(on: bool) -> list:
        return [gr.Button(interactive=on) for _ in choices]

    @one_line_errors
    @on_gpu
    def answer(name: str) -> Iterator[tuple]:
        sides = random.SystemRandom().sample(session.runs, 2)
        problem = sets.random(name)
        seed = random.SystemRandom().randrange(2**31)
        question = Question(problem.question, temperature=1.0, seed=seed, max_new_tokens=_longest(session))
        for written in session.answers(question, sides):
            if any(one.state == "writing" for one in written):
                yield [gr.skip()] * (2 + len(choices))
        texts = [one.text for one in written]
        pair = Pair(problem.question, *sides, *texts)
        yield pair_view(pair), pair, *switched(True)

    def cast(choice: str) -> Callable:
        @one_line_errors
        def vote(pair: Pair | None):
            if pair is None:
                raise RequestError("there is no pair to vote on: press New pair")
            ballot.cast(pair, choice)
            count = standings_view(session.runs, ballot.standings())
            return pair_view(pair, session.runs), None, *switched(False), count

        return vote

    new.click(
        answer,
        task,
        [pair_shown, held, *choices.values()],
        trigger_mode="once",
        show_progress="minimal",
        api_visibility="private",
        **MODEL,
    )
    for choice, button in choices.items():
        button.click(
            cast(choice),
            held,
            [pair_shown, held, *choices.values(), standings],
            show_progress="hidden",
            trigger_mode="once",
            api_visibility="private",
        )
    tab.select(
        one_line_errors(lambda: standings_view(session.runs, ballot.standings())),
        None,
        standings,
        show_progress="hidden",
        api_visibility="private",
    )


def _longest(session: Session) -> int:
    return min(1024, session.positions // 2)
