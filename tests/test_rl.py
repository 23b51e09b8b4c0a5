"""`experiment rl`: verdicts follow from accuracy and cost; what a line records; the whole of it, small."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dft_lora.errors import RequestError
from dft_lora.experiments import rl

ANSWERS = {"rollouts.max_new_tokens": 64, "rollouts.samples": 4}
ONLINE = {"train.max_steps": 1, "train.batch_size": 8, "train.micro_batch_size": 4, **ANSWERS}
METHODS = rl.methods({"data.sample": 8, **ANSWERS}, ONLINE)
SMALL = {"train.batch_size": 2, "train.micro_batch_size": 2, "train.max_steps": 1, "evaluate.samples": 4}


def scores(**means):
    """100 problems, two seeds: each method's accuracy, with a little luck."""
    rng = np.random.default_rng(0)
    return {kind: mean + rng.normal(0, 0.02, (2, 100)) for kind, mean in means.items()}


def verdicts(score_GP, seconds=1.0):
    """Of all claims, where GRPO takes 10 seconds and DFT so many."""
    found = rl.claims(score_GP, {"dft": [seconds] * 2, "grpo": [10.0] * 2})
    return {name: line["verdict"] for name, line in found.items()}


@pytest.mark.parametrize(
    ("base", "dft", "grpo", "seconds", "said"),
    [
        (0.2, 0.5, 0.6, 1.0, "confirmed"),  # three quarters of the gain for a tenth of the time
        (0.2, 0.5, 0.6, 6.0, "refuted"),  # not for a fraction of it
        (0.2, 0.3, 0.6, 1.0, "refuted"),  # a quarter of the gain
        (0.2, 0.7, 0.6, 1.0, "confirmed"),  # more than all of it
        (0.6, 0.7, 0.5, 1.0, "not shown"),  # GRPO gains nothing: there is no gain to keep
    ],
)
def test_most_of_the_gain_for_a_fraction_of_the_cost(base, dft, grpo, seconds, said):
    score_GP = scores(base=base, dft=dft, grpo=grpo)
    assert verdicts(score_GP, seconds)["dft-against-grpo"] == said


def test_the_best_method_is_above_each_of_the_others():
    own = {rl.OWN_DFT: 0.6, rl.OWN_IW_SFT: 0.5}
    score_GP = scores(base=0.7, dft=0.5, grpo=0.5, rft=0.3, ppo=0.4, **own)
    found = verdicts(score_GP)  # the base is not one of the others
    assert found["own-samples-best"] == found["own-dft-above-own-iw-sft"] == "confirmed"
    assert found["dft-above-rl"] == "confirmed"
    found = verdicts(score_GP | scores(ppo=0.8))
    assert found["own-samples-best"] == found["dft-above-rl"] == "refuted"
    assert found["own-dft-above-own-iw-sft"] == "confirmed"


def test_a_claim_whose_methods_did_not_run_is_not_shown():
    found = verdicts(scores(base=0.2, dft=0.5, grpo=0.5))
    assert {found[name] for name in ("own-samples-best", "dft-above-rl", "own-dft-above-own-iw-sft")} == {
        "not shown"
    }


def test_every_method_tries_the_same_rates_and_online_ones_see_as_many_answers():
    study = rl.embedded_study()
    assert not study.swept and len(study.rates) == 3
    answers = {
        kind: fields["train.max_steps"] * fields["train.batch_size"]
        for kind, fields in study.objectives.items()
        if kind in ("grpo", "rloo", "nft", "ppo")
    }
    assert len(answers) == 4 and len(set(answers.values())) == 1
    assert {"sft", "iw-sft", "dft", "rft", "raft", "dpo", rl.OWN_DFT, rl.OWN_IW_SFT} < set(study.objectives)


def record(out, kinds, seeds):
    """The experiment at minimal size on these methods; the lines that it prints."""
    study = replace(
        rl.embedded_study(),
        settings=SMALL | {"data.sample": 40, "evaluate.max_new_tokens": 24},
        rates=(1e-3,),
        tasks=("arithmetic",),
        problems=3,
        objectives={kind: METHODS[kind] for kind in kinds},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "STUDIES", {"tiny": lambda: study})
        return list(rl.run(out, seeds, ["tiny"]))


def check(out, kinds, seeds):
    base = json.loads((out / "rl.json").read_text())["bases"]["tiny"]
    assert list(base["table"]) == ["base", *kinds]
    for kind, part in base["table"].items():
        line = part["found"]
        assert line["seeds"] == seeds and part["commit"] and part["fingerprint"], kind
        assert 0 <= line["pass_at_4"] <= 1 and line["entropy"] > 0
        assert {"arithmetic", "arithmetic greedy"} == set(line["accuracy"])
        for cost in line["cost"] or ():
            samples_itself = "rollouts.samples" in METHODS[kind]
            assert (cost["generated_tokens"] > 0) == samples_itself, kind
            assert cost["trained_tokens"] > 0 and cost["processor_seconds"] > 0
            assert cost["peak_memory_mb"] > 0
    assert base["table"]["base"]["found"]["cost"] is None
    assert set(base["claims"]["found"]) == {"sampled", "greedy"}


@pytest.mark.slow
def test_the_whole_experiment_and_that_finished_parts_are_kept(tmp_path):
    first = record(tmp_path, METHODS, [0, 1])
    check(tmp_path, METHODS, seeds=2)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("*.json")}
    assert record(tmp_path, METHODS, [0, 1]) == first and len(first) == 2 * (2 + len(METHODS))
    assert times == {file: file.stat().st_mtime_ns for file in times}


@pytest.mark.slow
def test_a_table_grows_method_by_method(tmp_path):
    record(tmp_path, ("sft", "dft", "grpo"), [0])
    check(tmp_path, ("sft", "dft", "grpo"), seeds=1)


def test_an_unknown_part_is_refused():
    with pytest.raises(RequestError, match=r"--only 'smollm2'.*smollm2-135m"):
        list(rl.run(None, [0], ["smollm2"]))
