"""The page: its heading, and the tabs from left to right.

What they show is made in `views` and `results`, what they ask is asked of `session`. Model events share one
place in the queue (`events.MODEL`): one runs at a time, others wait their turn and are told how long.
A generator event that is cancelled, or whose page is closed, is closed at its `yield`.
"""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from ..runs.folder import RunFolder
from .endpoints import endpoints
from .session import Session
from .tabs.compare import compare_tab
from .tabs.results import results_tab
from .tabs.samples import samples_tab
from .tabs.tokens import tokens_tab
from .tabs.vote import vote_tab
from .votes import Ballot

SENTENCE = (
    "One base model, fine-tuned two ways: see where plain SFT and DFT answer differently, token by token."
)


def build(folders: Sequence[RunFolder], session: Session | None, ballot: Ballot | None) -> gr.Blocks:
    """The page; with no session only the recorded results."""
    with gr.Blocks(title="dft-lora: SFT and DFT side by side", analytics_enabled=False) as page:
        gr.HTML(f'<div class="top"><h1>dft-lora</h1><p>{SENTENCE}</p></div>', elem_id="top")
        with gr.Tabs(elem_id="tabs"):
            if session and ballot:
                asked = compare_tab(session)
                tokens_tab(session, asked)
                samples_tab(session, asked)
            results_tab(folders)
            if session and ballot:
                vote_tab(session, ballot)
        if session:
            endpoints(session)
    return page
