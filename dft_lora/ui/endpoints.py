"""The three functions of the page for gradio_client."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..tasks.base import Problem
from .events import MODEL, on_gpu, told
from .session import Question, Session, check_text, verdicts_on


def endpoints(session: Session) -> None:
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
        (verdict,) = verdicts_on([(answer, Problem.ask("score", "", answer=reference))])
        return verdict.status

    gr.api(compare, api_name="compare", **MODEL)
    gr.api(tokens, api_name="tokens", **MODEL)
    gr.api(score, api_name="score", concurrency_id="judge", concurrency_limit=4)
