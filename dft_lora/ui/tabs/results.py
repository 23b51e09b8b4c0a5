"""Results: what the run folders and the recorded lab say. This tab needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from ...runs.folder import RunFolder
from ..events import one_line_errors
from ..lab import lab_view
from ..results import results_view


def results_tab(folders: Sequence[RunFolder]) -> None:
    with gr.Tab("Results", id="results") as tab:
        view = gr.HTML(elem_id="report", js_on_load=None)

    @one_line_errors
    def read() -> str:
        return results_view(folders) + lab_view()

    tab.select(read, None, view, show_progress="hidden", api_visibility="private")
