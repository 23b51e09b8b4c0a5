"""The lab: equal tries, what a regime records, and the arithmetic of its report."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dft_lora.errors import RequestError
from dft_lora.experiments import lab, lab_report
from dft_lora.loss import objective, objective_names

SMALL = {
    "train.batch_size": 2,
    "train.micro_batch_size": 2,
    "train.max_steps": 1,
    "evaluate.max_new_tokens": 4,
    "data.sample": 8,
}


def test_every_objective_on_solutions_is_a_candidate():
    wanted = {name for name in objective_names() if objective(name).learns_from == "solutions"}
    assert {name for name, _ in lab.CANDIDATES.values()} == wanted
    assert {"sft", "dft"} == set(lab.CORE[:2]) and set(lab.CORE) <= set(lab.CANDIDATES)


@pytest.mark.parametrize("label", lab.CANDIDATES)
def test_every_label_has_the_same_number_of_tries(label):
    rates = lab.TINY_RATES
    found = lab.tries(label, rates)
    assert len(set(found)) == lab.TRIES == len(rates)
    for fields in lab.kinds_of(label).values():
        numbers = {key.removeprefix("objective."): value for key, value in fields.items()}
        objective(numbers.pop("name"), **numbers)


def test_no_regime_is_tuned_on_the_problems_it_is_tested_on():
    for name, regime in lab.REGIMES.items():
        assert regime.validation not in regime.tasks, name
        assert {"sft", "dft"} <= set(regime.labels) and len(regime.rates) == lab.TRIES, name
        study = regime.study()
        assert lab.TUNING_SEED not in (0, 1, 2)
        assert all(kind in study.objectives for label in regime.labels for kind in lab.kinds_of(label))


@pytest.mark.slow
def test_a_regime_is_recorded_and_resumes(tmp_path, monkeypatch):
    regime = replace(
        lab.REGIMES["strong prior"],
        settings={**lab.REGIMES["strong prior"].settings, **SMALL},
        labels=("sft", "dft", "knee"),
    )
    small = {"validation_problems": 2, "problems": 3}
    monkeypatch.setattr(
        lab.Regime, "study", lambda self, study=lab.Regime.study: replace(study(self), **small)
    )
    monkeypatch.setattr(lab, "REGIMES", {"strong prior": regime})
    monkeypatch.setattr(lab_report, "REGIMES", lab.REGIMES)
    first = list(lab.run(tmp_path, [0]))
    assert len(first) == 1 + 2 * 3 and list(lab.run(tmp_path, [0])) == first
    result = json.loads((tmp_path / "lab.json").read_text())
    lines = lab_report.lines_of(result)["strong prior"]
    assert list(lines) == ["sft", "dft", "knee"]
    assert set(lines["knee"]["against"]) == {"sft", "dft"} and "at_equal_entropy" not in lines["sft"]
    tried = result["bases"]["strong prior"]["tries/knee"]["found"]
    assert len(tried) == lab.TRIES and {try_["kind"] for try_ in tried} == {"knee tau=0.1", "knee tau=0.3"}
    text = lab_report.markdown(result)
    assert "| knee tau=0." in text and "Ranks over" in text and "advised" in text


def test_an_unknown_regime_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"--only 'no priors'.*no prior"):
        list(lab.run(tmp_path, [0], ["no priors"]))


# --- the report ------------------------------------------------------------------------------------


def test_ranks_are_shared_by_ties_and_the_gap_is_from_the_regimes_best():
    found = lab_report.ranks({"x": {"a": 0.5, "b": 0.5, "c": 0.2}, "y": {"a": 0.1, "b": 0.4, "c": 0.3}})
    assert list(found) == ["b", "a", "c"]
    assert (found["b"]["mean_rank"], found["a"]["mean_rank"]) == (1.25, 2.25)
    assert found["a"]["worst_gap"] == pytest.approx(0.3) and found["a"]["worst_in"] == "y"
    assert found["b"]["worst_gap"] == 0
    low, high = found["c"]["ci95"]
    assert (low, high) == (2, 3)


def test_only_labels_of_all_regimes_are_ranked():
    assert set(lab_report.ranks({"x": {"a": 1.0, "b": 0.5}, "y": {"a": 1.0}})) == {"a"}


def test_the_threshold_is_chosen_without_the_regime_it_predicts():
    assert lab_report.left_out([0.1, 0.2, 0.7, 0.8], ["sft", "sft", "dft", "dft"]) == 1.0
    assert lab_report.left_out([0.1, 0.2, 0.8], ["sft", "dft", "sft"]) < 0.5
    noise = np.random.default_rng(0).permutation(["sft", "dft"] * 20).tolist()
    assert lab_report.left_out(np.linspace(0, 1, 40).tolist(), noise) < 0.75


def test_p_values_are_corrected_over_the_labels_of_a_regime():
    lines = {
        label: {"against": {"sft": {"sampled": {"p_value": p}}}} for label, p in (("a", 0.01), ("b", 0.04))
    }
    lines["sft"] = {"against": {}}
    assert lab_report.corrected(lines, "sft", "sampled") == {"a": 0.02, "b": 0.04}
    assert lab_report.corrected(lines, "dft", "sampled") == {}
