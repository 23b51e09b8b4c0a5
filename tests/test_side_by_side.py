"""Runs in training in turn over one base: each is, bit for bit, the run that `train` makes alone."""

import pytest
import torch
from safetensors.torch import load_file

from dft_lora.config import load_recipe
from dft_lora.errors import RequestError
from dft_lora.runs.folder import RunFolder
from dft_lora.training.loop import train
from dft_lora.training.side_by_side import SideBySide

pytestmark = pytest.mark.usefixtures("many_runs")

SMALL = (
    "adapter.r=4",
    "adapter.dropout=0.3",  # draws in every step: a run must have its own random state
    "data.sample=40",
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "train.max_steps=4",
    "train.save_steps=3",
)
CLOCKED = {"seconds", "processor_seconds", "tokens_per_second", "peak_memory_mb"}


def recipes(home, names=("sft", "dft"), changes=()):
    return [
        load_recipe(f"tiny_{name}", (*SMALL, *changes, f"name={name}", f"output={home / name}"))
        for name in names
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, RunFolder]:
    """The same runs, one after the other with `train`."""
    return {r.name: train(r) for r in recipes(tmp_path_factory.mktemp("alone"))}


def tensors(folder: RunFolder) -> dict[str, torch.Tensor]:
    """All tensors of a run: its adapter and its checkpoints with optimizer and random state."""
    files = sorted(folder.path.rglob("*.safetensors"))
    return {
        f"{file.relative_to(folder.path)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def lines(folder: RunFolder) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in folder.metrics()]


def check_same(ours: RunFolder, other: RunFolder) -> None:
    a, b = tensors(ours), tensors(other)
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines(ours) == lines(other)
    assert ours.finished and ours.run()["identity"] == other.run()["identity"]


def test_runs_side_by_side_equal_runs_alone(tmp_path, alone):
    """Looking at tokens and answers in between changes nothing."""
    runs = SideBySide(recipes(tmp_path))
    example = runs.plan.examples[0]
    before = runs.probabilities(example)
    assert before["sft"] == before["dft"], "both start at the base"
    while not runs.complete:
        runs.step()
        runs.probabilities(example)
        runs.answers(example.ids[: example.prompt_length], 4)
    after = runs.probabilities(example)
    assert after["sft"] != after["dft"] and len(after["sft"]) == example.supervised
    for folder in runs.finish():
        check_same(folder, alone[folder.name])


def test_a_paused_pair_is_resumed_by_either(tmp_path, alone):
    """One run by the command line's `train`, the other side by side again after a copy was left behind."""
    runs = SideBySide(recipes(tmp_path))
    runs.step()
    runs.save()
    sft, dft = recipes(tmp_path)
    check_same(train(sft, resume=True), alone["sft"])
    again = SideBySide([sft, dft], resume=True)
    assert again.done == 1 and again.runs["sft"].complete
    while not again.complete:
        assert again.step().keys() == {"dft"}
    for folder in again.finish():
        check_same(folder, alone[folder.name])


def test_both_stand_on_one_base(tmp_path):
    runs = SideBySide(recipes(tmp_path))
    models = [run.trainer.learner.adapter_model for run in runs.runs.values()]
    weights = [
        {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name} for model in models
    ]
    assert weights[0] == weights[1] == {p.data_ptr() for p in runs.base.parameters()}
    assert not any("lora" in name for name, _ in runs.base.named_modules())


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.learning_rate=0.5", "train: runs side by side differ only in their objective"),
        ("data.split=train-clean", "data: runs side by side differ"),
    ],
)
def test_recipes_that_differ_elsewhere_are_refused(tmp_path, change, message):
    (sft,), (dft,) = recipes(tmp_path, ["sft"]), recipes(tmp_path, ["dft"], [change])
    with pytest.raises(RequestError, match=message):
        SideBySide([sft, dft])
    assert not list(tmp_path.iterdir())


def test_online_objectives_are_refused(tmp_path):
    both = [load_recipe("tiny_grpo", (f"name={name}", f"output={tmp_path / name}")) for name in "ab"]
    with pytest.raises(RequestError, match=r"objective\.name: runs side by side learn from solutions"):
        SideBySide(both)


def test_an_int8_base_is_shared(tmp_path):
    """bitsandbytes moves the scales of an 8-bit layer into that layer alone in its first pass."""
    int8 = ("model.quantization=int8", "train.max_steps=1")
    (alone,) = (train(r) for r in recipes(tmp_path / "alone", ("dft",), int8))
    runs = SideBySide(recipes(tmp_path / "both", changes=int8))
    runs.step()
    check_same({folder.name: folder for folder in runs.finish()}["dft"], alone)
