"""Multiple choice: nine commonsense benchmarks, each scored by log-likelihood and answered in words.

    arc-challenge               the model's choice is the one whose text it finds most probable
    arc-challenge-generative    the model writes "the correct answer is answer3"

The scored form follows lm-evaluation-harness, without examples in the prompt: its prompts, one space before a
choice, log-probabilities summed over a choice's tokens (its `acc`), or that sum divided by the length of the
choice in characters (`acc_norm`). The verdict goes by the rule in which each benchmark is usually reported;
reports give both. The generative form follows LLM-Adapters (Hu et al. 2023, arXiv 2304.01933), on whose
collection LoRA papers report, and it is the form to train on.

A row has the fields of the Hub's dataset or those of LLM-Adapters' files. To add a benchmark, write a
function from the Hub's row to a `Question` and one entry in `_KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from dft_lora.tasks.base import Problem
from dft_lora.tasks.benchmarks import Benchmark, Row
from dft_lora.tasks.judge import Verdict

LETTERS = "ABCDEFGHIJ"
_LISTED = re.compile(r"\b(?:Answer|Solution|Ending|Option)(\d+):", re.I)
_NAMED = re.compile(r"\b(?:answer|solution|ending|option) ?(\d)\b", re.I)


@dataclass(frozen=True)
class Question:
    """A row, whatever its fields: what is asked, the possible answers, the place of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int
    context: str = ""
    ending: str = ""

    def __post_init__(self):
        if not 2 <= len(self.choices) <= len(LETTERS):
            raise ValueError(f"{len(self.choices)} choices; a question has 2 to {len(LETTERS)}")
        if not 0 <= self.right < len(self.choices):
            raise ValueError(f"the right answer is number {self.right + 1} of {len(self.choices)}")


def normalised(logps: Sequence[float], choices: Sequence[str]) -> list[float]:
    """Log-probabilities per character of the choices' texts, as the harness's `acc_norm` compares them."""
    return [logp / max(len(choice), 1) for logp, choice in zip(logps, choices, strict=True)]


def chosen_place(text: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that a text names: by its own text, as `answer3`, or as `(C)`; None if none.

    Of several mentions the first counts, as in LLM-Adapters' script; a choice's last full stop does not.
    """
    said = text.strip()
    if said in choices:
        return choices.index(said)
    if named := _NAMED.search(said):
        place = int(named[1]) - 1
    elif letter := _letter(len(choices)).search(said):
        place = LETTERS.index(next(filter(None, letter.groups())))
    else:
        return _in_its_words(said, choices)
    return place if 0 <= place < len(choices) else None


def _in_its_words(said: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that is written out first; between `Rr` and `rr` the case decides."""
    known = [choice.rstrip(".") or choice for choice in choices]
    longest_first = sorted(known, key=len, reverse=True)  # "water vapor" is not "water"
    written = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", said, re.I)
    if not written:
        return None
    if written[0] in known:
        return known.index(written[0])
    same = (place for place, one in enumerate(known) if one.lower() == written[0].lower())
    return next(same, None)


@cache
def _letter(choices: int) -> re.Pattern[str]:
    """`answer is (C)`, `(C)` anywhere, or a text that begins with `C.` or is `C`."""
    one = f"([A-{LETTERS[choices - 1]}])"
    return re.compile(rf"\banswer\s*(?:is|:)?\s*\(?{one}(?=[).:,]|\s*$)|\({one}\)|^\W*{one}(?=[).:]|\s*$)")


@dataclass(frozen=True)
class Choice(Benchmark):
    """A multiple-choice benchmark in one of its two forms.

    `normalise`: whether the verdict goes by `normalised` log-probabilities instead of their plain sums.
    """

    template: ClassVar[str | None] = "raw"
    by_likelihood: ClassVar[bool] = True
    normalise: bool = False

    def choose(self, logps: Sequence[float], problem: Problem) -> str:
        return super().choose(normalised(logps, problem.choices) if self.normalise else logps, problem)

    def judge_many(self, pairs: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """Verdicts on texts that name a choice; `extracted` is the choice's letter."""
        return [_verdict(text, problem) for text, problem in pairs]


class Written(Choice):
    """The generative form, asked with the run's own template."""

    template: ClassVar[str | None] = None
    by_likelihood: ClassVar[bool] = False


@dataclass(frozen=True)
class HeldOut(Written):
    """A training set of which the last `held_out` questions are kept apart, to choose settings by.

    `train` is the rest, `test` the questions kept apart; a benchmark's own test set stays untouched.
    """

    held_out: int = 200

    def problems(self, split: str = "test") -> list[Problem]:
        if split not in ("train", "test"):
            return super().problems(split)
        every = super().problems("train")
        return every[: -self.held_out] if split == "train" else every[-self.held_out :]


def _verdict(text: str, problem: Problem) -> Verdict:
    place = chosen_place(text, problem.choices)
    if place is None:
        return Verdict("unparsable", None)
    right = problem.choices[LETTERS.index(problem.answer or "")]
    return Verdict("correct" if problem.choices[place] == right else "wrong", LETTERS[place])


# --- rows ------------------------------------------------------------------------------------------------


def _adapters(row: Row) -> Question:
    """A row of LLM-Adapters: the question and its listed answers in one text."""
    asked = row["instruction"].rpartition("Answer format:")[0]
    marks = list(_LISTED.finditer(asked))
    text = asked[: marks[0].start()] if marks else asked
    text = re.sub(r"^Please [^:]*: ", "", text).strip()
    if not marks:  # BoolQ, whose passage is not shown
        return Question(text.rstrip("?"), ("no", "yes"), ["false", "true"].index(row["answer"]))
    ends = [*(mark.start() for mark in marks[1:]), len(asked)]
    choices = tuple(asked[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True))
    number = re.search(r"\d+", row["answer"])
    if number is None:
        raise ValueError(f"its answer is {row['answer']!r}; expected one such as 'answer2'")
    return Question(text, choices, int(number[0]) - 1)


def _labelled(row: Row, text: str) -> Question:
    """A question whose choices have labels: ARC, OpenBookQA, CommonsenseQA."""
    choices: Any = row["choices"]
    if isinstance(choices, Mapping):
        choices = [
            {"label": label, "text": text}
            for label, text in zip(choices["label"], choices["text"], strict=True)
        ]
    labels = [choice["label"] for choice in choices]
    if (key := row["answerKey"].strip()) not in labels:
        raise ValueError(f"its answerKey {key!r} is not among the labels {', '.join(labels)}")
    return Question(text, tuple(choice["text"] for choice in choices), labels.index(key))


def _arc(row: Row) -> Question:
    return _labelled(row, row["question"])


def _openbook(row: Row) -> Question:
    return _labelled(row, row["question_stem"])


def _commonsense(row: Row) -> Question:
    """The Hub's fields, or the original file's, where the question is a record of its own."""
    if isinstance(question := row["question"], Mapping):
        return _labelled({**question, "answerKey": row["answerKey"]}, question["stem"])
    return _labelled(row, question)


def _piqa(row: Row) -> Question:
    return Question(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _hellaswag(row: Row) -> Question:
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(_tidy(text), tuple(map(_tidy, row["endings"])), int(row["label"]))


def _tidy(text: str) -> str:
    """HellaSwag's texts without the marks of the pages that they come from."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(row: Row) -> Question:
    right = row["answer"] if "answer" in row else row["label"]
    return Question(row["question"], ("no", "yes"), int(right), context=row["passage"])


def _winogrande(row: Row) -> Question:
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("its sentence has no gap '_'")
    options = row["option1"], row["option2"]
    return Question(before.rstrip(), options, int(row["answer"]) - 1, ending=after.strip())


def _siqa(row: Row) -> Question:
    choices = row["answerA"], row["answerB"], row["answerC"]
    return Question(row["question"], choices, int(row["label"]) - 1, context=row["context"])


# --- prompts ---------------------------------------------------------------------------------------------


def _ask(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _ask_bare(question: Question) -> str:
    return question.text


def _ask_letters(question: Question) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([f"Question: {question.text.strip()}", *lines, "Answer:"])


def _ask_passage(question: Question) -> str:
    if not question.context:
        raise ValueError("it has no passage, which the scored form shows; use the Hub's rows")
    return f"{question.context}\nQuestion: {question.text}?\nAnswer:"


def _ask_social(question: Question) -> str:
    return f"Q: {question.context} {question.text}\nA:"


@dataclass(frozen=True)
class _Kind:
    """One benchmark: where it is, how it is read and asked, and what LLM-Adapters calls a choice."""

    title: str
    hub: str
    subset: str | None
    test: str
    read: Callable[[Row], Question]
    prompt: Callable[[Question], str]
    normalise: bool = False
    letters: bool = False
    word: str = "answer"
    file: str | None = None

    def question(self, row: Row) -> Question:
        return _adapters(row) if "instruction" in row else self.read(row)

    def scored(self, id: str, row: Row) -> Problem:
        question = self.question(row)
        choices = tuple(LETTERS[: len(question.choices)]) if self.letters else question.choices
        answer = LETTERS[question.right]
        return Problem.ask(id, self.prompt(question), answer=answer, choices=choices, ending=question.ending)

    def written(self, id: str, row: Row) -> Problem:
        """LLM-Adapters' wording. It asks BoolQ's questions without their passage, by true and false."""
        question, word = self.question(row), self.word
        gap = f" _ {question.ending}" if question.ending else ""
        text = f"{question.context} {question.text}{gap}".strip()
        if word == "true":
            names, shown = ["false", "true"], "true/false"
            asked = f"Please answer the following question with true or false, question: {question.text}?"
        else:
            names = [f"{word}{i}" for i in range(1, len(question.choices) + 1)]
            shown = "/".join(names)
            what = {
                "ending": "ending to complete the given sentence",
                "option": "answer to fill in the blank to complete the given sentence",
            }.get(word, f"{word} to the question")
            listed = [f"{n.capitalize()}: {c}" for n, c in zip(names, question.choices, strict=True)]
            asked = f"Please choose the correct {what}: {text}\n\n{' '.join(listed)}"
        return Problem.ask(
            id,
            f"{asked}\n\nAnswer format: {shown}",
            solution=f"the correct answer is {names[question.right]}",
            answer=LETTERS[question.right],
            choices=tuple(names) if word == "true" else question.choices,
        )

    def tasks(self, name: str) -> tuple[Choice, Choice]:
        file = self.file or f"eval/commonsense/{name}.test.json"
        sources = {"test": (self.test, file), "train": ("train", f"train/commonsense/{name}.train.json")}
        where = {"hub": self.hub, "sources": sources, "subset": self.subset, "normalise": self.normalise}
        return (
            Choice(name, f"{self.title}, scored by log-likelihood", problem=self.scored, **where),
            Written(
                f"{name}-generative",
                f"{self.title}, answered in words",
                problem=self.written,
                max_new_tokens=32,
                **where,
            ),
        )


_KINDS = {
    "arc-challenge": _Kind(
        "ARC-Challenge, 1,172 science questions", "allenai/ai2_arc", "ARC-Challenge", "test", _arc, _ask, True
    ),
    "arc-easy": _Kind(
        "ARC-Easy, 2,376 science questions", "allenai/ai2_arc", "ARC-Easy", "test", _arc, _ask, True
    ),
    "openbookqa": _Kind(
        "OpenBookQA, 500 science questions", "allenai/openbookqa", "main", "test", _openbook, _ask_bare, True
    ),
    "commonsenseqa": _Kind(
        "CommonsenseQA, 1,221 questions with lettered choices",
        "tau/commonsense_qa",
        None,
        "validation",
        _commonsense,
        _ask_letters,
        letters=True,
        file="eval/commonsense/commonsenseqa.dev.jsonl",
    ),
    "piqa": _Kind(
        "PIQA, 1,838 everyday tasks",
        "baber/piqa",
        None,
        "validation",
        _piqa,
        _ask,
        True,
        word="solution",
    ),
    "hellaswag": _Kind(
        "HellaSwag, 10,042 unfinished stories",
        "Rowan/hellaswag",
        None,
        "validation",
        _hellaswag,
        _ask_bare,
        True,
        word="ending",
    ),
    "boolq": _Kind(
        "BoolQ, 3,270 yes-no questions on a passage",
        "google/boolq",
        None,
        "validation",
        _boolq,
        _ask_passage,
        word="true",
    ),
    "winogrande": _Kind(
        "WinoGrande, 1,267 sentences with a gap",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        _winogrande,
        _ask_bare,
        word="option",
    ),
    "siqa": _Kind("SIQA, 1,954 social situations", "lighteval/siqa", None, "validation", _siqa, _ask_social),
}

_OPENBOOK = _KINDS["openbookqa"].tasks("openbookqa")[1]
TASKS = (
    *(task for name, kind in _KINDS.items() for task in kind.tasks(name)),
    HeldOut(
        "openbookqa-validation",
        "OpenBookQA's training questions in words, 200 of them held out to choose settings by",
        _OPENBOOK.hub,
        _OPENBOOK.sources,
        _OPENBOOK.problem,
        _OPENBOOK.subset,
        _OPENBOOK.max_new_tokens,
    ),
)
