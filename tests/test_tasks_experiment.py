"""`experiment tasks`, small: advice before training, every kind compared, the table of advice."""

import json
from dataclasses import replace

import pytest

from dft_lora.errors import DataError, RequestError
from dft_lora.experiments import tasks
from dft_lora.experiments.advice import Case, advice_table, cases
from dft_lora.tasks import get_task

SMALL = {
    "train.batch_size": 2,
    "train.micro_batch_size": 2,
    "train.max_steps": 1,
    "evaluate.samples": 1,
    "evaluate.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder of the files that the experiment reads: short questions in LLM-Adapters' form."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("eval", "train"):
        (folder / kind / "commonsense").mkdir(parents=True)

    def write(name: str, count: int) -> None:
        content = [
            {
                "instruction": f"Please choose the correct answer to the question: {i}?\n\n"
                "Answer1: 1 Answer2: 2\n\nAnswer format: answer1/answer2",
                "output": "the correct answer is answer1",
                "answer": "answer1",
            }
            for i in range(count)
        ]
        (folder / name).write_text(json.dumps(content))

    write("train/commonsense/openbookqa.train.json", 204)
    write("eval/commonsense/openbookqa.test.json", 3)
    write("eval/commonsense/arc-challenge.test.json", 3)
    return folder


@pytest.fixture(scope="module")
def recorded(rows, tmp_path_factory):
    """tasks.json of a small run on the embedded base, and the lines that it printed twice."""
    out = tmp_path_factory.mktemp("tasks")
    study = replace(
        tasks.commonsense_study("tiny"),
        settings={**tasks.commonsense_study("tiny").settings, **SMALL},
        rates=(1e-3,),
        problems=2,
        validation_problems=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFT_LORA_DATA", str(rows))
        patch.setattr(tasks, "STUDIES", {"tiny": lambda: study})
        first, again = (list(tasks.run(out, [0], ["tiny"])) for _ in range(2))
    assert first == again
    return json.loads((out / "tasks.json").read_text()), out


@pytest.mark.slow
def test_every_kind_is_compared_and_advice_comes_first(recorded):
    parts = recorded[0]["bases"]["tiny"]
    assert set(parts) == {"diagnosis", "rates", "objectives"}
    assert parts["diagnosis"]["date"] <= parts["rates"]["date"]
    found = parts["objectives"]["found"]
    assert list(found) == ["base", "sft", *tasks.KINDS]
    for kind, line in found.items():
        assert {"openbookqa", "arc-challenge"} <= set(line["scored"]), kind
        assert 0 <= line["other_family"]["word-problems"] <= 1
    assert found["sft"]["against_sft"]["difference"] == 0


@pytest.mark.slow
def test_the_table_has_the_advice_and_what_came_out(recorded, tmp_path):
    result, out = recorded
    found = cases(out)
    assert [case.compared for case in found] == ["plain DFT - SFT", "DFT with floor 0.1 - SFT"]
    said = result["bases"]["tiny"]["diagnosis"]["found"]
    assert all(case.favours == said["favours"] for case in found)
    assert advice_table(out).count("\n| tasks, tiny |") == 2
    assert cases(tmp_path) == []


@pytest.mark.parametrize(
    ("favours", "ci95", "verdict"),
    [
        ("dft", (0.01, 0.1), "right"),
        ("dft", (-0.1, -0.01), "wrong"),
        ("sft", (-0.1, 0.1), "open"),
        ("either", (-0.1, 0.1), "right"),
        ("either", (0.01, 0.1), "undecided"),
    ],
)
def test_advice_is_judged_by_the_interval(favours, ci95, verdict):
    assert Case("", "", "", "", 0.5, favours, sum(ci95) / 2, ci95).verdict(favours) == verdict


def test_the_present_rule_reads_the_recorded_first_token():
    lost = Case("", "", "", "", 0.4, "either", -0.2, (-0.3, -0.1), p_first=0.01)
    assert (lost.now, lost.verdict(lost.now), lost.verdict(lost.favours)) == ("sft", "right", "undecided")
    assert replace(lost, p_first=None).now == "either"


def test_the_held_out_questions_are_not_trained_on(rows, monkeypatch):
    monkeypatch.setenv("DFT_LORA_DATA", str(rows))
    task = get_task("openbookqa-validation")
    train, test = ({problem.id for problem in task.problems(split)} for split in ("train", "test"))
    assert not train & test and len(test) == 200 and len(train) == 4
    with pytest.raises(DataError, match="split"):
        task.problems("validation")


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"--only 'smollm2'.*smollm2-135m"):
        list(tasks.run(tmp_path, [0], ["smollm2"]))
