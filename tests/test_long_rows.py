"""Longer rows: tiled MLPs and offloaded activations give the same step in less memory."""

import json

import pytest
import torch

from dft_lora.bench.memory import shape
from dft_lora.config import parse_recipe
from dft_lora.data.templates import Example
from dft_lora.errors import ModelError, RecipeError
from dft_lora.loss import objective
from dft_lora.model import long_rows
from dft_lora.training.learner import Learner
from dft_lora.training.probe import longest_batch, probe
from dft_lora.training.ranks import Ranks
from dft_lora.training.trace import traced

DFT = objective("dft")
TINY = [Example(str(i), tuple(range(1, length)), 20) for i, length in enumerate((201, 150))]


def recipe_of(name="tiny", **train):
    settings = {"batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": True, **train}
    return parse_recipe({"model": {"name": str(name)}, "data": {"packing": False}, "train": settings})


def gradients(recipe):
    """The loss of a step's first pass and the gradients of the adapter, whose B is not zero."""
    learner = Learner(recipe, DFT, 0, Ranks(recipe))
    torch.manual_seed(0)
    for parameter in learner.trainable:
        torch.nn.init.normal_(parameter, std=0.02)
    groups = [(example,) for example in TINY]
    totals, _ = learner.accumulate(groups, learner.divisor(groups), 0)
    return totals.loss, [parameter.grad.clone() for parameter in learner.trainable]


@pytest.mark.parametrize("tile", [64, 70, 4096])
def test_a_tiled_mlp_gives_the_same_loss_and_gradients(tile):
    loss, grads = gradients(recipe_of())
    tiled_loss, tiled = gradients(recipe_of(mlp_tile=tile))
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    for mine, theirs in zip(tiled, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_offloaded_activations_are_the_same_numbers(monkeypatch):
    """With the CPU as its own host: every saved tensor is copied away and back."""
    moved = []

    def away(x):
        moved.append(x.numel())
        return x.device, x.clone()

    expected = gradients(recipe_of())
    monkeypatch.setattr(long_rows, "_to_host", away)
    loss, grads = gradients(recipe_of(offload_activations=True))
    assert moved and loss == expected[0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads, expected[1], strict=True))


def test_long_rows_take_less_memory_on_a_gpu(tmp_path):
    """Traced on shapes alone: a row of 4,096 tokens through three layers as wide as a 1.5B model's."""
    config = shape("qwen2", 1536, 8960, 12, 2, 3, 1024, True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    groups = [(Example("0", tuple(range(1, 4097)), 64),)]

    def peaks(**train):
        with traced(recipe_of(tmp_path, **train), DFT, 0) as learner:
            batch = longest_batch(learner, groups, 1)
            probe(learner, batch, gauged=False)
            return probe(learner, batch)

    whole, tiled = peaks(), peaks(mlp_tile=512)
    assert tiled.backward_peak < 0.6 * whole.backward_peak
    moved = peaks(offload_activations=True)
    layer_input = 4096 * 1536 * 2
    assert whole.saved - moved.saved >= 3 * layer_input


def test_weights_stay_where_they_are(monkeypatch):
    """The output head saves its own weight; what moves is as long as the row."""
    moved = []
    to_host = long_rows._to_host

    def note(x):
        saved = to_host(x)
        if saved is not x:
            moved.append(tuple(x.shape))
        return saved

    monkeypatch.setattr(long_rows, "_to_host", note)
    with traced(recipe_of(offload_activations=True), DFT, 0) as learner:
        batch = longest_batch(learner, [(Example("0", tuple(range(1, 1001)), 64),)], 1)
        probe(learner, batch, gauged=False)
    assert {shape[:2] for shape in moved} == {(1, 1000)}


def test_mlps_that_cannot_be_tiled_are_refused():
    with pytest.raises(ModelError, match=r"train\.mlp_tile"):
        long_rows.tile_mlps(torch.nn.Sequential(torch.nn.Linear(2, 2)), 64)


@pytest.mark.parametrize(
    "train, named",
    [
        ({"mlp_tile": 8}, "mlp_tile"),
        ({"mlp_tile": 128, "shard": True}, "train.shard"),
        ({"offload_activations": True, "gradient_checkpointing": False}, "gradient_checkpointing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(train, named):
    with pytest.raises(RecipeError, match=named):
        recipe_of(**train)
