"""Steps: runs at each of their kept checkpoints, from the base to the end of training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import gradio as gr

from ..charts import figure, shares
from ..events import FRAME, MODEL, on_gpu, one_line_errors
from ..film import PROBLEMS, Film
from ..session import Question, Session, check_text
from ..text import DELIMITERS
from ..views import SCALE, Legend, answers_view, strip
from .compare import CompareInputs

NO_CHECKPOINTS = (
    '<p class="nothing">No run here has kept its checkpoints. Train two on the Train tab, or on the command '
    "line with <code>train.save_steps</code> and <code>train.keep_checkpoints</code>.</p>"
)
MOST = 3  # runs at a time


def steps_tab(session: Session, compare: CompareInputs) -> None:
    film = Film(session)
    with gr.Tab("Steps", id="steps-tab") as tab:
        none = gr.HTML(NO_CHECKPOINTS, js_on_load=None)
        with gr.Column(visible=False) as shown:
            with gr.Row(elem_classes="controls"):
                runs = gr.Dropdown(
                    [],
                    multiselect=True,
                    max_choices=MOST,
                    label="Runs",
                    elem_id="film-runs",
                    scale=2,
                    min_width=260,
                )
                at = gr.Slider(
                    0, 1, 0, step=1, label="Training step", elem_id="film-step", scale=3, min_width=260
                )
                go = gr.Button("Answer at this step", elem_id="film-answer", min_width=140)
            view = gr.HTML(elem_id="film", js_on_load=None)
            answers = gr.Markdown(latex_delimiters=[*DELIMITERS], sanitize_html=True, elem_id="film-answers")

    @one_line_errors
    def opened(chosen: list[str]) -> tuple:
        """The runs that have checkpoints, the two added last chosen, and a slider over their steps."""
        known = list(film.runs)
        chosen = [run for run in chosen if run in known] or known[-2:]
        return (
            gr.HTML(visible=not known),
            gr.Column(visible=bool(known)),
            gr.Dropdown(known, value=chosen),
            _slider(film.steps(chosen)),
        )

    @one_line_errors
    @on_gpu
    def look(chosen: list[str], wanted: float, problem: str, solution: str) -> str:
        if not chosen:
            return ""
        step = nearest(film.steps(chosen), wanted)
        check_text("solution", solution)
        label = Legend(["base", *chosen])
        legend = " ".join(map(label, chosen))
        chart = figure(
            f"{legend}: share of the tokens of {PROBLEMS} reference solutions by probability, log scale",
            shares(label, film.histograms(chosen, step)),
        )
        strips = ""
        if solution.strip():
            scored = film.tokens(chosen, step, problem, session.text_ids(solution))
            strips = "".join(strip(label(run), run, tokens) for run, tokens in scored.items())
        said = "The base, before training" if step == 0 else f"After step {step}"
        return (
            f'<div class="film"><section><h2>{said}</h2><div class="charts">{chart}</div></section>'
            "<section><h2>The reference solution of the Compare tab</h2>"
            f'{SCALE}<div class="strips">{strips}</div></section></div>'
        )

    @one_line_errors
    @on_gpu
    def answer(chosen: list[str], wanted: float, *asked) -> Iterator[str]:
        step, question = nearest(film.steps(chosen), wanted), Question(*asked)
        shown = 0.0
        for written in film.answers(chosen, step, question):
            over = all(one.state != "writing" for one in written)
            if over or time.perf_counter() - shown > FRAME:
                shown = time.perf_counter()
                yield answers_view(chosen, written, Legend(["base", *chosen]))
            else:
                yield gr.skip()

    inputs = [runs, at, compare.problem, compare.solution]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    tab.select(opened, runs, [none, shown, runs, at], **quiet).then(look, inputs, view, **quiet, **MODEL)
    runs.input(one_line_errors(lambda chosen: _slider(film.steps(chosen))), runs, at, **quiet)
    gr.on([at.change, runs.input], look, inputs, view, trigger_mode="always_last", **quiet, **MODEL)
    at.change(lambda: "", None, answers, **quiet)
    question = [compare.problem, compare.reference]
    go.click(answer, [runs, at, *question], answers, trigger_mode="once", **quiet, **MODEL)


def nearest(steps: Sequence[int], wanted: float) -> int:
    """The kept step nearest to where the slider stands."""
    return min(steps, key=lambda step: abs(step - wanted))


def _slider(steps: Sequence[int]) -> gr.Slider:
    """From 0 to the last step, one stop per checkpoint."""
    gap = min((b - a for a, b in pairwise(steps)), default=1)
    return gr.Slider(0, max(1, -(-steps[-1] // gap) * gap), value=0, step=gap)
