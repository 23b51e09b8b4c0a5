"""Train: two objectives in training side by side, watched as they learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import RequestError
from ..events import MODEL, one_line_errors
from ..session import Session
from ..text import plain
from ..train_views import inspection_view, measured_view, moment_view, unfinished_choices
from ..views import count
from ..workshop import TASKS, Setup, Training, Upload, Workshop, bases, defaults, objective_choices
from .compare import CompareInputs, shown_columns

NOTHING = (
    '<p class="nothing">Two adapters will learn here, one with each objective, from the same batches over '
    "one base. Their metrics, the tokens of one example and their answers change with every step.</p>"
)
TRAIN = {"concurrency_id": "train", "concurrency_limit": 8}  # the workshop says itself that it is busy


def train_tab(session: Session, workshop: Workshop, compare: CompareInputs) -> None:
    own = session.base if session.base in bases() else "tiny"
    fitting = defaults(own)
    with gr.Tab("Train", id="train") as tab:
        held = gr.State((0, ""))  # number and state of this visitor's training
        upload = gr.State(None)
        with gr.Row(elem_classes="controls"):
            base = gr.Dropdown(bases(), value=own, label="Base", min_width=140)
            source = gr.Dropdown(list(TASKS), value=fitting[0], label="Data", min_width=220, scale=2)
            file = gr.UploadButton("Upload .jsonl", elem_id="upload", min_width=140, type="filepath")
        with gr.Row(elem_classes="controls", visible=False) as columns:
            uploaded = gr.HTML(elem_id="uploaded", js_on_load=None, min_width=200)
            prompt = gr.Dropdown(["problem"], value="problem", label="Prompt column", min_width=140)
            completion = gr.Dropdown(["solution"], value="solution", label="Completion column", min_width=140)
            forget = gr.Button("Forget the file", min_width=120)
        with gr.Row(elem_classes="controls"):
            first = gr.Dropdown(objective_choices(), value="sft", label="Objective A", min_width=120)
            second = gr.Dropdown(objective_choices(), value="dft", label="Objective B", min_width=120)
            steps = gr.Slider(2, 400, 60, step=1, label="Steps", elem_id="steps", scale=2, min_width=200)
            rate = gr.Number(fitting[2], label="Learning rate", min_width=110, elem_id="rate")
        problem = gr.Textbox(
            fitting[1],
            label="A problem that both answer as they learn",
            lines=2,
            max_lines=6,
            max_length=4000,
            elem_id="watched",
        )
        with gr.Row(elem_classes="buttons"):
            start = gr.Button("Start", variant="primary", elem_id="start", min_width=90)
            pause = gr.Button("Pause", elem_id="pause", min_width=90)
            stop = gr.Button("Stop", elem_id="halt", min_width=90)
            look = gr.Button("Look at the data", elem_id="inspect", min_width=130)
            measure = gr.Button("Memory and time", elem_id="measure", min_width=130)
        with gr.Row(elem_classes="controls", visible=False) as earlier:
            number = gr.Dropdown([], label="Unfinished trainings", elem_id="unfinished", min_width=200)
            go_on = gr.Button("Continue", elem_id="continue", min_width=100)
        live = gr.HTML(NOTHING, elem_id="live", js_on_load=None)
        note = gr.HTML(elem_id="trained", js_on_load=None)
        before = gr.HTML(elem_id="before", js_on_load=None)

    wishes = [base, source, prompt, completion, first, second, steps, rate, upload]

    def watched(wanted: Setup | Training, asked: str) -> Iterator[tuple]:
        for now in workshop.watch(wanted, asked):
            yield moment_view(now), (now.number, now.state)

    @one_line_errors
    def begin(asked: str, *fields) -> Iterator[tuple]:
        yield from watched(Setup(*fields), asked)

    @one_line_errors
    def resume(chosen: int | None, asked: str) -> Iterator[tuple]:
        if chosen is None:
            raise RequestError("unfinished trainings: choose one")
        yield from watched(workshop.open(chosen), asked)

    @one_line_errors
    def left() -> tuple:
        """The trainings that may be continued, the newest chosen."""
        found = unfinished_choices(workshop.unfinished())
        newest = found[0][1] if found else None
        return gr.Row(visible=bool(found)), gr.Dropdown(found, value=newest)

    @one_line_errors
    def take(path: str) -> tuple:
        file = Path(path)
        try:
            content = file.read_bytes()
        except OSError:  # another visitor uploaded the same file, and its copy is gone
            raise RequestError("upload: the file did not arrive; choose it again") from None
        finally:
            file.unlink(missing_ok=True)  # it lives in this visitor's state alone until a training saves it
        read = Upload.read(file.name, content)
        guessed = read.guess()
        lists = [gr.Dropdown(list(read.columns), value=column) for column in guessed]
        said = f"<p>{plain(read.name)}: {count(read.rows, 'row')}. It is kept only if you train on it.</p>"
        return read, gr.Dropdown(interactive=False), gr.Row(visible=True), said, *lists

    def ask(what: str) -> Any:
        def asked(mine: tuple[int, str]) -> None:
            workshop.ask(mine[0], what)

        return asked

    @one_line_errors
    def compared(mine: tuple[int, str]) -> tuple:
        """The columns of this visitor's finished or stopped training, for Compare; a line that says so."""
        number, state = mine
        if state not in ("done", "stopped"):
            return gr.skip(), ""
        try:
            names = [session.add(folder) for folder in workshop.open(number).shown(state == "stopped")]
        except RequestError as error:
            return gr.skip(), f'<p class="small">{plain(str(error))}</p>'
        if not names:  # stopped before the first step
            return gr.skip(), ""
        said = "The runs are on the Compare, Tokens and Samples tabs now."
        return shown_columns(session, names), f'<p class="small">{said}</p>'

    for event, function, inputs in (
        (start.click, begin, [problem, *wishes]),
        (go_on.click, resume, [number, problem]),
    ):
        running = event(
            function,
            inputs,
            [live, held],
            show_progress="hidden",
            trigger_mode="once",
            api_visibility="private",
            **TRAIN,
        )
        running.success(
            compared, held, [compare.columns, note], show_progress="hidden", api_visibility="private"
        )
        running.then(left, None, [earlier, number], show_progress="hidden", api_visibility="private")
    for button, what in ((pause, "paused"), (stop, "stopped")):
        button.click(ask(what), held, None, queue=False, api_visibility="private")
    look.click(
        one_line_errors(lambda *fields: inspection_view(workshop.inspect(Setup(*fields)))),
        wishes,
        before,
        api_visibility="private",
        **MODEL,
    )
    measure.click(
        one_line_errors(lambda *fields: measured_view(workshop.measure(Setup(*fields)))),
        wishes,
        before,
        api_visibility="private",
        **MODEL,
    )
    file.upload(take, file, [upload, source, columns, uploaded, prompt, completion], api_visibility="private")
    forget.click(
        lambda: (None, gr.Dropdown(interactive=True), gr.Row(visible=False), ""),
        None,
        [upload, source, columns, uploaded],
        api_visibility="private",
    )
    base.input(one_line_errors(defaults), base, [source, problem, rate], api_visibility="private")
    tab.select(left, None, [earlier, number], show_progress="hidden", api_visibility="private")
