"""The training bench: a small real run of it, and the tables made from committed results."""

import json
import time
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from dft_lora.bench.rl import STAGES, Stopwatch, Work
from dft_lora.bench.rl import measure as measure_rl
from dft_lora.bench.table import RESULTS, rl_table, tables, train_table
from dft_lora.bench.train import (
    COMPARISON,
    LADDER,
    OURS,
    TRL,
    VARIANTS,
    Measurement,
    Shape,
    measure,
    summary,
)

SMALL = Measurement(Shape(64, 2, 151_936, 128, 2, 256), steps=1, rounds=1, threads=1)


@pytest.mark.slow
def test_ours_and_the_full_logits_step_compute_the_same_loss(data_dir, monkeypatch):
    """Each in a process of its own, as the bench runs them; TRL's too where it is installed."""
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))
    chosen = (OURS, LADDER[1], *(v for v in COMPARISON[2:] if find_spec("trl")))
    result = measure(chosen, SMALL)
    first = [row["first_loss"] for row in result["variants"].values()]
    assert first == pytest.approx([first[0]] * len(first), rel=0.02) and first[0] > 0
    ours = result["variants"]["ours"]
    full = result["variants"][LADDER[1].name]
    assert ours["above_loaded_mb"] < full["above_loaded_mb"] and ours["tensors_mb"] < full["tensors_mb"]
    assert len(ours["runs"][0]["seconds"]) == 1
    assert 0 < ours["products_cpu_seconds"] < ours["cpu_seconds"]
    assert "times its matrix products alone" in train_table(result)
    assert result["provenance"]["versions"]["torch"]


def test_the_full_logits_step_is_our_step_with_all_logits(monkeypatch):
    from dft_lora.bench import train
    from dft_lora.training.plan import make_plan
    from dft_lora.training.ranks import Ranks

    seen, cross_entropy = [], train.cross_entropy
    monkeypatch.setattr(
        train, "cross_entropy", lambda z, *more, **how: seen.append(z.shape) or cross_entropy(z, *more, **how)
    )
    few = ("data.sample=4", "train.batch_size=4", "train.micro_batch_size=4", "train.max_steps=1")
    losses = []
    for kind in (train.Trainer, train.FullLogits):
        plan = make_plan(train.load_recipe("tiny_dft", few))
        losses.append(kind(plan, Ranks(plan.recipe)).step(0)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [V for _, V in seen] == [539]  # of the second step alone


def test_products_are_those_of_forward_and_backward_passes_and_of_packed_layers():
    from dft_lora.bench.products import products_of

    w = torch.randn(48, 16).requires_grad_()
    x, packed = torch.randn(8, 16), Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16)
    wide = torch.randn(2, 4, 64, dtype=torch.bfloat16)
    packed.to("cpu")

    def step():
        (x @ w.t()).sum().backward()
        with torch.no_grad():
            packed(wide)

    found = products_of(step)
    shapes = Counter((left[0], right[0], left[2]) for left, right in found.counts.elements())
    assert shapes == {
        ((8, 16), (16, 48), torch.float32): 1,
        ((48, 8), (8, 16), torch.float32): 1,
        ((8, 64), (64, 32), torch.bfloat16): 1,
    }
    assert found.cpu_seconds() > 0


def test_a_peer_that_is_not_installed_is_named_and_not_replaced(monkeypatch):
    from dft_lora.bench import train

    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "trl is not installed" in TRL.missing
    assert OURS.missing == "" and set(VARIANTS) >= {variant.name for variant in LADDER}


@pytest.mark.slow
def test_a_grpo_and_a_dpo_step_stage_by_stage():
    """Each side in a process of its own; TRL's where it is installed, named where it is not."""
    work = Work(Shape(), "tiny", prompts=2, answers=2, tokens=24, micro_batch=2, rounds=1, threads=1)
    result = measure_rl(work)
    for name, side in result["sides"].items():
        assert side["missing"] or set(side["stages"]) == {*STAGES, "whole"}, name
        assert f"| {name} |" in rl_table(result)
    ours = result["sides"]["grpo, ours"]["stages"]
    assert all(ours[stage][1] > 0 for stage in STAGES)
    assert result["sides"]["dpo, ours"]["stages"]["rollout"] == [0, 0]
    assert rl_table(result).count("of its matrix products") == 2


def test_stages_add_up_to_the_whole_step():
    """A stage within another is taken off the outer one; what is left of the step is `update`."""
    watch = Stopwatch()
    owner = SimpleNamespace(inner=lambda: time.sleep(0.02))
    owner.outer = lambda: (time.sleep(0.01), owner.inner())
    watch.around(owner, "inner", "reward")
    watch.around(owner, "outer", "rollout")
    watch.ready()
    for _ in range(2):
        owner.outer()
        watch.step_done()
    (step,) = watch.figures()["steps"]  # the first step is thrown away
    for clock in (0, 1):
        assert sum(step[stage][clock] for stage in STAGES) == pytest.approx(step["whole"][clock])
    assert step["reward"][0] >= 0.02 and step["rollout"][0] >= 0.01 and step["loss"] == (0, 0)
    assert step["rollout"][0] + step["reward"][0] <= step["whole"][0]


def test_medians_are_over_steps_and_rounds():
    runs = [
        {
            "seconds": [1.0, 9.0],
            "cpu_seconds": [1.0, 2.0],
            "loaded_mb": 5,
            "above_loaded_mb": 1,
            "tensors_mb": None,
            "first_loss": 1,
        },
        {"seconds": [2.0], "cpu_seconds": [3.0], "loaded_mb": 7, "above_loaded_mb": 3},
    ]
    found = summary(runs, tokens=10)
    assert found["seconds"] == 2 and found["tokens_per_second"] == 5 and found["cpu_seconds"] == 2
    assert found["loaded_mb"] == 6 and found["above_loaded_mb"] == 2


@pytest.mark.parametrize("file", sorted(RESULTS.glob("train-*.json")), ids=lambda file: file.name)
def test_committed_results_carry_their_provenance(file):
    result = json.loads(file.read_text())
    provenance = result["provenance"]
    assert (
        provenance["command"]
        and provenance["commit"]
        and provenance["versions"]["torch"]
        and provenance["date"]
    )
    text = train_table(result)
    assert text in tables(kind="train")
    for name, row in result["variants"].items():
        assert f"| {name} |" in text
        assert row["missing"] or row["runs"]
