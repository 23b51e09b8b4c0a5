"""The page: its heading and its tabs, from left to right.

`views` and `results` make the HTML; `session` runs the models. Events that run a model share one slot of the
queue (`events.MODEL`): one runs at a time, and the page tells the others how long they will wait. When an
event is cancelled or its page is closed, Gradio closes its generator at the `yield`.
"""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from ..runs.folder import RunFolder
from .endpoints import endpoints
from .session import Session
from .tabs.compare import compare_tab
from .tabs.picker import ProblemSets
from .tabs.results import results_tab
from .tabs.samples import samples_tab
from .tabs.tokens import tokens_tab
from .tabs.vote import vote_tab
from .votes import Ballot

SENTENCE = (
    "One base model, fine-tuned two ways: see where plain SFT and DFT answer differently, token by token."
)


def build(folders: Sequence[RunFolder], session: Session | None, ballot: Ballot | None) -> gr.Blocks:
    """The page; without a session it shows only the recorded results."""
    with gr.Blocks(title="dft-lora: SFT and DFT side by side", analytics_enabled=False) as page:
        gr.HTML(f'<div class="top"><h1>dft-lora</h1><p>{SENTENCE}</p></div>', elem_id="top")
        with gr.Tabs(elem_id="tabs"):
            if session and ballot:
                sets = ProblemSets(folders)
                compare = compare_tab(session, sets)
                tokens_tab(session, compare)
                samples_tab(session, compare)
            results_tab(folders)
            if session and ballot:
                vote_tab(session, ballot, sets)
        if session:
            endpoints(session)
    return page
