"""The report: what it says follows from the answers on disk, and what cannot be compared is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from evidence_runs import answered
from patience import HANG

from dft_lora.errors import RequestError
from dft_lora.evaluation import statistics as st
from dft_lora.evaluation.report import build, write_report
from dft_lora.evaluation.task_results import _vote
from dft_lora.evaluation.text import report_table
from dft_lora.tasks.base import Attempt
from dft_lora.tasks.judge import Verdict

RNG = np.random.default_rng(0)


def test_what_reads_recorded_results_does_not_import_torch():
    code = """
import sys, importlib
for name in ("evaluation.report", "evaluation.text", "ui.results", "ui.votes"):
    importlib.import_module(f"dft_lora.{name}")
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def draws(chance: float, problems: int = 40, samples: int = 4) -> list[list[int]]:
    return RNG.binomial(1, chance, (problems, samples + 1)).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    chances = {"base": 0.3, "sft": 0.35, "dft": 0.9}
    return [answered(out / name, draws(chance)) for name, chance in chances.items()]


@pytest.fixture(scope="module")
def report(folders):
    return build(folders)


def test_figures_are_those_of_the_answers(folders, report):
    for folder in folders:
        lines = [json.loads(line) for line in folder.evaluation("arithmetic").read_text().splitlines()]
        right_PS = np.array([line["verdict"] == "correct" for line in lines]).reshape(40, 5)
        figures = report["runs"][folder.name]["tasks"]["arithmetic"]
        assert figures["avg"] == pytest.approx(right_PS[:, 1:].mean())
        assert figures["greedy"] == pytest.approx(right_PS[:, 0].mean())
        assert figures["ci95"][0] < figures["avg"] < figures["ci95"][1]
        assert figures["pass_at"]["4"] == pytest.approx(right_PS[:, 1:].any(1).mean())
        assert (figures["samples"], figures["problems"]) == (4, 40)


def test_majority_takes_equal_answers_together(report):
    """Two kinds of answer, 7 and 8: the majority is right where most samples are, half where they tie."""
    figures = report["runs"]["dft"]["tasks"]["arithmetic"]
    assert figures["maj_at"]["1"] == pytest.approx(figures["pass_at"]["1"], abs=0.2)
    assert figures["maj_at"]["4"] > figures["avg"]


def test_promised_shape(report):
    wanted = {"avg", "ci95", "greedy", "samples", "problems", "truncated", "unparsable"}
    assert all(wanted <= set(t) for run in report["runs"].values() for t in run["tasks"].values())
    assert all({"a", "b", "task", "difference", "ci95", "p_value"} <= set(e) for e in report["paired"])
    assert [(e["a"], e["b"]) for e in report["paired"]] == [("base", "sft"), ("base", "dft"), ("sft", "dft")]
    json.dumps(report)


def test_equal_wrong_answers_vote_together():
    votes = [
        _vote(Attempt("p", 0, "", 1, False, Verdict(status, said)), {"answer": "5"})
        for status, said in [("wrong", "7"), ("wrong", "$7$"), ("wrong", "7."), ("correct", "5.0")]
    ]
    assert votes == ["7", "7", "7", "5"]
    assert _vote(Attempt("p", 0, "", 1, False, Verdict("unparsable", None)), {"answer": "5"}) is None


def test_small_differences_are_called_noise_and_holm_only_raises(report):
    said = {(e["a"], e["b"]): e for e in report["paired"]}
    assert said["base", "sft"]["noise"] and not said["sft", "dft"]["noise"]
    for entry in report["paired"]:
        assert entry["noise"] == (entry["ci95"][0] <= 0 <= entry["ci95"][1])
        assert entry["p_value"] <= entry["p_holm"] <= 1
    adjusted = st.holm([entry["p_value"] for entry in report["paired"]])
    assert [entry["p_holm"] for entry in report["paired"]] == pytest.approx(adjusted.tolist())
    assert "noise" in report_table(report)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.6}, "temperature"),
        ({"max_new_tokens": 48}, "max_new_tokens 96 and 48"),
        ({"template": "plain", "template_hash": "u"}, "template 'chat' and 'plain'"),
        ({"template_hash": "u"}, "different token ids"),
        ({"engine": "vllm"}, "engine 'plain' and 'vllm'"),
        ({"shots": 4}, "shots 0 and 4"),
        ({"stop": ["Q:"]}, r"stop \[\] and \['Q:'\]"),
        ({"problems_hash": "x"}, "different texts or answers"),
    ],
)
def test_other_protocols_are_refused_with_the_difference(folders, tmp_path, change, said):
    other = answered(tmp_path / "other", draws(0.5), **change)
    with pytest.raises(RequestError, match=said):
        build([folders[0], other])


def test_a_protocol_field_may_differ_where_that_is_the_question(folders, tmp_path):
    other = answered(tmp_path / "other", draws(0.5), temperature=0.6)
    assert build([folders[0], other], free={"temperature"})["paired"]


def test_other_problems_are_refused_by_number(folders, tmp_path):
    with pytest.raises(RequestError, match="10 of 40 and 0 of 30 problems differ"):
        build([folders[0], answered(tmp_path / "fewer", draws(0.5, problems=30))])


def test_no_task_in_common_is_refused(folders, tmp_path):
    with pytest.raises(RequestError, match="no task in common"):
        build([folders[0], answered(tmp_path / "other", draws(0.5), task="arithmetic-long")])


def test_missing_answers_are_counted_not_ignored(tmp_path):
    folder = answered(tmp_path / "run", draws(0.5))
    file = folder.evaluation("arithmetic")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-7]))
    with pytest.raises(RequestError, match="7 answers"):
        build([folder])


def test_files_of_a_report(folders, tmp_path):
    """Pictures hold ink, and LLM Comparator's files what its page reads."""
    from matplotlib.image import imread

    write_report(folders, tmp_path, comparator=True)
    for picture in (tmp_path / "plots").glob("*.png"):
        assert imread(picture)[..., :3].std() > 0.05
    opened = json.loads((tmp_path / "llm-comparator" / "sft-dft-arithmetic.json").read_text())
    assert [model["name"] for model in opened["models"]] == ["sft", "dft"]
    assert len(opened["examples"]) == 40
    for example in opened["examples"]:
        right = example["output_text_a"] == "#### 7", example["output_text_b"] == "#### 7"
        assert example["score"] == right[0] - right[1] and example["custom_fields"]["correct"] == [*right]
        assert example["input_text"].startswith("What is problem-")
    assert "## Sharpening" in (tmp_path / "report.md").read_text()


def test_the_report_says_when_another_template_asked_the_questions(tmp_path):
    same = build([answered(tmp_path / "same", [[1, 1], [0, 1]])])
    other = build([answered(tmp_path / "other", [[1, 1], [0, 1]], template="plain")])
    assert "as trained" not in report_table(same)
    assert "other answered arithmetic with template 'plain', not with 'chat' as trained" in report_table(
        other
    )


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8])
def test_any_number_of_samples_is_written(tmp_path, samples):
    runs = [answered(tmp_path / name, [[1] * (samples + 1), [0] * (samples + 1)]) for name in ("a", "b")]
    report = write_report(runs, tmp_path / "out")
    assert list(report["runs"]["a"]["tasks"]["arithmetic"]["pass_at"])[-1] == str(samples)
    assert (tmp_path / "out" / "report.md").is_file()
