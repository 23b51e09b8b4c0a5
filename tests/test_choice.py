"""Multiple choice: rows become prompts and choices, choices are scored exactly, results join the report."""

import json
import shutil
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from dft_lora.bench import choices as bench_choices
from dft_lora.bench.table import choices_table
from dft_lora.config import load_recipe
from dft_lora.data.templates import Renderer
from dft_lora.errors import DataError, RequestError
from dft_lora.evaluation.attempts import read_attempts
from dft_lora.evaluation.base_run import base_run
from dft_lora.evaluation.choices import Texts, choice_examples, score_texts
from dft_lora.evaluation.evaluate import evaluate
from dft_lora.evaluation.report import build
from dft_lora.evaluation.task_results import TaskResults, choice_probabilities
from dft_lora.evaluation.text import report_table
from dft_lora.evaluation.tokens import score
from dft_lora.model.head import bare
from dft_lora.model.load import load_adapters, load_base, load_tokenizer
from dft_lora.runs.folder import RunFolder, read_json
from dft_lora.tasks import get_task
from dft_lora.tasks.base import Problem
from dft_lora.tasks.choice import LETTERS, chosen_place, normalised

LABELLED = {"text": ["a cat", "two dogs", "rain"], "label": ["A", "B", "C"]}
ROWS = {
    "arc-challenge": {"question": "What barks?", "choices": LABELLED, "answerKey": "B"},
    "arc-easy": {
        "question": "What barks?",
        "choices": LABELLED | {"label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "openbookqa": {"question_stem": "The sound came from", "choices": LABELLED, "answerKey": "B"},
    "commonsenseqa": {"question": "What barks?", "choices": LABELLED, "answerKey": "B"},
    "piqa": {"goal": "Open a tin.", "sol1": "Use a spoon.", "sol2": "Use an opener.", "label": 1},
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "[header] A cake [title] Take flour.",
        "ctx_b": "she",
        "endings": ["eats  it. [step] No.", "mixes it."],
        "label": "1",
    },
    "boolq": {"question": "is it wet", "passage": "Rain falls.", "answer": True},
    "winogrande": {
        "sentence": "The cup fell off the tray as _ was wet.",
        "option1": "the cup",
        "option2": "the tray",
        "answer": "2",
    },
    "siqa": {
        "context": "Al fell.",
        "question": "How is Al?",
        "answerA": "glad",
        "answerB": "hurt",
        "answerC": "tall",
        "label": "2",
    },
}
ASKED = {
    "arc-challenge": ("Question: What barks?\nAnswer:", ("a cat", "two dogs", "rain")),
    "arc-easy": ("Question: What barks?\nAnswer:", ("a cat", "two dogs", "rain")),
    "openbookqa": ("The sound came from", ("a cat", "two dogs", "rain")),
    "commonsenseqa": ("Question: What barks?\nA. a cat\nB. two dogs\nC. rain\nAnswer:", ("A", "B", "C")),
    "piqa": ("Question: Open a tin.\nAnswer:", ("Use a spoon.", "Use an opener.")),
    "hellaswag": ("Baking: A cake. Take flour. She", ("eats it. No.", "mixes it.")),
    "boolq": ("Rain falls.\nQuestion: is it wet?\nAnswer:", ("no", "yes")),
    "winogrande": ("The cup fell off the tray as", ("the cup", "the tray")),
    "siqa": ("Q: Al fell. How is Al?\nA:", ("glad", "hurt", "tall")),
}
WRITTEN = {
    "arc-challenge": "Please choose the correct answer to the question: What barks?\n\n"
    "Answer1: a cat Answer2: two dogs Answer3: rain\n\nAnswer format: answer1/answer2/answer3",
    "piqa": "Please choose the correct solution to the question: Open a tin.\n\n"
    "Solution1: Use a spoon. Solution2: Use an opener.\n\nAnswer format: solution1/solution2",
    "hellaswag": "Please choose the correct ending to complete the given sentence: "
    "Baking: A cake. Take flour. She\n\nEnding1: eats it. No. Ending2: mixes it.\n\n"
    "Answer format: ending1/ending2",
    "boolq": "Please answer the following question with true or false, question: is it wet?\n\n"
    "Answer format: true/false",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: "
    "The cup fell off the tray as _ was wet.\n\n"
    "Option1: the cup Option2: the tray\n\nAnswer format: option1/option2",
    "siqa": "Please choose the correct answer to the question: Al fell. How is Al?\n\n"
    "Answer1: glad Answer2: hurt Answer3: tall\n\nAnswer format: answer1/answer2/answer3",
}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Writes rows where a task looks for its file."""
    monkeypatch.setenv("DFT_LORA_DATA", str(tmp_path))
    (tmp_path / "eval/commonsense").mkdir(parents=True)

    def write(name: str, *content: dict) -> None:
        file = tmp_path / get_task(name).sources["test"][1]
        text = "\n".join(map(json.dumps, content)) if file.suffix == ".jsonl" else json.dumps(content)
        file.write_text(text)

    return write


@pytest.fixture
def local(monkeypatch, data_dir):
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_is_asked_as_the_harness_asks_it(rows, name):
    rows(name, ROWS[name])
    (problem,) = get_task(name).problems()
    assert (problem.question, problem.choices) == ASKED[name]
    assert (problem.answer, problem.ending) == ("B", "was wet." if name == "winogrande" else "")
    verdicts = get_task(name).judge_many([(choice, problem) for choice in problem.choices])
    assert [v.status for v in verdicts] == ["wrong", "correct", "wrong"][: len(verdicts)]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_is_asked_in_words_as_llm_adapters_does(rows, name):
    rows(name, ROWS[name])
    task = get_task(f"{name}-generative")
    (problem,) = task.problems()
    if name in WRITTEN:
        assert problem.question == WRITTEN[name]
    assert [v.status for v in task.judge_many([(problem.solution, problem), ("I do not know", problem)])] == [
        "correct",
        "unparsable",
    ]
    adapters = {
        "instruction": problem.question,
        "output": problem.solution,
        "answer": problem.solution.split()[-1],
    }
    rows(name, adapters)  # the same row as LLM-Adapters publishes it
    (again,) = task.problems()
    assert replace(again, id="") == replace(problem, id="")


@pytest.mark.parametrize(
    ("name", "size"), [("arc-challenge", 1172), ("openbookqa", 500), ("commonsenseqa", 1221)]
)
def test_the_real_files(local, name, size):
    for task in (get_task(name), get_task(f"{name}-generative")):
        problems = task.problems()
        assert len(problems) == size == len({problem.id for problem in problems})
        right = [(p.solution or p.choices[LETTERS.index(p.answer)], p) for p in problems]
        assert all(verdict.correct for verdict in task.judge_many(right))
    assert len(get_task("openbookqa-generative").problems("train")) == 4957


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answerKey": "D"}, "its answerKey 'D' is not among the labels 1, 2, 3"),
        ({"choices": {"text": ["one"], "label": ["2"]}}, "1 choices; a question has 2 to 10"),
        ({"choices": None}, "row 1 of split 'test' is not usable"),
        ({"choices": {"text": ["one", "two"], "label": ["2"]}}, "argument 2 is longer"),
    ],
)
def test_a_bad_row_is_named(rows, change, reason):
    rows("arc-easy", ROWS["arc-easy"] | change)
    with pytest.raises(DataError, match=reason):
        get_task("arc-easy").problems()
    rows(
        "arc-easy",
        {"instruction": "Which? Answer1: a Answer2: b Answer format: answer1/answer2", "answer": "x"},
    )
    with pytest.raises(DataError, match="its answer is 'x'; expected one such as 'answer2'"):
        get_task("arc-easy").problems()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("the correct answer is answer3", 2),
        ("Answer 2, since answer1 is too cold", 1),
        ("The answer is (B).", 1),
        ("the answer is C", 2),
        ("B", 1),
        ("(A) a cat", 0),
        ("I say rain, of course.", 2),
        ("two dogs", 1),
        ("a cat", 0),
        ("the correct answer is answer7", None),
        ("no idea", None),
        ("", None),
        ("train", None),
        ("A dog barks", None),
        ("The answer is A cat", 0),
        ("answer: B", 1),
        ("Answer is (J)", None),
    ],
)
def test_what_a_text_chooses(text, place):
    assert chosen_place(text, ("a cat", "two dogs", "rain")) == place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("it is water vapor", 1),
        ("it is water", 0),
        ("the correct answer is $5 a day", 2),
        ("the correct answer is Plants need light", 3),
        ("the correct answer is Rr", 5),
    ],
)
def test_a_choice_is_known_by_its_own_words(text, place):
    assert chosen_place(text, ("water", "Water vapor", "$5 a day", "Plants need light.", "rr", "Rr")) == place


# --- scores ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """base, sft and dft, as they come with the package, not evaluated."""
    out, shipped = tmp_path_factory.mktemp("runs"), files("dft_lora") / "experiments/shipped_runs"
    skip = shutil.ignore_patterns("evaluation", "steps")
    return [shutil.copytree(shipped / name, out / name, ignore=skip) for name in ("base", "sft", "dft")]


@pytest.fixture(scope="module")
def loaded(runs):
    config = RunFolder(runs[1]).recipe().model.model_copy(update={"dtype": "float32"})
    model = load_adapters(load_base(config)[0], {path.name: RunFolder(path).adapter for path in runs[1:]})
    return model, Renderer(load_tokenizer(config), "raw")


PROBLEMS = [
    Problem.ask(
        "long",
        "Question: What is left of 9 eggs, if Tom sells 4?\nAnswer:",
        choices=("5", "13 eggs", "none at all"),
    ),
    Problem.ask("letters", "A. 5\nB. 6\nAnswer:", choices=("A", "B")),
    Problem.ask("same start", "Tom has", choices=("9 eggs.", "9 eggs and 4 pens.", "4")),
    Problem.ask("gap", "Tom paid Ann because", choices=("Tom", "Ann"), ending="was in debt."),
    Problem.ask("gap first", "", choices=("Tom", "Ann"), ending="has 9 eggs."),
]


def test_scores_equal_those_of_each_text_alone(loaded):
    """Shared prefixes, padding, batches and several adapters change nothing but the cost."""
    model, renderer = loaded
    names = (None, "sft", "dft")
    sets = [Texts(choice_examples(renderer, p), name) for name in names for p in PROBLEMS]
    assert any(texts.shared < texts.examples[0].prompt_length for texts in sets)
    found = {
        i: logps
        for places, some in score_texts(model, sets, pad_id=0)
        for i, logps in zip(places, some, strict=True)
    }
    assert sorted(found) == list(range(len(sets)))
    for i, texts in enumerate(sets):
        for logp, example in zip(found[i], texts.examples, strict=True):
            alone = score(model, [example], pad_id=0, adapter=texts.adapter)
            np.testing.assert_allclose(logp, alone.logp_M.sum(), rtol=1e-5, atol=1e-4)
    assert not np.allclose(found[0], found[len(PROBLEMS)], atol=1e-3)  # the adapters differ from the base


def test_a_prompt_is_computed_once(loaded):
    model, renderer = loaded
    texts = Texts(choice_examples(renderer, PROBLEMS[0]), None)
    positions = []
    hook = (
        bare(model)
        .get_decoder()
        .register_forward_pre_hook(
            lambda _, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    )
    try:
        list(score_texts(model, [texts], pad_id=0))
    finally:
        hook.remove()
    ends = max(len(example.ids) for example in texts.examples) - texts.shared - 1
    assert positions == [texts.shared, len(texts.examples) * ends]
    assert texts.shared == texts.examples[0].prompt_length > 2 * ends


def test_no_logits_of_all_tokens(qwen_dir, local):
    """The largest tensor of a batch stays far below [scored tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(qwen_dir).eval()
    renderer = Renderer(AutoTokenizer.from_pretrained(qwen_dir), "raw")
    sets = [Texts(choice_examples(renderer, p), None) for p in get_task("arc-challenge").problems()[:40]]
    scored = sum(example.supervised for texts in sets for example in texts.examples)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (model.config.vocab_size,):
                    largest = max(largest, tensor.shape.numel() // model.config.vocab_size)
            return out

    with Watch():
        list(score_texts(model, sets, pad_id=renderer.pad_id))
    assert 0 < largest <= 512 < scored


@pytest.mark.parametrize("name", ["arc-challenge", "openbookqa", "commonsenseqa"])
def test_texts_are_tokenized_as_the_harness_does(qwen_dir, local, name):
    """Context and continuation together, split at the length of the context alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_dir)
    for problem in get_task(name).problems()[:50]:
        for choice, example in zip(
            problem.choices, choice_examples(Renderer(tokenizer, "raw"), problem), strict=True
        ):
            whole = tokenizer.encode(f"{problem.question} {choice}")
            assert list(example.ids) == whole
            assert example.prompt_length == len(tokenizer.encode(problem.question))


def test_the_two_rules():
    problem = Problem.ask("p", "?", choices=("aaaaaaaaaa", "b"), answer="A")
    assert normalised([-10.0, -4.0], problem.choices) == [-1.0, -4.0]
    assert get_task("openbookqa").choose([-10.0, -4.0], problem) == "aaaaaaaaaa"
    assert get_task("boolq").choose([-10.0, -4.0], problem) == "b"
    assert get_task("boolq").choose([-4.0, -4.0], problem) == "aaaaaaaaaa"
    np.testing.assert_allclose(choice_probabilities([np.log(0.03), np.log(0.01)]), [0.75, 0.25])


# --- evaluation ------------------------------------------------------------------------------------------


def test_results_join_the_run_folder_and_the_report(runs, local, tmp_path):
    paths = [shutil.copytree(path, tmp_path / path.name) for path in runs]
    evaluate(paths, ["arc-challenge", "commonsenseqa"], limit=12)
    folder = RunFolder(paths[2])
    file = folder.evaluation("arc-challenge")
    attempts = read_attempts(file)
    problems = get_task("arc-challenge").problems()[:12]
    assert [attempt.sample for attempt in attempts] == [-1] * 12
    for attempt in attempts:
        (problem,) = (p for p in problems if p.id == attempt.problem)
        assert (
            attempt.text == problem.choices[int(np.argmax(normalised(attempt.choice_logps, problem.choices)))]
        )
    protocol = read_json(file.with_suffix(".json"))["protocol"]
    assert (protocol["samples"], protocol["template"], protocol["max_new_tokens"]) == (0, "raw", 0)

    report = build([RunFolder(path) for path in paths])
    result = report["runs"]["dft"]["tasks"]["arc-challenge"]
    assert result["avg"] == result["greedy"] == result["choices"]["normalised"]
    assert (result["samples"], result["problems"], set(result["pass_at"])) == (1, 12, {"1"})
    letters = report["runs"]["dft"]["tasks"]["commonsenseqa"]["choices"]
    assert letters["sum"] == letters["normalised"] and 0 < letters["p_right"] < 1
    assert len(report["paired"]) == 6 and "arc-challenge" in report_table(report)

    lines = file.read_text().splitlines(keepends=True)  # interrupted after five problems, then completed
    file.write_text("".join(lines[:5]))
    with pytest.raises(RequestError, match="7 answers to 'arc-challenge' are missing"):
        TaskResults.read(folder, "arc-challenge")
    evaluate(paths, ["arc-challenge"], limit=12, changes=["temperature=0.5", "samples=3"])  # neither applies
    again = {a.problem: a for a in read_attempts(file)}
    for attempt in attempts:
        assert again[attempt.problem].text == attempt.text
        np.testing.assert_allclose(again[attempt.problem].choice_logps, attempt.choice_logps, rtol=0.02)


def test_the_generative_form_uses_the_runs_template(runs, local, tmp_path):
    path = shutil.copytree(runs[0], tmp_path / "base")
    evaluate([path], ["openbookqa-generative"], limit=2, changes=["samples=1", "max_new_tokens=4"])
    protocol = read_json(path / "evaluation/openbookqa-generative.json")["protocol"]
    assert (protocol["template"], protocol["samples"]) == (RunFolder(path).run()["template"], 1)


def test_a_named_template_is_used(runs, local, tmp_path):
    path = shutil.copytree(runs[0], tmp_path / "base")
    evaluate([path], ["openbookqa"], limit=2, changes=["template=plain"])
    assert read_json(path / "evaluation/openbookqa.json")["protocol"]["template"] == "plain"


def test_an_engine_that_cannot_score_is_refused(runs, local, tmp_path):
    path = shutil.copytree(runs[0], tmp_path / "base")
    with pytest.raises(
        RequestError, match=r"--task openbookqa: scores its choices, .* 'vllm' cannot do; use plain"
    ):
        evaluate([path], ["openbookqa"], changes=["engine=vllm"])


def test_choices_longer_than_the_models_positions_are_refused(runs, local, tmp_path, monkeypatch):
    path = shutil.copytree(runs[0], tmp_path / "base")
    monkeypatch.setattr("dft_lora.evaluation.evaluate.positions", lambda config: 20)
    with pytest.raises(
        RequestError, match=r"openbookqa, .*: prompt and choice have \d+ tokens, but .* 20 positions"
    ):
        evaluate([path], ["openbookqa"], limit=2)
    assert not (path / "evaluation").exists()


# --- against published figures ---------------------------------------------------------------------


def test_the_bench_scores_as_an_evaluation_does(rows, tmp_path):
    rows("arc-challenge", ROWS["arc-challenge"], {**ROWS["arc-challenge"], "question": "What meows?"})
    (found,) = bench_choices.measure(["tiny"], ["arc-challenge"], 2, ["nf4"])
    (row,) = found["rows"]
    folder = base_run(load_recipe("tiny_dft"), tmp_path / "base")
    evaluate([folder.path], ["arc-challenge"])
    result = TaskResults.read(folder, "arc-challenge")
    assert row["accuracy"] == {"acc": result.choices["sum"], "acc_norm": result.choices["normalised"]}
    assert (row["problems"], row["rule"], row["chance"]) == (2, "acc_norm", pytest.approx(1 / 3))


def test_the_bench_asks_commonsenseqa_with_letters_and_with_texts(rows):
    rows("commonsenseqa", ROWS["commonsenseqa"])
    ((lettered,), by_length), ((texts,), by_length_too) = (
        bench_choices.problems_of(name, 9) for name in ("commonsenseqa", "commonsenseqa-texts")
    )
    assert lettered.choices == ("A", "B", "C") and not by_length
    assert texts.choices == ("a cat", "two dogs", "rain") and by_length_too
    assert texts.question == "Question: What barks?\nAnswer:" and texts.answer == "B"
    assert bench_choices.question_of(lettered) == "What barks?"


def test_the_table_of_the_bench_gives_the_difference_from_what_was_published():
    row = {
        "base": "b",
        "quantization": "nf4",
        "set": "openbookqa",
        "problems": 100,
        "rule": "acc",
        "accuracy": {"acc": 0.3, "acc_norm": 0.5},
        "ci95": [0.2, 0.4],
        "chance": 0.25,
        "published": [0.345, "a card"],
    }
    made = {"command": "c", "date": "2026-01-01T", "commit": "x", "versions": {"torch": 1, "transformers": 1}}
    text = choices_table({"rows": [row, row | {"published": None}], "provenance": made})
    assert "| 30.0 (20.0 to 40.0) | 25 | 34.5 [1] | -4.5 (-14.5 to +5.5) |" in text and "[1] a card" in text
