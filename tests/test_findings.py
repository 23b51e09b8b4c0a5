"""The findings: verdicts follow from intervals and seeds."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evidence_runs import answered

from dft_lora.errors import RequestError
from dft_lora.experiments import claims
from dft_lora.experiments.claims import _all, sampled
from dft_lora.experiments.claims import contrast as judge_contrast
from dft_lora.experiments.findings import run

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "findings.json"

TASKS = ("arithmetic", "arithmetic-long")
RNG = np.random.default_rng(0)


def contrast(what, a, b):
    return judge_contrast(what, a, b, sampled(*TASKS))


def runs(out, name, chance, seeds=3):
    """Runs with judged answers to both test sets."""
    made = []
    for seed in range(seeds):
        for task in TASKS:
            correct = RNG.binomial(1, chance, (60, 5)).tolist()
            folder = answered(out / name / f"seed-{seed}", correct, task=task)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def better_and_worse(tmp_path_factory):
    out = tmp_path_factory.mktemp("findings")
    return runs(out, "worse", 0.3), runs(out, "better", 0.6), runs(out, "same", 0.3)


def test_a_claim_is_confirmed_refuted_or_not_shown(better_and_worse):
    worse, better, same = better_and_worse
    assert contrast("", worse, better)["verdict"] == "confirmed"
    assert contrast("", better, worse)["verdict"] == "refuted"
    assert contrast("", worse, same)["verdict"] == "not shown"


def test_one_seed_against_the_others_confirms_nothing(better_and_worse):
    worse, better, _ = better_and_worse
    mixed = [better[0], better[1], worse[2]]
    opposite = [worse[0], worse[1], better[2]]
    found = contrast("", opposite, mixed)
    assert min(found["seeds"]) < 0 < max(found["seeds"])
    assert found["verdict"] != "confirmed"


def test_the_difference_is_the_mean_of_the_seeds(better_and_worse):
    worse, better, _ = better_and_worse
    found = contrast("", worse, better)
    assert found["difference"] == pytest.approx(np.mean(found["seeds"]))
    assert found["difference"] == pytest.approx(found["b"] - found["a"])


@pytest.mark.parametrize(("on_facts", "verdict"), [("sft", "confirmed"), ("either", "refuted")])
def test_new_facts_need_the_advice_on_them_and_no_other(monkeypatch, on_facts, verdict):
    folders = {
        "main": [SimpleNamespace(recipe=lambda: "main")],
        "facts": [SimpleNamespace(recipe=lambda: "facts")],
    }
    said = {"mean_probability": 0.1, "verdict": ""}
    advice = {"main": said | {"favours": "sft"}, "facts": said | {"favours": on_facts}}
    monkeypatch.setattr(claims, "diagnose", advice.__getitem__)
    monkeypatch.setattr(claims, "contrast", lambda *_: {"verdict": "confirmed"})
    study = SimpleNamespace(facts_task="codebook", tasks=TASKS)
    runs = SimpleNamespace(study=study, best=lambda kind, group="main": folders[group])
    assert claims.new_facts(runs)["verdict"] == verdict


def test_a_line_needs_all_its_parts():
    def said(*verdicts):
        return _all([{"verdict": verdict} for verdict in verdicts])

    assert said("confirmed", "confirmed") == "confirmed"
    assert said("confirmed", "not shown") == "not shown"
    assert said("confirmed", "refuted") == "refuted"


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_recorded_base_is_the_one_that_is_shipped(recorded):
    from dft_lora.config import ModelConfig
    from dft_lora.model.fingerprint import base_fingerprint

    assert recorded["provenance"]["base"] == base_fingerprint(ModelConfig())


def test_a_finding_is_renewed_with_the_seeds_of_the_others(tmp_path):
    recorded = {"settings": {"seed_list": [0, 1]}, "lines": []}
    (tmp_path / "findings.json").write_text(json.dumps(recorded))
    with pytest.raises(RequestError, match=r"--seeds: .*findings.json was made with seeds 0, 1"):
        list(run(tmp_path, [7], ["peak"]))
