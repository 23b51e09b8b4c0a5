"""Word problems that a small real base half knows: one or two steps, numbers from 2 to 12.

They come from the generator of the embedded task (`arithmetic.py`). All solutions are correct and written as
equations:

    problem   Zoe starts with 4 eggs. A friend brings 11 eggs. How many eggs are there now?
    solution  4+11=15
              #### 15

A base of 135 to 270 million parameters gets 30 to 80 % of such sums right in a few-shot prompt, and less
where the numbers grow: enough to learn, enough to get wrong.
"""

from __future__ import annotations

from functools import partial

from dft_lora.tasks.arithmetic import Arithmetic, Part, equations

small = partial(Part, starts=(2, 12), styles=(equations,))

TRAIN = small("word-problems/train", lengths=(1, 2), quarters=(1, 2), size=960)
TEST = small("word-problems/test", (1, 2), quarters=(0,), size=200)
VALIDATION = small("word-problems-validation/test", (1, 2), quarters=(3,), size=120)
HARD = small("word-problems-hard/test", (3,), quarters=(0,), size=200)

TASKS = (
    Arithmetic(
        "word-problems",
        "word problems of 1 and 2 steps with numbers up to 12, for small real bases",
        {"train": TRAIN, "test": TEST},
        max_new_tokens=48,
    ),
    Arithmetic(
        "word-problems-hard",
        "word problems of 3 steps, more than the fine-tuning set has",
        {"train": TRAIN, "test": HARD},
        max_new_tokens=64,
    ),
    Arithmetic(
        "word-problems-validation",
        "word problems of 1 and 2 steps to choose settings by",
        {"train": TRAIN, "test": VALIDATION},
        max_new_tokens=48,
    ),
)
