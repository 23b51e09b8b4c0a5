"""Own test sets: a file of rows is evaluated, compared and shown like a task that comes with the package."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import DataConfig, load_recipe
from dft_lora.data.doctor import check_rows
from dft_lora.data.own_tasks import find_task
from dft_lora.data.sources import load_problems
from dft_lora.errors import DataError, RequestError
from dft_lora.evaluation.evaluate import evaluate
from dft_lora.evaluation.report import build, write_own_report, write_report
from dft_lora.evaluation.run_set import asked_problems, renderer_of
from dft_lora.evaluation.token_table import TokenTable, tokens_file
from dft_lora.experiments.shipped import shipped_runs
from dft_lora.runs.folder import RunFolder, read_json
from dft_lora.tasks import get_task
from dft_lora.ui.results import results_view
from dft_lora.ui.tabs.picker import ProblemSets

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 2 + 3?"},
]
ROWS = [
    {"problem": "Tom has 9 eggs. Tom sells 4. How many are left?", "solution": "9-4=5", "answer": "5"},
    {"problem": "Mia has 12 apples. Mia buys 7 more. How many are there?", "answer": 19},
    {"problem": "Say hello.", "solution": "Hello there."},
    {"messages": [*CHAT, {"role": "assistant", "content": "It is 5."}]},
]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The shipped base and dft, evaluated on a mixed file and on one of texts alone."""
    home = tmp_path_factory.mktemp("own")
    folders = []
    for run in (shipped_runs()[0], shipped_runs()[2]):
        shutil.copytree(run.path, home / run.name)
        folders.append(RunFolder(home / run.name))
    files = [write(home / "mine.jsonl", ROWS), write(home / "texts.jsonl", ROWS[2:3])]
    evaluate([f.path for f in folders], files, changes=["samples=2", "max_new_tokens=24"])
    return folders


def test_only_rows_with_an_answer_are_sampled_and_judged(runs):
    for folder in runs:
        lines = [json.loads(line) for line in folder.evaluation("mine").read_text().splitlines()]
        assert {line["problem"] for line in lines} == {"row-1", "row-2"} and len(lines) == 2 * 3
        assert folder.evaluation("texts").read_text() == ""
    report = build(runs)
    for run in report["runs"].values():
        assert run["tasks"]["mine"]["problems"] == 2 and "texts" not in run["tasks"]
        assert run["texts"]["mine"]["rows"] == 3, "the row without an answer, and two turns of the assistant"
        assert run["texts"]["texts"]["rows"] == 1
    assert {e["task"] for e in report["paired"]} == {"mine"}
    assert [e["task"] for e in report["paired_texts"]] == ["mine", "texts"]


def test_rows_without_an_answer_are_counted(runs, tmp_path, caplog):
    recipe = runs[0].recipe()
    for name, rows, said in (("some", ROWS, "3 of 5"), ("none", ROWS[2:3], "1 of 1"), ("all", ROWS[:2], "")):
        file = write(tmp_path / f"{name}.jsonl", rows)
        asked_problems([file], recipe, renderer_of(runs[:1], [recipe]))
        assert (f"{said} problems have no reference answer" in caplog.text) == bool(said), name
        caplog.clear()


def test_text_metrics_are_those_of_the_rows_without_an_answer(runs):
    whole = TokenTable.load(tokens_file(runs[1], "mine"))
    said = build(runs[1:])["runs"]["dft"]["texts"]["mine"]
    free = whole.example_M > 0  # the first solution has a reference answer
    assert said["nll"] == pytest.approx(whole.nll_E[1:].mean())
    assert said["token_accuracy"] == pytest.approx(whole.top1_M[free].mean())
    assert said["mean_probability"] == pytest.approx(whole.p_M[free].mean())
    assert said["p_end"] == pytest.approx(whole.end_E[1:].mean())
    alone = build(runs[1:])["runs"]["dft"]["texts"]["texts"]
    assert alone["nll"] == pytest.approx(whole.nll_E[1], rel=1e-4), "a file's company changes no score"


def test_a_paired_difference_is_of_the_same_texts(runs):
    report = build(runs)
    for entry in report["paired_texts"]:
        base, dft = (report["runs"][run]["texts"][entry["task"]]["nll"] for run in ("base", "dft"))
        assert entry["nll_difference"] == pytest.approx(dft - base)


def test_the_files_content_belongs_to_the_protocol(runs, tmp_path):
    same = {"changes": ["samples=2", "max_new_tokens=24"]}
    path = runs[0].path.parent
    evaluate([runs[0].path], [str(path / "mine.jsonl")], **same)  # complete: loads nothing
    changed = write(tmp_path / "mine.jsonl", [ROWS[0] | {"solution": "9-4=6"}, *ROWS[1:]])
    with pytest.raises(RequestError, match=r"file: \w{8} -> \w{8}.*--overwrite"):
        evaluate([runs[0].path], [changed], **same)
    other = tmp_path / "other"
    shutil.copytree(runs[1].path, other)
    facts = read_json(other / "evaluation" / "mine.json")
    facts["protocol"]["file"] = "another"
    (other / "evaluation" / "mine.json").write_text(json.dumps(facts))
    with pytest.raises(RequestError, match="'mine' under different protocols: file"):
        build([runs[0], RunFolder(other)])


def test_the_report_of_texts_alone_is_written_and_shown(runs, tmp_path):
    report = write_report(runs, tmp_path / "report", tasks=["texts"])
    said = (tmp_path / "report/report.md").read_text()
    assert "token accuracy" in said and "accuracy.png" not in said
    assert not (tmp_path / "report/plots/accuracy.png").exists() and report["paired"] == []
    done = CliRunner().invoke(main, ["compare", *(str(run.path) for run in runs)])
    assert done.exit_code == 0 and "avg@n" in done.output and "token accuracy" in done.output


def test_the_page_shows_and_picks_own_problems(runs):
    differences = "Differences on the same problems"
    for run in runs:
        write_own_report(run)
    assert differences in results_view(runs), "of the last two runs, without a report that compares them"
    assert differences not in results_view(runs[:1])
    new = RunFolder(runs[0].path.parent / "new")
    shutil.copytree(runs[1].path, new.path, ignore=shutil.ignore_patterns("report.json", "evaluation"))
    assert differences in results_view([*runs, new]), "a run that was not evaluated yet changes nothing"
    shutil.rmtree(new.path)
    write_report(runs, runs[0].path.parent)
    view = results_view(runs)
    assert differences in view
    assert "nothing sampled" in view and "mine" in view
    sets = ProblemSets(runs)
    assert set(sets.names) == {"mine", "texts"} | set(ProblemSets([]).names)
    picked = {sets.random("mine").question for _ in range(50)}
    assert picked == {row["problem"] for row in ROWS[:3]} | {"Hi"}, (
        "the question of several turns is left out"
    )
    assert sets.problems("mine")[0].solution == "9-4=5" and sets.random("texts").answer is None


def test_columns_are_the_recipes_or_the_default_ones(tmp_path):
    data = DataConfig(prompt="{instruction}\n\n{input}", completion="output", answer="gold")
    rows = [
        {"instruction": "Add.", "input": "2 3", "output": "5", "gold": "5"},
        {"instruction": "Greet.", "input": "", "output": "Hello.", "gold": None},
        {"problem": "1 + 1?", "solution": "2", "answer": 2},
        {"messages": CHAT, "gold": "5"},
    ]
    problems = find_task(write(tmp_path / "t.jsonl", rows), data).problems()
    assert [p.question for p in problems] == ["Add.\n\n2 3", "Greet.", "1 + 1?", "What is 2 + 3?"]
    assert [p.answer for p in problems] == ["5", None, "2", "5"]
    assert [p.solution for p in problems] == ["5", "Hello.", "2", None]
    gsm8k = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
    named = DataConfig(prompt="question", completion="answer")
    (problem,) = find_task(write(tmp_path / "g.jsonl", [gsm8k]), named).problems()
    assert problem.answer == "2" and "<<" not in problem.solution
    rows = [{"question": "1 + 1?", "answer": text} for text in ("1 + 1 = 2, so it is 2.", "2")]
    problems = find_task(write(tmp_path / "h.jsonl", rows), named).problems()
    assert [(p.solution, p.answer) for p in problems] == [(rows[0]["answer"], None), ("2", "2")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "1 + 1?"}, "neither a solution ('solution') nor a reference answer ('answer')"),
        ({"problem": "1 + 1?", "answer": ["2"]}, "column 'answer' is list, not text"),
        ({"problem": "1 + 1?", "answer": True}, "column 'answer' is bool, not text"),
        ({"problem": "1 + 1?", "answer": " "}, "column 'answer' is empty"),
        ({"problem": 3, "answer": "2"}, "column 'problem' is int, not text"),
        ({"question": "1 + 1?", "answer": "2"}, "no column 'problem'"),
        ({"messages": CHAT}, "neither a solution"),
        ({"messages": "hi", "answer": "2"}, "'messages' is not a list"),
        ([1, 2], "must be an object"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, said, tmp_path):
    file = write(tmp_path / "t.jsonl", [ROWS[0], row])
    with pytest.raises(DataError) as error:
        find_task(file, DataConfig())
    assert f"{file}: 1 of 2 rows cannot be used (row 2: " in str(error.value) and said in str(error.value)


def test_a_template_that_takes_one_turn_is_refused_before_a_model_is_loaded(runs, tmp_path):
    file = write(tmp_path / "chat.jsonl", [{"messages": CHAT, "answer": "5"}])
    with pytest.raises(RequestError, match=r"chat.jsonl: row-1: template 'plain' takes one user turn"):
        evaluate([runs[0].path], [file], changes=["template=plain"])


def test_training_data_is_checked_against_an_own_test_set(tmp_path):
    asked = get_task("arithmetic").problems("train")[:3]
    rows = [{"problem": p.question.upper(), "answer": p.answer} for p in asked]
    recipe = load_recipe("tiny_dft", [f"evaluate.tasks=[{write(tmp_path / 'held-out.jsonl', rows)}]"])
    counts, findings = check_rows(load_problems(recipe.data), recipe.evaluate.tasks, recipe.data)
    assert counts["overlap_with_held-out"] == 3
    assert any(set(finding.rows) == {p.id for p in asked} for finding in findings)


def test_a_file_does_not_hide_a_task_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arithmetic").write_text("not a test set")
    assert find_task("arithmetic", DataConfig()) is get_task("arithmetic")


def test_a_table_of_chosen_examples():
    number_M = np.array([0, 0, 1, 2, 2])
    column_M = np.arange(5, dtype=np.float32)
    table = TokenTable(number_M, number_M, column_M, column_M, column_M)
    some = table.of(np.array([True, False, True]))
    assert some.example_M.tolist() == [0, 0, 1, 1] and some.logp_M.tolist() == [0, 1, 3, 4]
    assert some.top1_M is None
