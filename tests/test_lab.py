"""The lab: equal tries, what a regime records, and the arithmetic of its report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dft_lora.errors import RequestError
from dft_lora.experiments import lab, lab_report
from dft_lora.experiments.advice import cases
from dft_lora.loss import objective, objective_names

RESULTS = Path(__file__).parent.parent / "docs" / "results"

SMALL = {
    "train.batch_size": 2,
    "train.micro_batch_size": 2,
    "train.max_steps": 1,
    "evaluate.max_new_tokens": 4,
    "data.sample": 8,
}


def test_every_objective_on_solutions_is_a_candidate():
    wanted = {name for name in objective_names() if objective(name).learns_from == "solutions"}
    wanted.remove("target-sft")  # it needs a teacher, which no regime has
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
    monkeypatch.setattr(lab_report.complete, "__defaults__", (regime.labels,))  # three are enough for ranks
    first = list(lab.run(tmp_path, [0]))
    assert len(first) == 1 + 2 * 3 and list(lab.run(tmp_path, [0])) == first
    result = json.loads((tmp_path / "lab.json").read_text())
    lines = lab_report.lines_of(result)["strong prior"]
    assert list(lines) == ["sft", "dft", "knee"]
    assert set(lines["knee"]["against"]) == {"sft", "dft"} and "at_equal_entropy" not in lines["sft"]
    tried = result["bases"]["strong prior"]["tries/knee"]["found"]
    assert len(tried) == lab.TRIES and {try_["kind"] for try_ in tried} == {"knee tau=0.1", "knee tau=0.3"}
    (case,) = cases(tmp_path)
    assert case.compared == "plain DFT - SFT" and case.end_verdict
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


def test_a_label_is_recommended_if_it_beats_sft_and_dft_by_rank_and_by_distance():
    rows = {"sft": (8.0, 0.4), "dft": (5.0, 0.5), "a": (4.0, 0.3), "b": (3.0, 0.45), "c": (6.0, 0.1)}
    ranked = {label: dict(zip(("mean_rank", "worst_gap"), row, strict=True)) for label, row in rows.items()}
    assert lab_report.recommended(ranked) == ["a"]
    assert lab_report.recommended({}) == []


def test_the_page_shows_a_lab_whose_real_regime_is_incomplete(tmp_path, monkeypatch):
    """Ranks leave the regime out; its cells are shown where they are there."""
    from dft_lora.ui import lab as page

    result = json.loads((RESULTS / "lab.json").read_text())
    for label in ("asft", "sft"):
        del result["bases"]["half-known"][f"test/{label}"]
    found = lab_report.summary(result)
    assert "half-known" not in found["objectives"]["asft"] and "half-known" in found["objectives"]["dft"]
    assert found["advice"]["of"] == 9
    (tmp_path / "lab.json").write_text(json.dumps(found))
    monkeypatch.setattr(page, "FILE", tmp_path / "lab.json")
    assert "On the real base (half-known) <b>power</b> is ahead" in page.lab_view.__wrapped__()


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


def part(difference: float) -> dict:
    return {"difference": difference, "ci95": [difference - 0.02, difference + 0.02], "p_value": 0.01}


def recorded(shares: dict[str, dict[str, float]]) -> dict:
    """A lab.json: regime -> label -> accuracy. DFT is advised in every regime."""
    bases: dict = {}
    for regime, some in shares.items():
        said = dict.fromkeys(lab_report.MEASURED, some["dft"])
        bases[regime] = {"diagnosis": {"found": said | {"favours": "dft", "dft_learns_to_end": True}}}
        for label, share in some.items():
            bases[regime][f"test/{label}"] = {
                "found": {
                    "kind": label,
                    "learning_rate": 1e-3,
                    "accuracy": {"arithmetic": share, "arithmetic greedy": share},
                    "pass@4": share,
                    "ended": {"arithmetic": 1.0},
                    "other_text_nll": 3.0,
                    "seconds_per_step": 0.1,
                    "against": {
                        rival: {mode: part(share - some[rival]) for mode in lab.MODES}
                        for rival in ("sft", "dft")
                        if rival != label
                    },
                }
            }
    return {"bases": bases}


def shares(regime: str, dft: float) -> dict[str, float]:
    return dict.fromkeys(lab.REGIMES[regime].labels, 0.5) | {"dft": dft}


def test_only_complete_regimes_are_ranked_and_every_regime_is_shown(tmp_path):
    whole = recorded({name: shares(name, 0.6) for name in ("strong prior", "own samples")})
    begun = recorded({"no prior": {"sft": 0.5, "dft": 0.3}})
    result = {"bases": whole["bases"] | begun["bases"]}
    assert list(lab_report.lines_of(result)) == ["strong prior", "no prior", "own samples"]
    assert list(lab_report.complete(result)) == ["strong prior", "own samples"]
    text = lab_report.markdown(result)
    assert "| dft | 1.0 | 1.0 to 1.0 | 0.0 | strong prior | 1.0 | 1.0 |" in text
    assert "### no prior" in text and "2 regimes: strong prior, own samples." in text


def test_the_advice_is_right_where_it_names_the_winner():
    p = {
        "strong prior": 0.7,
        "8 % wrong steps": 0.6,
        "own samples": 0.65,
        "no prior": 0.3,
        "50 examples": 0.2,
    }
    found = lab_report.advice(recorded({name: shares(name, dft) for name, dft in p.items()}))
    assert [row["winner"] for row in found["regimes"].values()].count("dft") == 3
    assert found["then"] == pytest.approx(3 / 5) and found["majority"] == pytest.approx(3 / 5)
    assert found["now"] == found["left_out"] == pytest.approx(4 / 5)
    assert found["by_quantity"]["mean_probability"] == 1.0
