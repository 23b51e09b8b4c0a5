"""The embedded task: word problems of a few steps, generated on demand, with worked solutions.

A problem is a chain: a start and k operations on it, whose values stay whole numbers from 2 to 99. The chain
is told as a story (who, what, one sentence per operation) and solved in one of five styles, always ending in
`#### x`.

    story     Mia has 12 apples. Mia buys 7 more. The collection doubles. How many apples are there now?
    solution  12+7=19
              19*2=38
              #### 38

All sets come from one generator. The checksum of a chain decides which sets it may appear in, so no test
chain is ever trained on under other names:

    set                      steps           size    wrong steps
    base's own training      1 to 3, few 4 5 any     8 %: the base is meant to be noisy
    fine-tuning ("train")    1 to 3          3840    8 %, as in the base's own training
    the same, "train-clean"  1 to 3          3840    none
    the same, "train-boxed"  1 to 3          3840    8 %, with an ending that the base has never seen
    arithmetic, test         1 to 3          300     -
    arithmetic-long, test    4 and 5         300     -
    arithmetic-validation    1 to 3          120     -   (for choosing settings, so that no test set is used)

Sets are the same on every machine: `random.Random` of a string, and integers only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice
from random import Random
from zlib import crc32

from dft_lora.errors import DataError
from dft_lora.tasks.base import Problem, Task

LARGEST = 99  # and operands to 12: a million parameters can learn this arithmetic in minutes
APPLY: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}

NAMES = ("Mia", "Tom", "Ana", "Ben", "Lena", "Omar", "Ruth", "Ivan", "Zoe", "Paul", "Nina", "Kofi")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "pens", "beads", "eggs", "stones")
FOLDS = {2: "doubles", 3: "triples", 4: "quadruples"}

OPENINGS = (
    "{name} has {n} {things}.",
    "{name} starts with {n} {things}.",
    "There are {n} {things} in {name}'s box.",
)
EVENTS = {
    "+": ("{name} buys {n} more.", "{name} finds {n} {things}.", "A friend brings {n} {things}."),
    "-": ("{name} gives {n} away.", "{name} sells {n} {things}.", "{n} of the {things} are lost."),
    "*": ("The collection {folds}.", "Soon there are {n} times as many.", "The number of {things} {folds}."),
    "/": (
        "They are split equally into {n} bags and {name} keeps one bag.",
        "{name} shares them equally among {n} people and keeps one share.",
        "Only one part in {n} is left.",
    ),
}
ENDINGS = (
    "How many {things} are there now?",
    "How many {things} does {name} have at the end?",
    "How many are left?",
)

CLAUSES = {
    "+": ("Adding {n} gives", "With {n} more there are"),
    "-": ("Taking {n} away leaves", "Without {n} of them there are"),
    "*": ("Having {n} times as many makes", "The collection {folds} to"),
    "/": ("One of {n} equal parts is", "Dividing by {n} leaves"),
}
IN_WORDS = {
    "+": "{n} more than {a} is",
    "-": "{n} less than {a} is",
    "*": "{n} times {a} is",
    "/": "{a} divided by {n} is",
}


@dataclass(frozen=True)
class Chain:
    """A start and the operations on it: everything that determines the answer."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, rng: Random, length: int, starts: tuple[int, int]) -> Chain:
        value = start = rng.randint(*starts)
        steps = []
        for _ in range(length):
            op, operands = rng.choice([(op, ns) for op, ns in _operands(value).items() if ns])
            n = rng.choice(operands)
            steps.append((op, n))
            value = APPLY[op](value, n)
        return cls(start, tuple(steps))

    @property
    def quarter(self) -> int:
        """0 to 3, by checksum: which sets this chain may appear in."""
        return crc32(repr((self.start, self.steps)).encode()) % 4

    def work(self, rng: Random | None = None, wrong: float = 0.0) -> list[Line]:
        """The worked lines; each result is wrong with probability `wrong`, and later lines build on it."""
        lines, value = [], self.start
        for op, n in self.steps:
            result = APPLY[op](value, n)
            if wrong and rng.random() < wrong:
                result = abs(result + rng.choice((-10, -2, -1, 1, 2, 10)))
            lines.append(Line(value, op, n, result))
            value = result
        return lines


@dataclass(frozen=True)
class Line:
    """One worked step, `a op n = result`."""

    a: int
    op: str
    n: int
    result: int

    def __str__(self) -> str:
        return f"{self.a}{self.op}{self.n}={self.result}"

    def fill(self, template: str) -> str:
        return template.format(a=self.a, n=self.n, folds=FOLDS.get(self.n))


def _operands(value: int) -> dict[str, list[int]]:
    """For each operation, the operands that keep the value whole and in 2..LARGEST."""
    return {
        "+": list(range(2, min(12, LARGEST - value) + 1)),
        "-": list(range(2, min(12, value - 2) + 1)),
        "*": [n for n in FOLDS if value * n <= LARGEST],
        "/": [n for n in range(2, 7) if value % n == 0 and value // n >= 2],
    }


Style = Callable[[Random, list[Line], str], str]
"""(randomness, worked lines, the things counted) -> the text of a solution."""


def equations(rng: Random, lines: list[Line], things: str) -> str:
    return "\n".join(map(str, lines))


def _running(rng: Random, lines: list[Line], things: str) -> str:
    return f"{lines[0].a}" + ", ".join(f"{line.op}{line.n}={line.result}" for line in lines)


def _prose(rng: Random, lines: list[Line], things: str) -> str:
    said = [f"{line.fill(rng.choice(CLAUSES[line.op]))} {line}." for line in lines]
    return " ".join([f"We begin with {lines[0].a} {things}.", *said])


def _numbered(rng: Random, lines: list[Line], things: str) -> str:
    known = ", then ".join([f"Known: {lines[0].a} {things}", *(f"{line.op}{line.n}" for line in lines)])
    steps = [f"Step {i}: {line}" for i, line in enumerate(lines, 1)]
    return "\n".join([f"{known}.", *steps, f"So the answer is {lines[-1].result} {things}."])


def _words(rng: Random, lines: list[Line], things: str) -> str:
    return " ".join(f"{line.fill(IN_WORDS[line.op])} {line.result}." for line in lines)


STYLES: tuple[Style, ...] = (equations, _running, _prose, _numbered, _words)


@dataclass(frozen=True)
class Part:
    """A set of problems: lengths in rotation (so that any prefix is balanced), quarters of the chains, size.

    It contains no chain of the sets in `apart`. `wrong`: the share of wrong steps. `starts`: the smallest and
    the largest first number. `styles`, `ending`: how solutions are written.
    """

    label: str
    lengths: tuple[int, ...]
    quarters: tuple[int, ...]
    size: int
    wrong: float = 0.0
    apart: tuple[Part, ...] = ()
    starts: tuple[int, int] = (3, 40)
    styles: tuple[Style, ...] = STYLES
    ending: str = "\n#### {answer}"

    def problems(self) -> Iterator[Problem]:
        """`size` different questions; every call gives the same ones in the same order."""
        return (problem for _, problem in self._drawn())

    def chains(self) -> set[Chain]:
        return {chain for chain, _ in self._drawn()}

    @lru_cache(8)  # noqa: B019  a part is a constant, and is asked for by every run of a process
    def _drawn(self) -> tuple[tuple[Chain, Problem], ...]:
        rng, taken = Random(self.label), set().union(*(part.chains() for part in self.apart))
        return tuple(islice(self._stream(rng, taken), self.size))

    def _stream(self, rng: Random, taken: set[Chain]) -> Iterator[tuple[Chain, Problem]]:
        seen: set[str] = set()
        for length in cycle(self.lengths):
            chain, problem = self._draw(rng, length, len(seen), taken)
            while problem.question in seen:
                chain, problem = self._draw(rng, length, len(seen), taken)
            seen.add(problem.question)
            yield chain, problem

    def _draw(self, rng: Random, length: int, index: int, taken: set[Chain]) -> tuple[Chain, Problem]:
        chain = Chain.draw(rng, length, self.starts)
        while chain.quarter not in self.quarters or chain in taken:
            chain = Chain.draw(rng, length, self.starts)
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        told = [rng.choice(OPENINGS).format(name=name, n=chain.start, things=things)]
        for op, n in chain.steps:
            event = rng.choice(EVENTS[op])
            told.append(event.format(name=name, n=n, things=things, folds=FOLDS.get(n)))
        told.append(rng.choice(ENDINGS).format(name=name, things=things))
        lines = chain.work(rng, self.wrong)
        solution = rng.choice(self.styles)(rng, lines, things)
        return chain, Problem.ask(
            f"{self.label}/{index}",
            " ".join(told),
            solution=solution + self.ending.format(answer=lines[-1].result),
            answer=str(chain.work()[-1].result),
            tags={"steps": length},
        )


@dataclass(frozen=True)
class Arithmetic(Task):
    """A task whose splits are generated."""

    name: str
    description: str
    splits: Mapping[str, Part]
    max_new_tokens: int

    def problems(self, split: str = "test") -> list[Problem]:
        if split not in self.splits:
            raise DataError(
                f"split: {self.name} has no split {split!r}; it generates {', '.join(self.splits)}"
            )
        return list(self.splits[split].problems())


def base_training(size: int, seed: int = 0) -> Part:
    """The training set of the embedded base: mostly short, a few long, 8 % of the steps wrong."""
    return Part(f"base-{seed}", lengths=(1, 2, 3) * 8 + (4, 5), quarters=(2, 3), size=size, wrong=0.08)


FINE_TUNING = Part("arithmetic/train", lengths=(1, 2, 3), quarters=(1,), size=3840, wrong=0.08)
TEST = Part("arithmetic/test", (1, 2, 3), quarters=(0,), size=300)
VALIDATION = Part("arithmetic-validation/test", (1, 2, 3), quarters=(0,), size=120, apart=(TEST,))
TRAIN = {
    "train": FINE_TUNING,
    "train-clean": replace(FINE_TUNING, wrong=0.0),
    "train-noisy": replace(FINE_TUNING, wrong=0.25),
    "train-boxed": replace(FINE_TUNING, ending="\nAnswer: \\boxed{{{answer}}} End of solution."),
}

TASKS = (
    Arithmetic(
        "arithmetic",
        "word problems of 1 to 3 steps, as many as the fine-tuning set has",
        {**TRAIN, "test": TEST},
        max_new_tokens=96,
    ),
    Arithmetic(
        "arithmetic-long",
        "word problems of 4 and 5 steps, more than the fine-tuning set has",
        {**TRAIN, "test": Part("arithmetic-long/test", (4, 5), quarters=(0,), size=300)},
        max_new_tokens=160,
    ),
    Arithmetic(
        "arithmetic-validation",
        "word problems of 1 to 3 steps to choose settings by",
        {**TRAIN, "test": VALIDATION},
        max_new_tokens=96,
    ),
)
