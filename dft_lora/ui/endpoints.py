"""The page's three functions for gradio_client."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..tasks.judge import judge
from .events import MODEL, on_gpu, one_line_errors
from .session import MAX_REFERENCE, Question, Session, check_text


def endpoints(session: Session) -> None:
    """Register the functions. They check their own arguments, since no component does."""

    @one_line_errors
    @on_gpu
    def compare(
        problem: str,
        reference: str = "",
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Stream every run's answer: run, text, verdict (null without a reference), tokens, seconds."""
        question = Question(problem, reference, temperature, max_new_tokens, seed)
        for written in session.answers(question):
            yield [answer.as_dict() for answer in written]

    @one_line_errors
    @on_gpu
    def tokens(run: str, problem: str, text: str) -> list[dict[str, Any]]:
        """Score each token of a text under one run: probability, DFT weight, most likely alternatives."""
        check_text("problem", problem)
        check_text("text", text)
        (scored,) = session.tokens(problem, [(run, session.text_ids(text))])
        return [token.as_dict() for token in scored]

    @one_line_errors
    def score(answer: str, reference: str) -> str:
        """Judge an answer: correct, wrong, unparsable or timed_out."""
        check_text("answer", answer)
        check_text("reference", reference, MAX_REFERENCE)
        return judge(answer, reference).status

    gr.api(compare, api_name="compare", **MODEL)
    gr.api(tokens, api_name="tokens", **MODEL)
    gr.api(score, api_name="score", concurrency_id="judge", concurrency_limit=4)
