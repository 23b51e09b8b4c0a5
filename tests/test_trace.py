"""A step traced on shapes alone takes the memory that a real step takes, and preflight uses it."""

import json
import shutil

import pytest
import torch
from bitsandbytes import functional
from click.testing import CliRunner

from dft_lora.bench.memory import _trace, longest_below
from dft_lora.cli import main
from dft_lora.config import parse_recipe
from dft_lora.data.batches import ungrouped
from dft_lora.data.templates import Example
from dft_lora.loss import objective
from dft_lora.model import backends, row_blocks
from dft_lora.model.head import bare
from dft_lora.model.load import load_base
from dft_lora.training.learner import Learner
from dft_lora.training.preflight import preflight_table
from dft_lora.training.probe import longest_batch, measure, probe, resident_bytes
from dft_lora.training.ranks import Ranks
from dft_lora.training.trace import traced

EXAMPLES = [Example(str(i), tuple(range(1, length)), 50) for i, length in enumerate((249, 240, 230, 150))]
DFT = objective("dft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("base")
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def recipe_of(base, **train):
    return parse_recipe(
        {
            "model": {"name": str(base), "dtype": "bfloat16"},
            "data": {"source": "word-problems"},
            "train": {"batch_size": 4, "micro_batch_size": 2, "loss_chunk_mb": 1, **train},
        }
    )


def step(learner):
    """Bytes of a micro-batch after the first one, and what stays after an update."""
    batch = longest_batch(learner, ungrouped(EXAMPLES), 2)
    probe(learner, batch, gauged=False)
    found = probe(learner, batch)
    learner.update(0.0)
    return found, resident_bytes(learner)


@pytest.fixture
def whole_tensors(monkeypatch):
    """A CPU that works as a GPU does: not in blocks of rows."""
    monkeypatch.setattr(backends, "norms_in_blocks", lambda model: None)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 2**40)


@pytest.mark.parametrize(
    "checkpointing, optimizer, dtype",
    [
        (True, "adamw8bit", "float32"),
        pytest.param(True, "adamw8bit", "bfloat16", marks=pytest.mark.slow),
        pytest.param(False, "adamw", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_trace_counts_what_a_real_step_takes(base, whole_tensors, checkpointing, optimizer, dtype):
    recipe = recipe_of(base, gradient_checkpointing=checkpointing, optimizer=optimizer)
    recipe = recipe.override([f"model.dtype={dtype}"])
    real, real_bytes = step(Learner(recipe, DFT, 0, Ranks(recipe)))
    with traced(recipe, DFT, 0) as learner:
        found, found_bytes = step(learner)
    assert (found.N, found.M) == (real.N, real.M)
    for name in ("saved", "loss_peak", "backward_peak"):
        assert getattr(found, name) == pytest.approx(getattr(real, name), rel=0.1), name
    assert found_bytes == pytest.approx(real_bytes, rel=0.02)


@pytest.fixture
def learner(base):
    with traced(recipe_of(base, gradient_checkpointing=False), DFT, 0) as made:
        yield made


def test_attention_scores_are_not_counted(learner):
    """The memory of a GPU's kernels grows with a row's length, not with its square."""
    rows = [Example("0", tuple(range(length)), 50) for length in (1024, 2048)]
    short, long = (probe(learner, longest_batch(learner, [(row,)], 1)).saved for row in rows)
    assert long / short == pytest.approx(2, rel=0.02)


def test_a_4_bit_product_unpacks_its_matrix(learner):
    layer = bare(learner.model).model.layers[0].mlp.up_proj.get_base_layer()
    x_ND = torch.empty(100, 256, dtype=torch.bfloat16, device="meta")
    gauge = learner.ranks.gauge
    gauge.reset()
    before = gauge.peak()
    y_NO = layer(x_ND)
    elements = 256 * 1024
    assert gauge.peak() - before == y_NO.nbytes + 2 * elements + 2 * 4 * elements // 64


def test_token_ids_and_masks_have_values(learner):
    """Shapes depend on them; floating-point numbers are not known, and read as 0."""
    labels_BL = torch.tensor([[5, -100, 7], [-100, -100, 9]]).to("meta")
    index = (labels_BL[:, 1:].flatten() != -100).nonzero()[:, 0]
    assert len(index) == 2 and int(index.sum()) == 1 + 3
    index += 1
    assert index.max().item() == 4 and not torch.equal(index, index + 1)
    assert torch.randn(3, device="meta").sum().item() == 0


def test_the_fit_for_auto_predicts_what_many_rows_take(base):
    """Also where unpacked weights outweigh the activations of one row: the growth shows from two rows on."""
    rows = ungrouped(Example(str(i), tuple(range(1, 61 - i % 4)), 8) for i in range(16))
    recipe = recipe_of(base, gradient_checkpointing=True, batch_size=16).override(["data.packing=false"])
    with traced(recipe, DFT, 0) as learner:
        fit = measure(learner, rows, checkpointing=True)
        probe(
            learner, longest_batch(learner, rows, 1), gauged=False
        )  # makes the gradients, which are resident
        for count in (2, 4, 16):
            found = probe(learner, longest_batch(learner, rows, count))
            assert fit.peak(found.N, found.M) == pytest.approx(found.peak, rel=0.1), count


def test_a_base_can_be_loaded_after_a_trace(base):
    """bitsandbytes keeps one table of numbers for the process: tracing must not leave it without contents."""
    functional.name2qmap.clear()
    with traced(recipe_of(base), DFT, 0):
        pass
    model, _ = load_base(recipe_of(base).model)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.slow
def test_a_sharded_base_is_held_in_parts(base):
    """All but the packed weights and norms of decoder layers, half of these, and three layers whole."""
    recipe = recipe_of(base).override(["data.max_length=256", "train.batch_size=8"])
    alone, half = (_trace(recipe, str(base), (1, 8), processes) for processes in (1, 2))
    layer = 256 * (256 + 2 * 128 + 256 + 3 * 1024) // 2 + 2 * (256 + 2 * 128) + 2 * 2 * 256
    assert alone["bytes"]["weights"] - half["bytes"]["weights"] == 4 * layer - 2 * layer - 3 * layer
    for found in (alone, half):
        small, large = found["gpus"]
        assert 1 <= small["rows"] <= large["rows"] == 8
        assert found["one_row"] < small["peak"] <= large["peak"] < 8 * 2**30


@pytest.mark.parametrize(
    "changes",
    [
        ["tiny_dpo"],
        pytest.param(["tiny_dft", "--set", "objective.name=cadft"], marks=pytest.mark.slow),
    ],
)
def test_objectives_whose_shapes_depend_on_values_are_traced(changes):
    small = ["data.sample=8", "train.batch_size=4", "train.micro_batch_size=2"]
    small += ["adapter.target_modules=[q_proj]"]  # what is traced here is the objective
    small = [part for change in small for part in ("--set", change)]
    done = CliRunner().invoke(main, ["preflight", *changes, *small, "--gpu-memory", "8GB", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counted"] == "traced tensors"


def test_preflight_for_a_gpu_that_is_not_here_reads_no_weights(qwen_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(qwen_dir, base)
    (base / "model.safetensors").unlink()
    recipe = {
        "model": {"name": str(base)},
        "data": {"source": "word-problems", "template": "plain"},
        "train": {"batch_size": 8, "micro_batch_size": 2, "max_steps": 3},
    }
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    command = ["preflight", str(tmp_path / "mine.json"), "--gpu-memory", "8GB", "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["counted"], found["dtype"]) == ("traced tensors", "bfloat16")
    assert found["seconds_a_step"] is None and found["seconds_in_all"] is None
    assert found["proposal"]["predicted_peak"] < found["available"] == 8 * 2**30
    text = preflight_table(found)
    assert "traced tensors" in text and "per step" not in text


@pytest.mark.parametrize("limit", [7_000, 30_000, 100_000, 10**7])
def test_the_longest_row_is_found_in_few_traces(limit):
    def peak(tokens):
        return 5_000 + 2 * tokens + max(0, tokens - 20_000)

    tried = {0: peak(0), 4096: peak(4096), 8192: peak(8192)}
    known = len(tried)
    found = longest_below(limit, peak, tried, grain=512, most=2**16)
    fits = [tokens for tokens in range(0, 2**16 + 1, 512) if peak(tokens) <= limit]
    assert found == max(fits)
    assert len(tried) - known <= 5
