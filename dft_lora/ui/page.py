"""The page: its heading and its tabs, from left to right.

`views` and `results` make the HTML; `session` runs the models. Events that run a model share one slot of the
queue (`events.MODEL`): one runs at a time, and the page tells the others how long they will wait. When an
event is cancelled or its page is closed, Gradio closes its generator at the `yield`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import gradio as gr

from ..runs.folder import RunFolder
from .endpoints import endpoints
from .session import Session
from .tabs.compare import compare_tab, shown_columns
from .tabs.picker import ProblemSets
from .tabs.results import results_tab
from .tabs.samples import samples_tab
from .tabs.steps import steps_tab
from .tabs.tokens import tokens_tab
from .tabs.train import train_tab
from .tabs.vote import vote_tab
from .votes import Ballot
from .workshop import Workshop

SENTENCE = (
    "One base model, fine-tuned two ways: see where plain SFT and DFT answer differently, token by token."
)

SHORT = "SFT and DFT, token by token"  # on a phone


def build(
    folders: Sequence[RunFolder],
    session: Session | None,
    ballot: Ballot | None,
    workshop: Workshop | None = None,
) -> gr.Blocks:
    """The page. Without a session it shows only recorded results; without a workshop it trains nothing."""
    with gr.Blocks(
        title="dft-lora: SFT and DFT side by side", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        said = f'<span class="long">{SENTENCE}</span><span class="short">{SHORT}</span>'
        gr.HTML(f'<div class="top"><h1>dft-lora</h1><p>{said}</p></div>', elem_id="top")
        with gr.Tabs(elem_id="tabs"):
            if session and ballot:
                sets = ProblemSets(folders)
                compare = compare_tab(session, sets)
                if workshop:
                    train_tab(session, workshop, compare)
                tokens_tab(session, compare)
                steps_tab(session, compare)
                samples_tab(session, compare)
            results_tab(folders)
            if session and ballot and len(session.runs) > 1:
                vote_tab(session, ballot, sets)
        if session and ballot:
            page.load(
                partial(shown_columns, session), None, compare.columns, api_visibility="private", queue=False
            )
            endpoints(session)
    return page
