"""The page's components and events. What they show is made in `views`, what they ask is asked of `session`.

Model events share one place in the queue (`concurrency_id`): one runs at a time, others wait their turn and
are told how long. A generator event that is cancelled, or whose page is closed, is closed at its `yield`.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import gradio as gr

from ..errors import DftLoraError, RequestError
from ..runs.folder import RunFolder
from ..tasks import get_task, task_names
from ..tasks.base import Problem
from ..tasks.judge import judge
from .counts import Tally
from .results import results_view
from .session import Answer, Question, Session, check_text
from .text import DELIMITERS
from .views import answers_view, pair_view, samples_view, standings_view, tokens_view
from .votes import Ballot, Pair

SENTENCE = (
    "One base model, fine-tuned two ways: see where plain SFT and DFT answer differently, token by token."
)
FRAME = 0.05  # seconds between two pictures of a stream; the model is not held back by the browser
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
NO_SAMPLES = '<p class="nothing">Share correct, distinct answers and the majority appear here.</p>'
NO_ANSWERS = '<p class="nothing">No answers yet: press Compare on the first tab.</p>'
NO_SOLUTION = (
    '<p class="nothing">This problem has no worked solution: write one on the Compare tab, or look at an '
    "answer.</p>"
)
OWN, EACH = "Reference solution", "Each run’s own answer"
ANY = "any"
EXAMPLE = 20  # of the test set: with the demo's adapters, at the page's own settings, their answers differ

SYSTEM_FONT = ("ui-sans-serif", "system-ui", "sans-serif")
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    font=SYSTEM_FONT,
    font_mono=("ui-monospace", "monospace"),
    radius_size=gr.themes.sizes.radius_md,
).set(
    body_background_fill="#faf9f7",
    body_background_fill_dark="#151513",
    block_background_fill="transparent",
    block_background_fill_dark="transparent",
    block_border_width="0px",
    block_border_width_dark="0px",
    block_shadow="none",
    block_padding="0px",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    input_background_fill="#ffffff",
    input_background_fill_dark="#1f1f1c",
    input_border_color="#cfcac2",
    input_border_color_dark="#4a4943",
    input_border_width="1px",
    slider_color="#0f5f5a",
    slider_color_dark="#5fd0c3",
    checkbox_background_color_selected="#0f5f5a",
    checkbox_background_color_selected_dark="#0f5f5a",
    checkbox_label_background_fill="transparent",
    checkbox_label_background_fill_dark="transparent",
    checkbox_label_background_fill_selected="#ffffff",
    checkbox_label_background_fill_selected_dark="#1f1f1c",
    checkbox_label_border_color="#cfcac2",
    checkbox_label_border_color_dark="#4a4943",
    checkbox_label_border_width="1px",
    button_secondary_background_fill="#e9e5de",
    button_secondary_background_fill_hover="#ded9d0",
    button_secondary_background_fill_dark="#33322d",
    button_secondary_background_fill_hover_dark="#42413a",
    button_primary_background_fill="#0f5f5a",
    button_primary_background_fill_hover="#0b4a46",
    button_primary_background_fill_dark="#5fd0c3",
    button_primary_background_fill_hover_dark="#7fdcd1",
    button_primary_text_color="#ffffff",
    button_primary_text_color_dark="#06201e",
)


@dataclass(frozen=True)
class Comparison:
    """The last comparison of a visitor: what the token view looks into."""

    question: Question
    answers: list[Answer]

    def of(self, run: str) -> Answer:
        return next(answer for answer in self.answers if answer.run == run)


def on_gpu(function: Callable) -> Callable:
    """`spaces.GPU` on a ZeroGPU Space, where a GPU is lent for a call; elsewhere the function itself."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(function)


def told(function: Callable) -> Callable:
    """Our errors as one line on the page; others keep their traceback on the server."""

    @wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except DftLoraError as error:
            raise gr.Error(str(error), print_exception=False) from None

    @wraps(function)
    def steps(*arguments):
        try:
            yield from function(*arguments)
        except DftLoraError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return steps if inspect.isgeneratorfunction(function) else call


def build(folders: Sequence[RunFolder], session: Session | None, ballot: Ballot | None) -> gr.Blocks:
    """The page; with no session only the recorded results."""
    with gr.Blocks(title="dft-lora: SFT and DFT side by side", analytics_enabled=False) as page:
        gr.HTML(f'<div class="top"><h1>dft-lora</h1><p>{SENTENCE}</p></div>', elem_id="top")
        with gr.Tabs(elem_id="tabs"):
            if session and ballot:
                asked = _compare_tab(session)
                _tokens_tab(session, asked)
                _samples_tab(session, asked)
            _results_tab(folders)
            if session and ballot:
                _vote_tab(session, ballot)
        if session:
            _endpoints(session)
    return page


# --- compare ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The components of the compare tab that other tabs read."""

    problem: gr.Textbox
    reference: gr.Textbox
    solution: gr.Textbox
    max_new_tokens: gr.Slider
    seed: gr.Number
    comparison: gr.State


def _compare_tab(session: Session) -> Asked:
    example = get_task("arithmetic").problems()[EXAMPLE]
    with gr.Tab("Compare", id="compare"), gr.Row(elem_classes="split"):
        comparison = gr.State(None)
        with gr.Column(scale=1, min_width=280, elem_classes="ask"):
            problem = gr.Textbox(
                example.question,
                label="Problem",
                info="The first one is picked: the demo’s runs differ on it. How often they do: Results.",
                lines=5,
                max_lines=12,
                max_length=8000,
                elem_id="problem",
            )
            reference = gr.Textbox(
                example.answer,
                label="Reference answer",
                placeholder="optional: judges the answers",
                max_length=2000,
                elem_id="reference",
            )
            with gr.Row(elem_classes="buttons"):
                go = gr.Button("Compare", variant="primary", elem_id="go", scale=2, min_width=120)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            with gr.Accordion("Pick a problem", open=False):
                task, level, pick = _picker()
            with gr.Accordion("Sampling", open=False):
                temperature = gr.Slider(0, 1.5, 1.0, step=0.1, label="Temperature", info="0 is greedy")
                samples = gr.Slider(1, 8, 1, step=1, label="Samples", info="answers a column")
                most = max(16, min(4096, session.positions // 2))
                max_new_tokens = gr.Slider(16, most, min(most, 512), step=16, label="Longest answer, tokens")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Accordion("Worked solution", open=False):
                solution = gr.Textbox(
                    example.solution,
                    label="Reference solution",
                    info="what the token view colours",
                    lines=4,
                    max_length=8000,
                    elem_id="solution",
                )
        with gr.Column(scale=3, min_width=320):
            answers = gr.Markdown(
                answers_view(session.runs, []),
                latex_delimiters=[*DELIMITERS],
                sanitize_html=True,
                elem_id="answers",
            )

    inputs = [problem, reference, temperature, max_new_tokens, seed, samples]

    @told
    @on_gpu
    def ask(*asked) -> Iterator[tuple]:
        question = Question(*asked)
        shown = 0.0
        for written in session.answers(question):
            over = all(answer.state != "writing" for answer in written)
            if over or time.perf_counter() - shown > FRAME:
                shown = time.perf_counter()
                yield answers_view(session.runs, written), Comparison(question, written)
            else:
                yield gr.skip(), Comparison(question, written)

    def stopped(last: Comparison | None):
        for answer in last.answers if last else ():
            answer.state = "stopped" if answer.state == "writing" else answer.state
        return answers_view(session.runs, last.answers if last else [])

    run = gr.on(
        [go.click, problem.submit],
        ask,
        inputs,
        [answers, comparison],
        validator=_valid,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **MODEL,
    )
    stop.click(None, cancels=[run], api_visibility="private").then(
        stopped, comparison, answers, show_progress="hidden", api_visibility="private"
    )
    _pick_events(task, level, pick, [problem, reference, solution])
    return Asked(problem, reference, solution, max_new_tokens, seed, comparison)


def _valid(*asked) -> list:
    """Before the queue: the first field that cannot be used, by name."""
    fields = list(Question.__dataclass_fields__)[: len(asked)]
    try:
        Question(*asked)
        reason = ""
    except RequestError as error:
        reason = str(error)
    return [gr.validate(not reason.startswith(name), reason) for name in fields]


def _picker() -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    task = gr.Dropdown(task_names(), value="arithmetic", label="Set", elem_id="task")
    level = gr.Dropdown([ANY, *_levels("arithmetic")], value=ANY, label="Level or subject", elem_id="level")
    return task, level, gr.Button("Pick one at random", elem_id="pick")


def _levels(name: str) -> list[str]:
    """`tag value` of every tag that divides a set into few parts."""
    values = {(tag, value) for problem in get_task(name).problems() for tag, value in problem.tags.items()}
    return [f"{tag} {value}" for tag, value in sorted(values, key=str)][:40]


def _drawn(name: str, level: str) -> Problem:
    fitting = [
        problem
        for problem in get_task(name).problems()
        if level == ANY or level in {f"{tag} {value}" for tag, value in problem.tags.items()}
    ]
    if not fitting:
        raise RequestError(f"set {name!r} has no problem of {level!r}; pick another level")
    return random.choice(fitting)


def _pick_events(task, level, pick, fields) -> None:
    @told
    def levels(name: str):
        return gr.Dropdown([ANY, *_levels(name)], value=ANY)

    @told
    def choose(name: str, wanted: str):
        problem = _drawn(name, wanted)
        return problem.question, problem.answer or "", problem.solution or ""

    task.change(levels, task, level, show_progress="hidden", api_visibility="private")
    pick.click(choose, [task, level], fields, show_progress="minimal", api_visibility="private")


# --- tokens -------------------------------------------------------------------------------------------


def _tokens_tab(session: Session, asked: Asked) -> None:
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


# --- samples ------------------------------------------------------------------------------------------


def _samples_tab(session: Session, asked: Asked) -> None:
    with gr.Tab("Samples", id="samples"):
        gr.HTML("<p>The problem of the Compare tab, answered many times by every run.</p>")
        with gr.Row(elem_classes="controls"):
            samples = gr.Slider(2, 64, 16, step=1, label="Samples a column", elem_id="samples", scale=2)
            temperature = gr.Slider(0, 1.5, 1.0, step=0.1, label="Temperature", scale=2)
            go = gr.Button("Draw samples", variant="primary", elem_id="draw", min_width=120)
            stop = gr.Button("Stop", min_width=80)
        view = gr.HTML(
            NO_SAMPLES,
            elem_id="tallies",
            js_on_load=None,
        )

    @told
    @on_gpu
    def draw(*values) -> Iterator[Any]:
        question, shown, n_runs = Question(*values), 0.0, len(session.runs)
        for written in session.answers(question):
            finished = sum(answer.state != "writing" for answer in written)
            if finished == len(written) or time.perf_counter() - shown > 4 * FRAME:
                shown = time.perf_counter()
                tallies = [
                    Tally.of(run, [a for a in written if a.run == run and a.state != "writing"])
                    for run in session.runs
                ]
                yield samples_view(session.runs, tallies, finished, n_runs * int(question.samples))
            else:
                yield gr.skip()

    event = go.click(
        draw,
        [asked.problem, asked.reference, temperature, asked.max_new_tokens, asked.seed, samples],
        view,
        validator=_valid,
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
        **MODEL,
    )
    stop.click(None, cancels=[event], api_visibility="private")


# --- results ------------------------------------------------------------------------------------------


def _results_tab(folders: Sequence[RunFolder]) -> None:
    with gr.Tab("Results", id="results") as tab:
        view = gr.HTML(elem_id="report", js_on_load=None)

    @told
    def read() -> str:
        return results_view(folders)

    tab.select(read, None, view, show_progress="hidden", api_visibility="private")


# --- blind vote -----------------------------------------------------------------------------------------


def _vote_tab(session: Session, ballot: Ballot) -> None:
    with gr.Tab("Vote", id="vote") as tab:
        held = gr.State(None)  # the pair, on the server: the browser learns the names after the vote
        with gr.Row(elem_classes="controls"):
            task = gr.Dropdown(task_names(), value="arithmetic-long", label="Problems from", min_width=160)
            new = gr.Button("New pair", variant="primary", elem_id="new-pair", min_width=120)
        pair_shown = gr.Markdown(pair_view(None), latex_delimiters=[*DELIMITERS], elem_id="pair")
        with gr.Row(elem_classes="controls"):
            left = gr.Button("Left is better", interactive=False, elem_id="left")
            tie = gr.Button("No difference", interactive=False, elem_id="tie")
            right = gr.Button("Right is better", interactive=False, elem_id="right")
        standings = gr.HTML(elem_id="standings", js_on_load=None)
    choices = {"left": left, "tie": tie, "right": right}

    def switched(on: bool) -> list:
        return [gr.Button(interactive=on) for _ in choices]

    @told
    @on_gpu
    def answer(name: str) -> Iterator[tuple]:
        sides = random.SystemRandom().sample(session.runs, 2)
        problem = _drawn(name, ANY)
        seed = random.SystemRandom().randrange(2**31)
        question = Question(problem.question, temperature=1.0, seed=seed, max_new_tokens=_longest(session))
        for written in session.answers(question, sides):
            if any(one.state == "writing" for one in written):
                yield [gr.skip()] * (2 + len(choices))
        texts = [one.text for one in written]
        pair = Pair(problem.question, *sides, *texts)
        yield pair_view(pair), pair, *switched(True)

    def cast(choice: str) -> Callable:
        @told
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
        told(lambda: standings_view(session.runs, ballot.standings())),
        None,
        standings,
        show_progress="hidden",
        api_visibility="private",
    )


def _longest(session: Session) -> int:
    return min(1024, session.positions // 2)


# --- endpoints ------------------------------------------------------------------------------------------


def _endpoints(session: Session) -> None:
    """The three functions of the page for gradio_client; arguments are checked, for no component does it."""

    @told
    @on_gpu
    def compare(
        problem: str,
        reference: str = "",
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Stream the columns' answers: run, text, verdict (null without a reference), tokens, seconds."""
        question = Question(problem, reference, temperature, max_new_tokens, seed)
        for written in session.answers(question):
            yield [answer.as_dict() for answer in written]

    @told
    @on_gpu
    def tokens(run: str, problem: str, text: str) -> list[dict[str, Any]]:
        """Each token of a text under one run: probability, DFT's weight, likeliest alternatives."""
        check_text("problem", problem)
        check_text("text", text)
        (scored,) = session.tokens(problem, [(run, session.text_ids(text))])
        return [token.as_dict() for token in scored]

    @told
    def score(answer: str, reference: str) -> str:
        """correct, wrong, unparsable or timed_out."""
        check_text("answer", answer)
        check_text("reference", reference)
        return judge(answer, reference).status

    gr.api(compare, api_name="compare", **MODEL)
    gr.api(tokens, api_name="tokens", **MODEL)
    gr.api(score, api_name="score", concurrency_id="judge", concurrency_limit=4)
