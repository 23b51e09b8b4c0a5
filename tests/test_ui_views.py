"""The page's HTML, without a model or a server: text, counts, votes, recorded results."""

import base64
import html
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import gradio
import pytest
from scipy.stats import binomtest
from ui_cases import HOSTILE, runs

from dft_lora.errors import DataError
from dft_lora.runs.folder import RunFolder
from dft_lora.tasks.judge import Verdict, judge
from dft_lora.ui.counts import Tally, wilson
from dft_lora.ui.results import results_view
from dft_lora.ui.session import Answer
from dft_lora.ui.text import plain, rich
from dft_lora.ui.views import answers_view, pair_view, samples_view, standings_view
from dft_lora.ui.votes import Ballot, Pair

# --- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_becomes_plain_characters(text):
    """No tag but our own empty-handed <span>, no line break, and the same characters once decoded."""
    for made in (rich(text), plain(text)):
        assert set(re.findall(r"<[^>]*>?", made)) <= {"<span>", "</span>"}
    assert "\n" not in rich(text)
    visible = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)
    assert html.unescape(plain(text)) == visible
    if not re.search(r"\$|\\[(\[]", text):
        assert html.unescape(re.sub(r"</?span>", "", rich(text))) == visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $\frac12 < x$.", r"so \(\frac12 \lt  x\)."),
        (r"\[a \\[4pt] b\]", r"\[a \\ [4pt] b\]"),
        ("$$x\n=1$$", r"\[x =1\]"),
        (r"\(100%\)", r"\(100\%\)"),
        ("it costs $5 and $6", "it costs <span>&#36;</span>5 and <span>&#36;</span>6"),
        (r"\(open", r"<span>&#92;</span>(open"),
    ],
)
def test_formulas_are_kept_and_money_is_not_a_formula(text, expected):
    assert rich(text) == expected


def test_long_hostile_text_is_quick():
    """No pattern of `rich` is quadratic in unclosed delimiters: 8 times the text is not 64 times the work.

    Compared in this thread's processor time, the least of three, so that the machine's pace cancels.
    """

    def work(text: str) -> float:
        times = []
        for _ in range(3):
            started = time.thread_time()
            rich(text)
            times.append(time.thread_time() - started)
        return min(times)

    for unit in ("\\(", "$", "\\[x ", "$a"):
        assert work(unit * 8_000) < 24 * work(unit * 1_000), unit


def test_views_show_hostile_text_as_text():
    answer = Answer("sft", 0, text="<b>x</b>", state="done", verdict=Verdict("wrong", "<i>y</i>"))
    views = [
        answers_view(["sft"], [answer]),
        pair_view(Pair("<b>x</b>", "sft", "dft", "<b>x</b>", "<i>y</i>"), ["sft", "dft"]),
        samples_view(["sft"], [Tally.of("sft", [answer])], 1, 1),
        answers_view(["<b>x</b>"], []),
    ]
    for view in views:
        assert "<b>x" not in view and "<i>y" not in view


# --- counts and votes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 8), (16, 16), (1, 1), (250, 1000)])
def test_wilson_is_the_score_interval(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_a_tally_counts_answers_and_names_the_majority():
    texts = ["#### 4", "so \\boxed{4}", "#### 5", "", "#### 5", "#### 5"]
    answers = [
        Answer("sft", i, text=text, state="done", verdict=judge(text, "4")) for i, text in enumerate(texts)
    ]
    tally = Tally.of("sft", answers)
    assert (tally.correct, tally.samples, tally.unparsable) == (2, 6, 1)
    assert tally.answers == (("5", 3), ("4", 2)) and tally.majority == "5" and tally.right == {"4"}


def test_a_tally_of_judged_answers_counts_what_the_judge_read():
    """A multiple-choice answer is its letter, whatever else the text contains that looks like mathematics."""
    verdicts = [Verdict("correct", "B"), Verdict("correct", "B"), Verdict("unparsable")]
    answers = [
        Answer("sft", i, text="answer2 of 42", state="done", verdict=v) for i, v in enumerate(verdicts)
    ]
    tally = Tally.of("sft", answers)
    assert tally.answers == (("B", 2),) and tally.unparsable == 1 and tally.right == {"B"}


def test_votes_are_recorded_with_the_runs_identities_and_counted(tmp_path):
    ballot = Ballot(tmp_path / "v" / "votes.jsonl", {"base": "tiny", "sft": "aaa", "dft": "bbb"})
    pair = Pair("p", "dft", "sft", "x", "y")
    for choice in ("left", "left", "right", "tie"):
        ballot.cast(pair, choice)
    ballot.cast(Pair("p", "sft", "dft", "y", "x"), "right")  # the other way round: dft again
    Ballot(ballot.file, {"sft": "old", "dft": "bbb"}).cast(pair, "left")  # another adapter of that name
    (standing,) = ballot.standings()
    assert (standing.a, standing.b) == ("sft", "dft")
    assert (standing.for_a, standing.for_b, standing.ties) == (1, 3, 1)
    assert standing.interval == wilson(1, 4)
    assert json.loads(ballot.file.read_text().splitlines()[0])["ids"] == {"left": "bbb", "right": "aaa"}
    assert "25 % (" in standings_view(["base", "sft", "dft"], [standing])


def test_votes_from_many_threads_stay_whole_lines(tmp_path):
    ballot = Ballot(tmp_path / "votes.jsonl", {"a": "1", "b": "2"})
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: ballot.cast(Pair("p" * 5000, "a", "b", "x", "y"), "left"), range(64)))
    assert ballot.standings()[0].for_a == 64


# --- results ---------------------------------------------------------------------------------------


def report(**runs_):
    shares = {"avg": 0.5, "ci95": [0.4, 0.6], "greedy": 0.7, "truncated": 0.0, "unparsable": 0.125}
    figures = {**shares, "samples": 4, "problems": 9}
    difference = {"difference": 0.2, "ci95": [0.1, 0.3], "p_value": 0.01}
    return {
        "runs": {name: {"tasks": {"arithmetic": figures | more}} for name, more in runs_.items()},
        "paired": [{"a": "sft", "b": "dft", "task": "arithmetic", **difference}],
    }


def test_results_come_from_the_run_folders_alone(tmp_path):
    def line(i: int, sample: int) -> str:
        verdict = "correct" if sample < i else "wrong"
        return json.dumps({"problem": f"p{i}", "sample": sample, "verdict": verdict}) + "\n"

    for name in ("sft", "dft"):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        (folder.path / "run.json").write_text("{}")
        for step in (1, 2, 3):
            folder.log({"step": step, "nll": 2.0 / step, "mean_probability": 0.3 * step, "entropy": 1.0})
        folder.evaluation("arithmetic").parent.mkdir()
        answers = "".join(line(i, sample) for i in range(5) for sample in range(-1, 4))
        folder.evaluation("arithmetic").write_text(answers)
    folders = [RunFolder(tmp_path / name) for name in ("sft", "dft")]
    assert "No results yet" in results_view(folders) and "polyline" in results_view(folders)
    (tmp_path / "report.json").write_text(json.dumps(report(sft={}, dft={"avg": 0.875})))
    view = results_view(folders)
    assert "do not differ beyond noise" not in view and "are correct 20.0 points more often" in view
    assert base64.b64decode(re.search(r"base64,([^\"]*)", view)[1]).startswith(b"task,run,low95,high95,avg")
    for part in ("87.5 %", "40.0 % to 60.0 %", "+20.0", "polyline", "<rect", "12.5 %"):
        assert part in view
    counts = [int(n) for n in re.findall(r"<title>(\d+) problems</title>", view)]
    assert counts == [1, 1, 1, 1, 1] * 2  # 0, 1, 2, 3 and 4 of 4 samples right
    (tmp_path / "report.json").write_text('{"runs": 3}')
    with pytest.raises(DataError, match=r"report\.json"):
        results_view(folders)


def test_results_show_accuracy_over_the_seconds_of_training(tmp_path):
    folders = [RunFolder(tmp_path / name) for name in ("base", "sft", "dft")]
    for folder, seconds in zip(folders, (None, 30.0, 60.0), strict=True):
        folder.path.mkdir()
        figures = {} if seconds is None else {"figures": {"seconds": seconds}}
        (folder.path / "run.json").write_text(json.dumps(figures))
    made = json.dumps(report(base={"avg": 0.1}, sft={"avg": 0.5}, dft={"avg": 0.6}))
    (tmp_path / "report.json").write_text(made)
    view = results_view(folders)
    assert "accuracy over seconds of training: sft 50.0% after 30 s, dft 60.0% after 60 s" in view
    assert ">base</text>" in view and view.count("<circle") == 2
    assert "Accuracy against cost" not in results_view(folders[:2]), "one trained run has nothing beside it"


def test_results_of_another_adapter_are_named_and_not_shown(tmp_path):
    """A run that was trained further: neither its own report nor the one beside it is shown."""
    folders = [RunFolder(tmp_path / name) for name in ("sft", "dft")]
    for folder in folders:
        folder.adapter.mkdir(parents=True)
        (folder.path / "run.json").write_text("{}")
        (folder.adapter / "adapter_config.json").write_text("{}")
        (folder.adapter / "adapter_model.safetensors").write_text(folder.name)
        own = {"avg": 0.625} if folder.name == "sft" else {"avg": 0.875}
        made = report(**{folder.name: own})
        made["runs"][folder.name]["adapter"] = folder.adapter_digest
        folder.report_file.write_text(json.dumps(made))
    both = report(sft={"avg": 0.625}, dft={"avg": 0.875})
    for folder in folders:
        both["runs"][folder.name]["adapter"] = folder.adapter_digest
    (tmp_path / "report.json").write_text(json.dumps(both))
    view = results_view(folders)
    assert "62.5 %" in view and "87.5 %" in view and "+20.0" in view and "--overwrite" not in view
    (folders[1].adapter / "adapter_model.safetensors").write_text("trained further")
    view = results_view(folders)
    assert "62.5 %" in view and "87.5 %" not in view and "+20.0" not in view
    assert f"dft-lora evaluate {tmp_path / 'dft'} --overwrite" in view


def test_results_plot_token_probabilities(tmp_path):
    """Stairs on a logarithmic scale, from the runs' own reports as well as from one that compares them."""
    for name, counts in (("sft", [1] * 20), ("dft", [100, *[1] * 18, 1000])):
        folder = RunFolder(tmp_path / name / name)
        folder.path.mkdir(parents=True)
        (folder.path / "run.json").write_text("{}")
        tokens = {"arithmetic": {name: {"histogram": counts}}, "other-text": {name: {"histogram": [1] * 20}}}
        folder.report_file.write_text(json.dumps(report(**{name: {}}) | {"tokens": tokens}))
    view = results_view([RunFolder(tmp_path / name / name) for name in ("sft", "dft")])
    assert view.count("How likely each token is") == 1 and "other-text" not in view
    flat, bimodal = (
        [float(point.split(",")[1]) for point in points.split()]
        for points in re.findall(r'<polyline[^>]*points="([^"]*)"><title>[sd]ft', view)
    )
    assert len(flat) == len(bimodal) == 40 and len(set(flat)) == 1
    assert bimodal[-1] < bimodal[0] < bimodal[20]  # y grows downwards: two peaks, the right one higher


def test_a_results_only_page_loads_no_model():
    from dft_lora.ui.page import build

    page = build(runs(), None, None)
    labels = [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]
    assert labels == ["Results"]


def test_the_results_tab_shows_every_objective_of_the_lab_against_sft():
    """The recorded table: a line for each objective, the ranked ones twice, SFT's cells its accuracies."""
    from dft_lora.experiments.lab import CANDIDATES, REGIMES
    from dft_lora.ui.lab import FILE, lab_view

    recorded, view = json.loads(FILE.read_text(encoding="utf-8")), lab_view()
    assert set(recorded["objectives"]) == set(CANDIDATES) and list(recorded["regimes"]) == list(REGIMES)
    for label in CANDIDATES:
        lines = re.findall(rf'<td data-head="objective">{re.escape(label)}</td>', view)
        assert len(lines) == (2 if label in recorded["ranks"] else 1), label
    sft = re.search(r'<td data-head="objective">sft</td>(.*?)</tr>', view)[1]
    share = recorded["objectives"]["sft"]["half-known"]["sampled"]["accuracy"]
    assert f'data-head="half-known">{100 * share:.1f} %</td>' in sft
    dft = re.search(r'<td data-head="objective">dft</td>(.*?)</tr>', view)[1]
    lost = recorded["objectives"]["dft"]["half-known"]["sampled"]
    assert lost["clear"] and lost["minus_sft"] < 0
    assert f'style="--share: 100%"><b>−{-100 * lost["minus_sft"]:.1f}</b></span>' in dft
