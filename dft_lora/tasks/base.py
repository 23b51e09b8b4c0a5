"""Problems, attempts and tasks: what is asked, what was answered, and by which task it is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from dft_lora.tasks.judge import Verdict, judge_many


@dataclass(frozen=True)
class Problem:
    """One problem, for training, evaluation and the page alike.

    `messages` are the turns before the answer ({"role", "content"}; the last one is the user's). `solution`
    is the worked text that a model is trained on, `answer` the short reference that answers are judged by,
    and `tags` what a report may group by (level, subject, steps). `choices` are the possible answers of a
    multiple-choice problem; `answer` is then the letter of the right one. With an `ending`, a choice is
    written after the question and the ending after the choice (a sentence with a gap).
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    solution: str | None = None
    answer: str | None = None
    tags: Mapping[str, str | int] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    ending: str = ""

    @classmethod
    def ask(cls, id: str, question: str, **rest) -> Problem:
        """A problem of one user turn."""
        return cls(id, ({"role": "user", "content": question},), **rest)

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Attempt:
    """One sampled answer: a line of `evaluation/TASK.jsonl`.

    `sample` counts from 0 at the task's temperature; -1 is the greedy answer.
    `truncated`: generation ended at max_new_tokens, neither at an end token nor at the task's stop rule.
    `choice_logps`: the log-probability of each choice's text, if the answer was chosen among them.
    """

    problem: str
    sample: int
    text: str
    tokens: int
    truncated: bool
    verdict: Verdict
    choice_logps: tuple[float, ...] | None = None


class Judge:
    """Judges and rewards answers; by default it compares the final answer as mathematics."""

    def allowed(self, code: bool) -> Self:
        """This judge, ready for use; `code`: whether it may run programs that a model wrote.

        Raises RequestError if it would have to and may not.
        """
        return self

    def judge_many(self, pairs: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """The verdicts on (a model's text, its problem) pairs.

        Raises DataError for a problem without a reference answer.
        """
        return judge_many((text, problem.answer or "") for text, problem in pairs)

    def cut(self, text: str) -> str:
        """An answer up to the point where a task's stop rule ends it."""
        return text

    def reward(self, verdict: Verdict) -> float:
        """The reward of a verdict in reinforcement learning: 1 for a correct answer, else 0."""
        return float(verdict.correct)


class Task(Judge, ABC):
    """A named set of problems that judges its own answers."""

    name: str
    description: str
    max_new_tokens: int
    template: ClassVar[str | None] = None
    """The template of the published prompts, used unless evaluate.template names another; None: the run's."""
    by_likelihood: ClassVar[bool] = False
    """Whether a model answers by the choice whose text it finds most probable, without generating text."""

    votes: ClassVar[bool] = True
    """Whether a majority can be taken over its answers; programs that do the same differ as texts."""

    file: str | None = None
    """sha256 of the file that a person's own test set was read from (data/own_tasks.py)."""

    def judges(self, problem: Problem) -> bool:
        """Whether answers to the problem are sampled and judged; otherwise its solution is only scored."""
        return True

    def choose(self, logps: Sequence[float], problem: Problem) -> str:
        """The choice that the log-probabilities of all choices favour; the first of equals."""
        return problem.choices[max(range(len(logps)), key=logps.__getitem__)]

    @abstractmethod
    def problems(self, split: str = "test") -> list[Problem]:
        """The problems of a split, in a fixed order.

        Raises DataError if the split or its file does not exist, saying where to get it.
        """
