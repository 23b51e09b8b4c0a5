"""Answers sampled from a model and judged: what RFT, DPO and the online objectives learn from.

`sample_answers` asks, `correct_ones` and `pairs_of` choose, `Rollouts` serves the steps of a run. A draw
depends on (run seed, rollout, prompt, sample) alone: each request has a random stream of its own.

The answers of a rollout are a pure function of the adapter at its start. While steps still learn from them,
they belong to the checkpoint, so a run that is resumed in the middle goes on with the same ones.

Shapes: E answers of a rollout, T tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import SEEDS, RolloutConfig
from ..data.templates import Example, Renderer
from ..errors import RunError
from ..model.generate import Request, generate
from ..tasks.base import Judge, Problem, Verdict

SAMPLES = 1_000_003
"""More than the samples of a problem: seeds of different rollouts never coincide."""


@dataclass(frozen=True)
class Answer:
    """One judged answer. `example` holds the tokens as they were drawn, the end token included."""

    problem: Problem
    example: Example
    text: str
    verdict: Verdict
    reward: float
    truncated: bool


def sample_answers(
    model: Any,
    renderer: Renderer,
    judge: Judge,
    problems: Sequence[Problem],
    config: RolloutConfig,
    *,
    seed: int,
    rollout: int = 0,
    adapter: str | None = None,
) -> list[list[Answer]]:
    """`config.samples` judged answers to each problem, in order. `adapter` None asks the bare base."""
    asked = [
        (problem, tuple(renderer.prompt_ids(problem.messages)), sample)
        for problem in problems
        for sample in range(config.samples)
    ]
    requests = [
        Request(
            prompt_ids=prompt,
            adapter=adapter,
            seed=stream_seed(seed, rollout, sample),
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
        )
        for _, prompt, sample in asked
    ]
    completions = generate(
        model, requests, stop_ids=renderer.stop_ids, pad_id=renderer.pad_id, batch_rows=config.rows
    )
    texts = [renderer.decode(completion.ids) for completion in completions]
    verdicts = judge.judge_many([(text, problem) for text, (problem, _, _) in zip(texts, asked, strict=True)])
    answers = []
    for (problem, prompt, sample), completion, text, verdict in zip(
        asked, completions, texts, verdicts, strict=True
    ):
        truncated = completion.end is None
        if truncated and config.truncated == "wrong" and verdict.correct:
            verdict = Verdict("wrong", verdict.extracted)
        ids = (*prompt, *completion.ids, *([] if completion.end is None else [completion.end]))
        example = Example(f"{problem.id}/{rollout}.{sample}", ids, len(prompt))
        answers.append(Answer(problem, example, text, verdict, judge.reward(verdict), truncated))
    return [answers[i : i + config.samples] for i in range(0, len(answers), config.samples)]


def stream_seed(seed: int, rollout: int, sample: int) -> int:
    """A request's seed; with its prompt it determines the random stream. Different for all arguments."""
    return (rollout * SEEDS + seed) * SAMPLES + sample


def refuse_all_truncated(answers: Iterable[Sequence[Answer]], config: RolloutConfig, what: str) -> None:
    """Raises RunError, beginning with `what`, if no answer reached its end."""
    cut = [answer.truncated for some in answers for answer in some]
    if all(cut):
        raise RunError(
            f"{what}: all {len(cut)} answers were cut at rollouts.max_new_tokens {config.max_new_tokens}, so "
            "there is nothing to learn from; raise it"
        )


def correct_ones(answers: Sequence[Answer]) -> list[Answer]:
    """The finished, correct answers to one problem; equal texts are kept once."""
    return _each_text_once(a for a in answers if a.verdict.correct and not a.truncated)


def pairs_of(answers: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """(correct, wrong) answers to one problem, both finished; each text is in one pair at most."""
    wrong = _each_text_once(a for a in answers if not a.verdict.correct and not a.truncated)
    return list(zip(correct_ones(answers), wrong, strict=False))


def _each_text_once(answers: Iterable[Answer]) -> list[Answer]:
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.text, answer)
    return list(first.values())
