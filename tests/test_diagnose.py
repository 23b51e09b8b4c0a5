"""The diagnosis: figures that follow from the probabilities, and opposite advice for opposite data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.data.templates import Renderer
from dft_lora.errors import DataError, RecipeError
from dft_lora.evaluation.diagnosis import (
    advice,
    diagnose,
    diagnosis_text,
    effective,
    ends,
    learns_to_end,
    metrics,
)
from dft_lora.evaluation.token_table import TokenTable
from dft_lora.loss import objective


def table(p):
    p = np.asarray(p, dtype=np.float32)
    zeros = np.zeros(len(p), dtype=np.int32)
    return TokenTable(zeros, zeros, np.log(p), np.zeros_like(p), 1 - p)


def test_opposite_data_gets_opposite_advice():
    """Arithmetic is what the embedded base was made on; nobody can know the codes of the codebook."""
    known = diagnose(load_recipe("tiny_dft"), examples=64)
    unknown = diagnose(load_recipe("tiny_dft", ["data.source=codebook"]), examples=64)
    assert (known["favours"], unknown["favours"]) == ("dft", "sft")
    assert known["gradient_kept"] > 0.2 > unknown["gradient_kept"]
    assert unknown["effective_tokens"]["dft"] < unknown["effective_tokens"]["sft"] <= unknown["tokens"]
    for found in (known, unknown):
        assert sum(found["histogram"]) == found["tokens"]
        nlls = [row["nll"] for row in found["least_likely_examples"]]
        assert nlls == sorted(nlls, reverse=True) and nlls[-1] >= 0
        assert found["data"]["rows"] >= found["drawn"]["rows"] >= found["examples"]
        assert diagnosis_text(found).splitlines()[0] == found["verdict"]


def test_a_foreign_ending_is_foretold():
    """The embedded base ends its own solutions; solutions with an ending it has never seen it does not."""
    known = diagnose(load_recipe("tiny_dft"), examples=32)
    foreign = diagnose(load_recipe("tiny_dft", ["data.split=train-boxed"]), examples=32)
    mended = diagnose(load_recipe("tiny_dft", ["data.split=train-boxed", "objective.floor=0.1"]), examples=32)
    assert known["p_end"] > 0.9 > 0.2 > foreign["p_end"] == mended["p_end"]
    assert (known["learns_to_end"], foreign["learns_to_end"], mended["learns_to_end"]) == (True, False, True)
    assert not known["unexpected_tokens"] and "\\" in [t["token"] for t in foreign["unexpected_tokens"]]
    said = diagnosis_text(foreign)
    assert "DFT will not learn to stop here" in said and "objective.floor=0.1" in said
    assert "more" in said.split("in most solutions, but p < 0.1 under the base:")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("p_end", "name", "dft", "own", "said"),
    [
        (0.9, "dft", True, True, "enough for DFT to learn it"),
        (0.02, "threshold", True, False, "but threshold will not learn to stop here"),
        (1e-4, "sft", False, True, "This recipe's objective does learn it"),
        (1e-4, "power", False, False, "power will not learn to stop here"),
        (1e-4, "prift", False, None, "whether prift will is not known before"),
        (0.9, "asft", True, None, "whether asft will is not known"),
    ],
)
def test_both_plain_dft_and_the_recipes_objective_are_asked_about_the_end(p_end, name, dft, own, said):
    p = np.array([0.5, p_end, 0.5, p_end], dtype=np.float32)
    found = ends(replace(table(p), example_M=np.array([0, 0, 1, 1])), objective(name))
    assert (found["dft_learns_to_end"], found["learns_to_end"]) == (dft, own) and said in found["end_verdict"]


@pytest.mark.parametrize(("end", "own"), [(0.5, True), (1e-4, False)])
def test_a_weight_of_the_end_alone_is_enough_if_it_is_large(end, own):
    assert learns_to_end(objective("dft", end=end), torch.full((3,), 1e-4)) is own


def test_a_wrong_objective_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"objective\.bogus: 'dft' has no such number"):
        diagnose(load_recipe("tiny_dft", ["objective.bogus=1"]))


def test_pairs_are_refused_by_name(tmp_path):
    rows = [{"problem": "1 + 1?", "chosen": "2", "rejected": "3"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe("tiny_dpo", [f"data.source={tmp_path / 'pairs.jsonl'}", "rollouts=null"])
    with pytest.raises(RecipeError, match="diagnose reads solutions, and 'dpo' learns from pairs"):
        diagnose(recipe)


def test_first_and_end_tokens_of_each_solution():
    p = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=np.float32)
    scored = replace(table(p), example_M=np.array([0, 0, 0, 1, 2, 2]))
    assert np.allclose(scored.first_E, [0.1, 0.4, 0.5]) and np.allclose(scored.end_E, [0.3, 0.4, 0.6])


def test_the_same_seed_looks_at_the_same_examples():
    again = [diagnose(load_recipe("tiny_dft"), examples=4) for _ in range(2)]
    assert again[0]["mean_probability"] == again[1]["mean_probability"]


def test_rows_are_drawn_before_they_are_tokenized(tmp_path, monkeypatch):
    """Only the drawn rows are; one that is too long is replaced by another; both are told."""
    rows = [{"problem": f"{i}+1?", "solution": "so " * (200 if i % 2 else 1)} for i in range(400)]
    rows[8] = rows[6]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rendered, render_all = [], Renderer.render_all

    def spy(self, problems):
        rendered.extend(problem.id for problem in problems)
        return render_all(self, problems)

    monkeypatch.setattr(Renderer, "render_all", spy)
    found = diagnose(load_recipe("tiny_dft", [f"data.source={tmp_path / 'd.jsonl'}"]), examples=16)
    assert len(rendered) == len(set(rendered)) == found["drawn"]["rows"] < 200
    assert found["examples"] == found["drawn"]["examples"] == 16
    assert found["drawn"]["over_long"] == len(rendered) - 16 > 0
    assert (found["data"]["rows"], found["data"]["duplicates"]) == (400, 1)
    said = diagnosis_text(found)
    assert "all rows: rows 400" in said and f"drawn rows: rows {len(rendered)}" in said
    assert "same text as an earlier row: kept: 1 of all rows" in said
    assert f"left out: {found['drawn']['over_long']} of drawn rows" in said


@pytest.mark.parametrize(("p", "favoured"), [(0.8, "dft"), (0.5, "either"), (0.1, "sft")])
def test_advice_at_the_anchors_of_the_literature(p, favoured):
    assert advice(p, p)[0] == favoured
    assert metrics(table([p] * 50))["favours"] == favoured


def test_advice_turns_once():
    order = {"sft": 0, "either": 1, "dft": 2}
    for first in (0.0, 1.0):
        said = [order[advice(p, first)[0]] for p in np.linspace(0, 1, 101)]
        assert said == sorted(said)


@pytest.mark.parametrize(
    ("p", "first", "favoured"), [(0.36, 0.12, "sft"), (0.47, 0.38, "either"), (0.9, 0.1, "dft")]
)
def test_where_the_mean_names_neither_an_unknown_first_token_favours_sft(p, first, favoured):
    assert advice(p, first)[0] == favoured


def test_shares_and_effective_tokens():
    found = metrics(table([0.05, 0.05, 0.5, 0.95]))
    assert (found["share_below_0.1"], found["share_above_0.9"]) == (0.5, 0.25)
    assert found["nll"] == pytest.approx(-np.log([0.05, 0.05, 0.5, 0.95]).mean(), rel=1e-5)
    even, weights = np.ones(7), np.random.default_rng(0).random(50)
    assert effective(even) == pytest.approx(7)
    assert effective(3 * weights) == pytest.approx(effective(weights)) and effective(weights) < 50
    assert effective(np.array([1.0, 0, 0])) == 1


def test_command_line():
    runner = CliRunner()
    done = runner.invoke(main, ["diagnose", "tiny_dft", "--examples", "4", "--json"])
    assert json.loads(done.stdout)["examples"] == 4
    refused = runner.invoke(main, ["diagnose", "tiny_dft", "--set", "data.source=missing.jsonl"])
    assert refused.exit_code == 2 and "missing.jsonl" in refused.stderr


def test_nothing_to_look_at_is_refused():
    with pytest.raises(DataError, match="no example"):
        diagnose(load_recipe("tiny_dft", ["data.max_length=3"]))
