"""Summaries of many answers to one problem, or of many votes: shares with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from ..tasks.answers import tidy
from ..tasks.extraction import extract

if TYPE_CHECKING:
    from .session import Answer


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927). It lies within [0, 1] and never has width 0."""
    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Tally:
    """The samples of one run. `answers` counts the extracted answers, most frequent first."""

    run: str
    samples: int
    judged: bool
    correct: int
    right: frozenset[str]
    answers: tuple[tuple[str, int], ...]
    truncated: int

    @classmethod
    def of(cls, run: str, answers: Sequence[Answer]) -> Tally:
        found = [(a.verdict.extracted if a.verdict else extract(a.text), a) for a in answers]
        named = [(tidy(text), answer) for text, answer in found if text]
        verdicts = [answer.verdict for answer in answers if answer.verdict]
        return cls(
            run=run,
            samples=len(answers),
            judged=bool(verdicts),
            correct=sum(verdict.correct for verdict in verdicts),
            right=frozenset(name for name, answer in named if answer.verdict and answer.verdict.correct),
            answers=tuple(Counter(name for name, _ in named).most_common()),
            truncated=sum(answer.state == "truncated" for answer in answers),
        )

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.samples)

    @property
    def unparsable(self) -> int:
        """Samples in which no final answer was found."""
        return self.samples - sum(count for _, count in self.answers)

    @property
    def majority(self) -> str | None:
        """The most frequent answer, the first of them on a tie (self-consistency, arXiv 2203.11171)."""
        return self.answers[0][0] if self.answers else None
