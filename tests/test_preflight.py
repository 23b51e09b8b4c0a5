"""What preflight predicts is what a step then takes; what it proposes fits; nothing of the run changes."""

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import load_recipe, parse_recipe
from dft_lora.errors import RequestError, RunError
from dft_lora.model.accelerator import Cpu
from dft_lora.model.built import Built
from dft_lora.model.head import bare
from dft_lora.model.memory import MIB, LiveTensors, give_back_large_blocks
from dft_lora.training.learner import Learner
from dft_lora.training.plan import make_plan
from dft_lora.training.preflight import measured, preflight, preflight_table, propose, read_size
from dft_lora.training.probe import (
    LinearFit,
    MemoryFit,
    MicroBatches,
    auto_micro_batch,
    longest_batch,
    measure,
    probe,
    resident_bytes,
    set_checkpointing,
)
from dft_lora.training.ranks import Ranks
from dft_lora.training.trainer import Trainer


@pytest.fixture(scope="module")
def recipe(qwen_dir, tmp_path_factory):
    """Real vocabulary, so that the loss workspace weighs; rows of 150 to 350 tokens, half supervised."""
    folder = tmp_path_factory.mktemp("preflight")
    rows = [{"problem": "word " * (50 + 15 * i), "solution": "word " * (50 + 15 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(
        {
            "model": {"name": str(qwen_dir), "dtype": "float32"},
            "data": {"source": str(folder / "rows.jsonl"), "template": "qwen-boxed"},
            "train": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 3},
            "output": str(folder / "run"),
        }
    )


@pytest.fixture(scope="module")
def trainer(recipe):
    return Trainer(make_plan(recipe), Ranks(recipe))


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_fit_of_short_rows_predicts_long_micro_batches(trainer, checkpointing):
    """Within 10 %, from rows of 128 and 256 tokens to four rows of 500."""
    fit = measure(trainer.learner, trainer.plan.groups, checkpointing)
    for rows in (1, 4):
        batch = longest_batch(trainer.learner, trainer.plan.groups, rows)
        found = probe(trainer.learner, batch)
        assert found.N == batch.positions > 256 * rows
        assert fit.peak(found.N, found.M) == pytest.approx(found.peak, rel=0.1), rows
    set_checkpointing(trainer.learner, False)
    trainer.learner.optimizer.zero_grad()


def test_predicted_is_the_peak_of_a_real_step(recipe, trainer):
    """The longest micro-batch, counted apart from the prediction: all tensors alive in a whole step."""
    found = preflight(recipe)
    with LiveTensors() as memory:
        trainer.step(0)
        peak = memory.peak()
    resident = resident_bytes(trainer.learner)
    assert found["peak"] == pytest.approx(resident["weights"] + resident["adapter"] + peak, rel=0.1)
    assert found["predicted_peak"] == pytest.approx(found["peak"], rel=0.1)
    assert sum(found["bytes"].values()) == pytest.approx(found["peak"], rel=0.1)
    assert found["steps"] == 3
    assert found["seconds_in_all"] == pytest.approx(3 * found["seconds_a_step"])
    assert not recipe.output_dir.exists(), "preflight writes nothing"


def test_gradients_are_counted_once():
    """For an adapter larger than its base: the peak of the pass does not hold those that are resident."""
    small = ["data.sample=20", "train.batch_size=4", "train.micro_batch_size=1"]
    found = preflight(load_recipe("tiny_sft", ["adapter.r=256", *small]))
    assert found["bytes"]["gradients"] > found["bytes"]["weights"]
    assert found["peak"] == pytest.approx(found["predicted_peak"], rel=0.01)


def test_resident_bytes_are_those_of_the_tensors(trainer):
    found = resident_bytes(trainer.learner)
    assert found["adapter"] == sum(p.numel() * 4 for p in trainer.learner.trainable) == found["gradients"]
    head = trainer.learner.head.weight_VD
    four_bit = sum(
        m.weight.nbytes for m in trainer.learner.adapter_model.modules() if type(m).__name__ == "Linear4bit"
    )
    assert found["weights"] == pytest.approx(head.nbytes + four_bit, rel=0.02), (
        "tied, so the head counts once"
    )


def test_probing_leaves_weights_gradients_and_random_state(trainer):
    before = [parameter.detach().clone() for parameter in trainer.learner.trainable]
    random = torch.get_rng_state()
    measure(trainer.learner, trainer.plan.groups, False)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.learner.trainable, strict=True))
    assert all(parameter.grad is None for parameter in trainer.learner.trainable)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("fits", [0, 1])
def test_memory_too_short_for_two_probes_is_said_and_auto_takes_one_row(trainer, monkeypatch, fits):
    """The error of the first pass or of the second; both leave weights, gradients and random state alone."""
    calls = []
    real = Ranks.backward

    def runs_out(ranks, loss):
        calls.append(loss)
        if len(calls) > fits * 2:  # the first probe is repeated: its first pass only allocates gradients
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(ranks, loss)

    monkeypatch.setattr(Ranks, "backward", runs_out)
    random = torch.get_rng_state()
    with pytest.raises(RunError, match=r"out of memory with one row of \d+ tokens beside the base: set"):
        measure(trainer.learner, trainer.plan.groups, False)
    calls.clear()
    assert auto_micro_batch(trainer.learner, trainer.plan.groups) == 1
    assert all(parameter.grad is None for parameter in trainer.learner.trainable)
    assert torch.equal(random, torch.get_rng_state())


def test_the_probe_leaves_a_backends_own_checkpointing(trainer, monkeypatch):
    """transformers' switch would replace it."""

    def replaced(*_):
        raise AssertionError("the backend's own checkpointing was replaced")

    learner = trainer.learner
    core = bare(learner.model)
    assert learner.set_checkpointing is not None and Built.set_checkpointing is None
    monkeypatch.setattr(learner, "set_checkpointing", Built.set_checkpointing)
    for name in ("gradient_checkpointing_enable", "gradient_checkpointing_disable"):
        monkeypatch.setattr(core, name, replaced)
    assert auto_micro_batch(learner, trainer.plan.groups) >= 1


def test_memory_that_others_hold_is_not_counted_on(trainer, monkeypatch):
    learner, groups = trainer.learner, trainer.plan.groups
    monkeypatch.setattr(Cpu, "free_memory", property(lambda self: 64 * 2**30))
    assert auto_micro_batch(learner, groups) > 1
    monkeypatch.setattr(Cpu, "free_memory", property(lambda self: 2**20))
    assert auto_micro_batch(learner, groups) == 1
    found = measured(learner, trainer.plan, None)
    assert found["headroom"] < 0 and "already in use" in preflight_table(found)
    assert measured(learner, trainer.plan, 2**34)["in_use_elsewhere"] == 0, (
        "another GPU's memory is asked about"
    )


@pytest.mark.parametrize("own", [False, True])
def test_a_proposal_keeps_a_backends_own_checkpointing(own):
    for gb in (1.17, 3, 24):
        found = propose({own: FITS[own]}, 2**30, gb * 2**30, ROWS)
        assert found is None or found["train.gradient_checkpointing"] is own
    assert found["train.micro_batch_size"] >= 1


PLAIN = MemoryFit(LinearFit(0, 1000.0 * 1024), LinearFit(0, 1100.0 * 1024), 0.0, 300_000, 512)
CHECKPOINTED = MemoryFit(LinearFit(0, 50.0 * 1024), LinearFit(0, 100.0 * 1024), 0.0, 300_000, 512)
FITS = {False: PLAIN, True: CHECKPOINTED}
ROWS = MicroBatches(N=1000, M=600, each=1, most=32)


def test_proposals_grow_with_memory_and_fit_it():
    def at(gb: float):
        return propose(FITS, 2**30, gb * 2**30, ROWS)

    assert at(1.01) is None
    small, middle, large = at(1.17), at(3), at(24)
    assert small["train.loss_chunk_mb"] is not None and small["train.gradient_checkpointing"]
    assert middle["train.gradient_checkpointing"] and middle["train.loss_chunk_mb"] is None
    assert not large["train.gradient_checkpointing"]
    assert large["train.micro_batch_size"] > 4
    for proposal, gb in ((small, 1.17), (middle, 3), (large, 24)):
        assert proposal["predicted_peak"] <= gb * 2**30
    rows = [at(gb)["train.micro_batch_size"] for gb in (1.5, 2, 3, 4)]
    assert rows == sorted(rows)


def test_sizes_are_read_or_refused():
    assert read_size("16GB") == read_size("16 GiB") == 16 * 2**30 and read_size("512mb") == 512 * MIB
    for wrong in (
        "16",
        "GB",
        "lots",
        "16TB",
        "0GB",
        "-5GB",
        "0.0 MB",
        "infGB",
        "nanGB",
        "",
        "1e9GB",
        "9" * 99 + "GB",
    ):
        with pytest.raises(RequestError, match="--gpu-memory"):
            read_size(wrong)


def test_the_command(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.as_dict()))
    done = CliRunner().invoke(main, ["preflight", str(path), "--gpu-memory", "8GB", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["proposal"]["predicted_peak"] < found["available"] == 8 * 2**30
    done = CliRunner().invoke(main, ["preflight", str(path), "--gpu-memory", "soon"])
    assert done.exit_code == 2


def test_pairs_of_own_answers_are_measured_as_pairs():
    """A pair stays together, whatever the micro-batch; a step may have an odd number of them."""
    changes = ["data.sample=8", "train.batch_size=3", "train.micro_batch_size=1", "data.packing=false"]
    found = preflight(load_recipe("tiny_dpo", changes))
    assert found["longest_micro_batch"][0] == 2
    size, peak = (found["proposal"][key] for key in ("train.micro_batch_size", "predicted_peak"))
    assert size == 2  # one pair, since three are a step
    again = preflight(load_recipe("tiny_dpo", [*changes, f"train.micro_batch_size={size}"]))
    assert peak == pytest.approx(again["predicted_peak"], rel=0.05)


def test_an_objective_that_keeps_the_bases_log_probabilities_is_measured():
    changes = ["objective.name=iw-sft", "data.sample=8", "train.batch_size=4", "train.micro_batch_size=2"]
    assert preflight(load_recipe("tiny_dft", changes))["seconds_a_step"] > 0


@pytest.mark.parametrize("too_much", ["without checkpointing", "many rows"])
def test_what_does_not_fit_is_said_and_what_fits_is_proposed(monkeypatch, too_much):
    """The backward pass runs out of memory, as a small GPU would."""
    backward, score, rows = Ranks.backward, Learner.score, []

    def starved(ranks, loss):
        learner, batch = rows[-1]
        layers = [m for m in learner.model.modules() if getattr(m, "gradient_checkpointing", False)]
        if len(batch.ids) > 4 if too_much == "many rows" else not layers:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return backward(ranks, loss)

    def spy(learner, batch, sums):
        rows.append((learner, batch))
        return score(learner, batch, sums)

    monkeypatch.setattr(Learner, "score", spy)
    monkeypatch.setattr(Ranks, "backward", starved)
    found = preflight(load_recipe("tiny_dft", ["data.sample=16", "train.micro_batch_size=8"]))
    assert found["ran_out_of_memory"] and found["proposal"]
    assert found["gradient_checkpointing"] == (too_much == "without checkpointing")
    assert (found["seconds_a_step"] is None) == (too_much == "many rows")
    assert "the recipe as it is runs out of memory" in preflight_table(found)


@pytest.mark.parametrize(("free", "asked"), [(2**32, [(-3, MIB)]), (2**34, [])])
def test_freed_blocks_are_given_back_where_memory_is_short(monkeypatch, free, asked):
    """glibc's own setting, asked for by its number; elsewhere freed blocks are kept, which is faster."""
    calls = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    monkeypatch.setattr(Cpu, "free_memory", free)
    give_back_large_blocks(torch.device("cpu"))
    assert calls == asked
