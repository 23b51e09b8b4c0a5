"""The page's session: answers in step, token probabilities, nothing left behind."""

import re
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from statistics import median

import pytest
import torch
from ui_cases import HOSTILE, PROBLEM, Forwards, alone, hooks_left, runs, session

from dft_lora.config import ModelConfig
from dft_lora.data.templates import Renderer
from dft_lora.errors import RequestError
from dft_lora.evaluation.choices import Texts, choice_examples, score_texts
from dft_lora.model.load import resolve
from dft_lora.runs.folder import RunFolder
from dft_lora.tasks.base import Problem
from dft_lora.ui.choices import choices_view
from dft_lora.ui.session import MAX_CHARACTERS, Answer, Picked, Question, Session, _judge
from dft_lora.ui.views import tokens_view

# --- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_columns_in_one_batch_match_each_run_alone(temperature):
    question = Question(PROBLEM, "19", temperature, max_new_tokens=24, seed=3)
    steps = []
    for answers in session().answers(question):
        steps.append([len(a.ids) for a in answers])
    assert [a.ids for a in answers] == [alone(question, run) for run in session().runs]
    assert all(y - x in (0, 1) for a, b in pairwise(steps) for x, y in zip(a, b, strict=True))
    assert all(a.state in ("done", "truncated") and a.verdict for a in answers)
    assert all((a.state == "truncated") == (len(a.ids) == 24) for a in answers)
    assert len({tuple(a.ids) for a in answers}) == 3, (
        "the adapters must differ for this test to mean anything"
    )


def test_samples_differ():
    *_, answers = session().answers(Question(PROBLEM, temperature=1.0, samples=4, max_new_tokens=12))
    assert len(answers) == 12
    assert len({tuple(a.ids) for a in answers if a.run == "base"}) > 1


def test_three_columns_take_the_forward_passes_of_the_longest():
    question = Question(PROBLEM, temperature=1.0, max_new_tokens=16)
    passes = []
    for columns in (["base"], ["sft"], ["dft"], ["base", "sft", "dft"]):
        with Forwards() as forwards:
            list(session().answers(question, columns))
        passes.append(forwards.count)
    *each, together = passes
    assert together == max(each)


@pytest.mark.slow
def test_three_columns_take_at_most_1_6_times_one():
    """A measurement: processor time of a step on one thread; medians, interleaved."""

    def step_times(runs_):
        took, steps = [], session().answers(Question(PROBLEM, temperature=1.0, max_new_tokens=16), runs_)
        next(steps)  # the prefill
        while True:
            started = time.thread_time()
            answers = next(steps)
            if any(answer.state == "done" for answer in answers):
                return took
            took.append(time.thread_time() - started)
            if len(took) == 14:
                return took

    one, three, threads = [], [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            one += step_times(["dft"])
            three += step_times(["base", "sft", "dft"])
    finally:
        torch.set_num_threads(threads)
    one, three = median(one), median(three)
    print(f"a step: one column {1000 * one:.1f} ms, three {1000 * three:.1f} ms, ratio {three / one:.2f}")
    assert three <= 1.6 * one


def test_closing_stops_within_one_token_and_leaves_no_hook():
    question = Question(PROBLEM, max_new_tokens=200, temperature=1.0)
    for stop_after in (1, 2, 7):
        with Forwards() as forwards:
            steps = session().answers(question)
            for _ in range(stop_after):
                next(steps)
            steps.close()
            assert forwards.count == stop_after
        assert hooks_left() == 0
    assert not session().lock.locked()


def test_two_streams_may_alternate_and_an_abandoned_one_holds_nothing():
    one, two = (
        Question(PROBLEM, max_new_tokens=12),
        Question("Tom has 9 eggs. Tom sells 4.", max_new_tokens=12),
    )
    first, second = session().answers(one), session().answers(two)
    next(session().answers(one))  # dropped in mid-stream
    for a, b in zip(first, second, strict=False):
        last = a, b
    for question, answers in zip((one, two), last, strict=True):
        for answer in answers:
            expected = alone(question, answer.run)
            assert answer.ids == expected[: len(answer.ids)]


def test_the_answer_after_a_fault_is_correct():
    question = Question(PROBLEM, max_new_tokens=16)
    *_, reference = session().answers(question)
    with Forwards(fail_at=5), pytest.raises(RuntimeError, match="fault"):
        list(session().answers(question))
    assert hooks_left() == 0 and not session().lock.locked()
    *_, again = session().answers(question)
    assert [a.ids for a in again] == [a.ids for a in reference]


def test_a_run_over_other_weights_of_the_base_is_not_shown(tmp_path):
    shutil.copytree(resolve(ModelConfig()), tmp_path / "base")
    with (tmp_path / "base" / "config.json").open("a") as file:
        file.write("\n")
    shutil.copytree(runs()[1].path, tmp_path / "sft")
    run = RunFolder(tmp_path / "sft")
    recipe = run.run()["recipe"]
    run.write_run(recipe=recipe | {"model": recipe["model"] | {"name": str(tmp_path / "base")}})
    with pytest.raises(RequestError, match="have changed since the run was made"):
        Session([run])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("problem", "x" * (MAX_CHARACTERS + 1)),
        ("problem", "\n" * 500),
        ("problem", "  "),
        ("problem", None),
        ("problem", {"a": 1}),
        ("reference", 7),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**9),
        ("max_new_tokens", 1.5),
        ("seed", -1),
        ("seed", 2**40),
        ("samples", 65),
        ("samples", True),
    ],
)
def test_a_wrong_question_is_refused_and_its_field_named(field, value):
    with pytest.raises(RequestError, match=f"^{field}"):
        Question(**{"problem": PROBLEM, field: value})


def test_a_problem_longer_than_the_models_positions_is_refused():
    with pytest.raises(RequestError, match="positions"):
        next(session().answers(Question("7 " * 3000, max_new_tokens=16)))
    with pytest.raises(RequestError, match=r"run 'sftt' is not on this page.*did you mean 'sft'"):
        next(session().answers(Question(PROBLEM), ["sftt"]))


# --- picked problems -------------------------------------------------------------------------------

CHOICE = Problem.ask("q", "Question: What barks?\nAnswer:", answer="B", choices=("a cat", "two dogs", "rain"))


def picked(task: str, original: Problem = CHOICE, **edited) -> Question:
    """A question whose problem was picked from a task; `edited` are fields that the visitor changed."""
    fields = {"problem": original.question, "reference": "B", "picked": Picked(task, original)}
    return Question(**fields | edited)


def test_a_picked_problem_is_judged_by_its_task_until_it_is_edited():
    said = [Answer("sft", 0, text=text) for text in ("the correct answer is answer2", "(A)", "42")]
    question = picked("arc-challenge-generative")
    _judge(said, question.as_problem(), question.judge)
    assert [a.verdict.status for a in said] == ["correct", "wrong", "unparsable"]
    edited = picked("arc-challenge-generative", problem="What is 40 + 2?", reference="42")
    _judge(said, edited.as_problem(), edited.judge)
    assert edited.task is None and said[2].verdict.correct


def test_a_reference_that_names_no_choice_is_refused():
    with pytest.raises(RequestError, match=r"reference: .*A, B, C"):
        picked("arc-challenge-generative", reference="D")


def test_programs_get_no_verdict_and_are_not_run():
    question = picked("humaneval", Problem.ask("p", "def f():\n"), max_new_tokens=4)
    assert question.judge is None
    *_, answers = session().answers(question)
    assert all(answer.verdict is None and answer.state != "writing" for answer in answers)


def test_choices_in_one_batch_have_the_log_probabilities_of_each_run_alone():
    together = session().choices(picked("arc-challenge"))
    assert list(together) == session().runs
    renderer = Renderer(session().renderer.tokenizer, "raw")
    for run, logps in together.items():
        texts = Texts(choice_examples(renderer, CHOICE), session().adapters[run])
        ((_, (alone_,)),) = score_texts(session().model, [texts], pad_id=renderer.pad_id)
        assert logps == pytest.approx(alone_, abs=1e-3)
    assert len({tuple(logps) for logps in together.values()}) == 3


def test_choices_that_are_too_long_are_refused():
    with pytest.raises(RequestError, match="exceed the model's"):
        long = Problem.ask("q", "7 " * 3000, answer="A", choices=("1", "2"))
        session().choices(picked("arc-challenge", long, reference="A"))


def test_the_view_marks_each_runs_answer_and_the_right_one():
    question = picked("siqa", replace(CHOICE, choices=(HOSTILE[0], HOSTILE[1], "rain")))
    view = choices_view(question, {"base": [-1.0, -2.0, -3.0], "dft": [-3.0, -1.0, -2.0]})
    rows = re.findall(r"<tr>(<td.*?)</tr>", view)
    assert ["◆" in row for row in rows] == [True, True, False]
    assert ["✓" in row for row in rows] == [False, True, False]
    assert "0.665" in rows[0] and "<script" not in view and "<img" not in view and "\n" not in view


# --- tokens ----------------------------------------------------------------------------------------


def test_token_probabilities_match_the_full_softmax():
    """The naive version: all logits of one run alone, softmax over the vocabulary."""
    it, text = session(), "12+7=19\n#### 19"
    ids = it.text_ids(text)
    prompt = it._prompt(PROBLEM, len(ids))
    scored = it.tokens(PROBLEM, [(run, ids) for run in it.runs])
    for run, tokens in zip(it.runs, scored, strict=True):
        if it.adapters[run]:
            it.model.set_adapter(run)
        with torch.no_grad():
            whole = torch.tensor([[*prompt, *ids]])
            if it.adapters[run]:
                logits = it.model(input_ids=whole).logits
            else:
                with it.model.disable_adapter():
                    logits = it.model(input_ids=whole).logits
        p_TV = logits[0, len(prompt) - 1 : -1].float().softmax(-1)
        expected = p_TV[range(len(ids)), ids]
        torch.testing.assert_close(
            torch.tensor([t.probability for t in tokens]), expected, rtol=1e-4, atol=1e-6
        )
        for token, p_V in zip(tokens, p_TV, strict=True):
            values = [value for _, value in token.top]
            torch.testing.assert_close(torch.tensor(values), p_V.topk(5).values, rtol=1e-4, atol=1e-6)
            assert token.weight == token.probability
            assert token.dft_gradient <= 0.5 and token.sft_gradient <= 2
    assert "".join(token.text for token in scored[0][:-1]) == text


def test_rows_of_different_lengths_score_as_they_do_alone():
    it = session()
    rows = [
        ("sft", it.text_ids("12+7=19\n#### 19")),
        ("dft", it.text_ids("#### 19")),
        ("base", it.text_ids("1")),
    ]
    for row, tokens in zip(rows, it.tokens(PROBLEM, rows), strict=True):
        (expected,) = it.tokens(PROBLEM, [row])
        assert [t.text for t in tokens] == [t.text for t in expected]
        assert [t.probability for t in tokens] == pytest.approx([t.probability for t in expected], rel=1e-4)


def test_a_character_of_several_tokens_stays_whole():
    it = session()
    ids = it.text_ids("naïve 🙂 x")
    pieces = it.renderer.pieces(ids)
    assert "".join(pieces[:-1]) == "naïve 🙂 x" and "\ufffd" not in "".join(pieces)


def test_the_token_view_lists_the_largest_differences_first():
    it = session()
    ids = it.text_ids("12+7=19\n#### 19")
    rows = list(zip(it.runs, it.tokens(PROBLEM, [(run, ids) for run in it.runs]), strict=True))
    view = tokens_view(it.runs, rows, ("sft", "dft"))
    differences = [abs(float(x)) for x in re.findall(r'class="number">([+-]\d\.\d{3})<', view)]
    assert len(differences) > 3 and differences == sorted(differences, reverse=True)
    assert view.count('class="strip"') == 5
