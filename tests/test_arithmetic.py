"""The embedded task: answers follow from stories, sets are disjoint and fixed, noise is as declared."""

import re
from collections import Counter
from hashlib import sha256

import pytest

from dft_lora.errors import DataError
from dft_lora.tasks import get_task
from dft_lora.tasks.arithmetic import NAMES, THINGS, Chain, base_training

TASKS = get_task("arithmetic"), get_task("arithmetic-long")
TRAIN = TASKS[0].problems("train")
TESTS = [problem for task in TASKS for problem in task.problems()]
BASE = list(base_training(3000).problems())

FOLDS = {"doubles": 2, "triples": 3, "quadruples": 4}
EQUATION = re.compile(r"(-?\d+)([-+*/])(\d+)=(-?\d+)")


def read(question: str) -> int:
    """The answer as a reader of the story finds it, sentence by sentence, without the generator's tables."""
    opening, *events, _ = question.split(". ")
    value = int(re.search(r"\d+", opening)[0])
    for event in events:
        fold = next((n for word, n in FOLDS.items() if word in event), None)
        n = fold or int(re.search(r"\d+", event)[0])
        if fold or "times as many" in event:
            value *= n
        elif re.search(r"buys|finds|brings", event):
            value += n
        elif re.search(r"gives|sells|lost", event):
            value -= n
        else:
            assert re.search(r"equally|one part in", event), event
            value, rest = divmod(value, n)
            assert rest == 0, question
        assert 2 <= value <= 99, question
    return value


def said(solution: str) -> str:
    return re.search(r"\n#### (-?\d+)$", solution)[1]


def is_true(equation: tuple[str, str, str, str]) -> bool:
    a, op, n, result = equation
    return {"+": int(a) + int(n), "-": int(a) - int(n), "*": int(a) * int(n), "/": int(a) // int(n)}[
        op
    ] == int(result)


def style(solution: str) -> str:
    first = solution.split("\n")[0]
    openings = {"We begin": "prose", "Known": "numbered"}
    known = next((name for start, name in openings.items() if first.startswith(start)), None)
    return known or ("words" if " is " in first else "running" if ", " in first else "equations")


def test_answer_is_what_the_story_says():
    for problem in TRAIN + TESTS + BASE:
        assert int(problem.answer) == read(problem.question), problem
        assert problem.tags["steps"] == problem.question.count(". ") - 1


def test_clean_demonstrations_and_references_are_right():
    for problem in TASKS[0].problems("train-clean") + TESTS:
        assert said(problem.solution) == problem.answer
        assert all(map(is_true, EQUATION.findall(problem.solution))), problem.solution


@pytest.mark.parametrize("problems", [BASE, TRAIN], ids=["base", "train"])
def test_teachers_err_in_8_percent_of_their_steps_and_carry_the_error_on(problems):
    equations = [e for problem in problems for e in EQUATION.findall(problem.solution)]
    wrong = sum(not is_true(e) for e in equations) / len(equations)
    assert 0.065 < wrong < 0.095  # 3 standard errors at some 3,000 equations
    for problem in problems:
        equations = EQUATION.findall(problem.solution)
        if style(problem.solution) == "equations":
            assert [e[3] for e in equations[:-1]] == [e[0] for e in equations[1:]]
            assert said(problem.solution) == equations[-1][3]
    ends_wrong = sum(said(problem.solution) != problem.answer for problem in problems) / len(problems)
    assert 0.10 < ends_wrong < 0.25


def test_no_problem_is_in_two_sets_even_under_other_names():
    def anonymous(question: str) -> str:
        return re.sub("|".join(NAMES + THINGS), "_", question)

    tests = [task.problems() for task in (*TASKS, get_task("arithmetic-validation"))]
    groups = [base_training(20_000).problems(), TRAIN, *tests]
    sets = [{anonymous(problem.question) for problem in group} for group in groups]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert not one & other
    assert len({problem.question for problem in TRAIN}) == len(TRAIN) == 3840
    assert len({problem.question for problem in TESTS}) == len(TESTS) == 600
    assert len({problem.id for problem in TRAIN + TESTS}) == 4440


def test_lengths_are_balanced_in_any_prefix_and_long_means_longer_than_trained():
    def lengths(problems):
        return Counter(problem.tags["steps"] for problem in problems)

    assert lengths(TRAIN) == dict.fromkeys((1, 2, 3), 1280)
    assert lengths(TASKS[0].problems()) == dict.fromkeys((1, 2, 3), 100)
    assert lengths(TASKS[1].problems()) == dict.fromkeys((4, 5), 150)
    assert lengths(TASKS[0].problems()[:30]) == dict.fromkeys((1, 2, 3), 10)
    assert min(lengths(TASKS[1].problems())) > max(lengths(TRAIN))
    base = lengths(BASE)
    assert 0 < base[4] + base[5] < 0.1 * len(BASE)


def test_every_style_is_shown_about_equally():
    shown = Counter(style(problem.solution) for problem in TRAIN if problem.tags["steps"] > 1)
    assert len(shown) == 5
    assert min(shown.values()) > 0.17 * shown.total()


def test_the_published_figures_hold_for_these_very_problems():
    """Any change to the generator changes what all published numbers were measured on."""
    digest = sha256("".join(p.question + p.solution + p.answer for p in TRAIN + TESTS).encode()).hexdigest()
    assert digest == "fa2aa8be9c19d6825c838461a580d7fd52c82d7b5c2686e01c1d74ee20d39375"


def test_generation_takes_few_draws_a_problem_and_so_needs_no_cache(monkeypatch):
    """A chain is drawn anew where its checksum is another set's (three of four) or the question was there."""
    draws, draw = [], Chain.draw
    monkeypatch.setattr(
        Chain, "draw", lambda rng, length, starts: draws.append(length) or draw(rng, length, starts)
    )
    assert TASKS[0].problems("train") == TRAIN
    assert len(draws) < 6 * len(TRAIN)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_unknown_split_is_refused_by_name(task):
    with pytest.raises(DataError, match=r"no split 'validation'.*train, train-clean, .*train-boxed, test"):
        task.problems("validation")
