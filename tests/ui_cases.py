"""What the page's tests share: runs on the embedded base, reference answers, a served page, hostile text.

The adapters are random: the tests check that each column uses its own, not that it answers well.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from gradio_client import Client
from patience import HANG, wait_for

from dft_lora.config import load_recipe
from dft_lora.evaluation.base_run import base_run
from dft_lora.model.adapters import adapter_layers
from dft_lora.model.generate import Request, generate
from dft_lora.model.generate import stream as generate_stream
from dft_lora.model.head import bare
from dft_lora.model.load import add_lora, load_base
from dft_lora.runs.folder import RunFolder
from dft_lora.ui import session as ui_session
from dft_lora.ui.server import launch
from dft_lora.ui.session import Question, Session
from dft_lora.ui.votes import Ballot
from dft_lora.ui.workshop import Workshop

QUICK = ("train.batch_size=2", "train.micro_batch_size=2", "data.sample=8", "adapter.r=2")
PROBLEM = "Mia has 12 apples. Mia buys 7 more. How many apples are there now?"
HOSTILE = [
    "<script>hit()</script>",
    "<img src=x onerror=hit()>",
    "<img src=//elsewhere.invalid/a.png>",
    '<img src="http://elsewhere.invalid/b.png" onload="hit()">',
    "<svg onload=hit()>",
    "<svg><script>hit()</script></svg>",
    "<svg><animate onbegin=hit() attributeName=x dur=1s>",
    "<iframe src=javascript:hit()></iframe>",
    "<iframe srcdoc='<script>parent.hit()</script>'></iframe>",
    "<iframe src=https://elsewhere.invalid/></iframe>",
    "<object data=javascript:hit()></object>",
    "<embed src=//elsewhere.invalid/x>",
    "<video src=//elsewhere.invalid/v onerror=hit()></video>",
    "<audio src=x onerror=hit()></audio>",
    "<link rel=stylesheet href=//elsewhere.invalid/c.css>",
    "<style>@import '//elsewhere.invalid/d.css';</style>",
    "<style>*{background:url(//elsewhere.invalid/e)}</style>",
    "<base href=//elsewhere.invalid/>",
    "<meta http-equiv=refresh content='0;url=//elsewhere.invalid/'>",
    "<form action=//elsewhere.invalid/><input autofocus onfocus=hit()>",
    "<details open ontoggle=hit()>x</details>",
    "<body onload=hit()>",
    "<math><mtext><img src=x onerror=hit()></mtext></math>",
    "<a href=javascript:hit()>a</a>",
    "[a](javascript:hit())",
    "[a](https://elsewhere.invalid/)",
    "![a](https://elsewhere.invalid/f.png)",
    "![a](x){onerror=hit()}",
    "[![a](https://elsewhere.invalid/g.png)](javascript:hit())",
    "> > ![a](https://elsewhere.invalid/h.png)",
    "- 1. ![a][r]\n\n[r]: https://elsewhere.invalid/i.png",
    "<https://elsewhere.invalid/j>",
    "```html\n<img src=x onerror=hit()>\n```",
    "```mermaid\ngraph TD; A-->B; click A call hit()\n```",
    "`<img src=x onerror=hit()>`",
    "# <img src=x onerror=hit()>",
    "| a | <img src=x onerror=hit()> |\n|---|---|\n| b | c |",
    "    <img src=x onerror=hit()>",
    "text\n\n<div><img src=x onerror=hit()></div>\n\ntext",
    "</div></section></div>\n\n<img src=x onerror=hit()>",
    "\\href{javascript:hit()}{x}",
    "$\\href{javascript:hit()}{x}$",
    "\\(\\href{https://elsewhere.invalid/}{x}\\)",
    "\\[\\url{javascript:hit()}\\]",
    "$$\\includegraphics{https://elsewhere.invalid/k.png}$$",
    "$\\htmlData{onclick=hit()}{x}$",
    "$\\htmlStyle{background:url(//elsewhere.invalid/l)}{x}$",
    "$<img src=x onerror=hit()>$",
    "\\(<img src=x onerror=hit()>\\)",
    "\\[ a \\] <img src=x onerror=hit()> \\[ b \\]",
    "$![a](https://elsewhere.invalid/m.png)$",
    "$\\text{<img src=x onerror=hit()>}$",
    "\\(x\\) %%%LATEX_BLOCK_0%%% %%%LATEX_BLOCK_1%%%<img src=x onerror=hit()>",
    "$%%%LATEX_BLOCK_0%%%$ \\(<svg onload=hit()>\\)",
    "\\def\\a{\\a\\a}\\a $\\def\\a{\\a\\a}\\a$",
    "$\\rule{9999em}{9999em}$",
    "&lt;img src=x onerror=hit()&gt; &#60;img src=x onerror=hit()&#62;",
    "\u202e<img src=x onerror=hit()>\u0000\u0007",
    "${hit()} {{hit()}} {{constructor.constructor('hit()')()}}",
    "'\"><img src=x onerror=hit()>",
]


@cache
def runs() -> list[RunFolder]:
    """base, sft and dft on the embedded base, with random adapters of different ranks."""
    home = Path(tempfile.mkdtemp(prefix="dft-lora-page-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folders = []
    for seed, (name, rank) in enumerate((("base", None), ("sft", 4), ("dft", 8))):
        rank_change = [f"adapter.r={rank}"] if rank else []
        recipe = load_recipe("tiny_dft", [f"name={name}", f"output={home / name}", *rank_change])
        folders.append(base_run(recipe, home / name))
        if rank:
            torch.manual_seed(seed)
            model = add_lora(load_base(recipe.model)[0], recipe.adapter)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folders[-1].adapter)
    return folders


@cache
def session() -> Session:
    return Session(runs())


@cache
def workshop() -> Workshop:
    """Trainings whose steps take milliseconds."""
    return Workshop(runs()[0].path.parent / "page", QUICK)


@contextlib.contextmanager
def served(max_waiting: int = 64, **options) -> Iterator[str]:
    """Serve the page of `runs`; yields its address. (gradio_client would ask the Hub who is calling.)"""
    votes = Ballot(runs()[0].path.parent / "votes.jsonl", session().identities)
    page = launch(runs(), session(), votes, workshop(), max_waiting=max_waiting, **options)
    try:
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            yield page.local_url
    finally:
        page.close(verbose=False)


def alone(question: Question, run: str) -> list[int]:
    """The naive twin: one request, in a batch of its own."""
    it = session()
    request = Request(
        it._prompt(question.problem, 1),
        it.adapters[run],
        seed=question.seed * 64,
        temperature=question.temperature,
        max_new_tokens=question.max_new_tokens,
    )
    (done,) = generate(it.model, [request], stop_ids=it.renderer.stop_ids, pad_id=it.renderer.pad_id)
    return done.ids


def alone_texts(question: Question) -> list[str]:
    return [session().renderer.decode(alone(question, run)) for run in session().runs]


class Forwards:
    """Counts the decoder's forward passes; raises in one, waits before one, or slows them where asked.

    `hold_at`: that pass waits for `go_on`. `pace`: seconds that each takes at least, so that whoever stops
    a stream comes before its end on any machine.
    """

    def __init__(self, fail_at=None, hold_at=None, pace=0.0):
        self.count, self.fail_at, self.hold_at, self.pace = 0, fail_at, hold_at, pace
        self.streams, self.go_on = 0, threading.Event()

    def __enter__(self):
        decoder = bare(session().model).get_decoder()  # what a generation runs, see `generate._Batch`
        self.hook = decoder.register_forward_pre_hook(self._before)
        self.watch = mock.patch.object(ui_session, "stream", self._watched)
        self.watch.start()
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.watch.stop()
        self.hook.remove()

    def _watched(self, *arguments, **options):
        """The real stream; `streams` counts those that are open."""
        self.streams += 1
        try:
            yield from generate_stream(*arguments, **options)
        finally:
            self.streams -= 1

    def _before(self, module, arguments):
        self.count += 1
        if self.count == self.fail_at:
            raise RuntimeError("a fault in the middle of a forward")
        if self.count == self.hold_at:
            assert self.go_on.wait(HANG)
        time.sleep(self.pace)


def hooks_left() -> int:
    return sum(
        len(layer.module._forward_pre_hooks) + ("forward" in layer.own)
        for layer in adapter_layers(session().model)
    )


def settle(forwards: Forwards) -> int:
    """The count of forwards once no stream is open: whoever was stopped is closed, not only waiting."""
    wait_for(lambda: not forwards.streams)
    return forwards.count


def connect(url: str, **options) -> Client:
    """A client that waits: it shares this process, and its one interpreter, with the server."""
    return Client(url, verbose=False, httpx_kwargs={"timeout": HANG}, **options)


def missing(reason: str) -> None:
    """Something the test needs is missing: skip on a developer's machine, fail in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
