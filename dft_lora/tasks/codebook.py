"""A task of new facts: made-up codes that no base can know. DFT is not designed for this case.

    question   Which code do Mia's coins have?
    solution   #### 481902

The codes are random digits, so before training each digit is guessed with a probability near 1/10: the prior
is as weak as it can be. The test asks what the training set states, so a correct answer shows that the code
was learned, not inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

from dft_lora.errors import DataError
from dft_lora.tasks.arithmetic import NAMES, THINGS
from dft_lora.tasks.base import Problem, Task

DIGITS = 6


@dataclass(frozen=True)
class Codebook(Task):
    """`facts` codes; the splits `train` and `test` are the same, on every machine."""

    name: str
    description: str
    facts: int
    max_new_tokens: int

    def problems(self, split: str = "test") -> list[Problem]:
        if split not in ("train", "test"):
            raise DataError(f"split: {self.name} has no split {split!r}; it generates train, test")
        rng = Random(self.name)
        pairs = rng.sample(list(product(NAMES, THINGS)), self.facts)
        return [self._problem(i, name, things, rng) for i, (name, things) in enumerate(pairs)]

    def _problem(self, index: int, name: str, things: str, rng: Random) -> Problem:
        code = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        question = f"Which code do {name}'s {things} have?"
        return Problem.ask(f"{self.name}/{index}", question, solution=f"#### {code}", answer=code)


TASKS = (
    Codebook("codebook", "48 made-up codes: facts that no base knows", facts=48, max_new_tokens=24),
    Codebook("codebook-validation", "48 other codes to choose settings by", facts=48, max_new_tokens=24),
)
