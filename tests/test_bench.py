"""The bench measures what it says: its inputs, its truth, its peers' equality and its table."""

import json

import pytest
import torch
from click.testing import CliRunner

from dft_lora.bench import decode, packing
from dft_lora.bench.__main__ import main
from dft_lora.bench.decode import random_adapters
from dft_lora.bench.inputs import SOURCES, prescribed
from dft_lora.bench.loss import measure, relative, true_gradient
from dft_lora.bench.peers import FLOOR, VARIANTS
from dft_lora.bench.table import generation_table, loss_table
from dft_lora.config import ModelConfig
from dft_lora.data.batches import ungrouped
from dft_lora.data.templates import Example
from dft_lora.loss import token_logps
from dft_lora.model.head import bare
from dft_lora.model.load import load_base


@pytest.fixture(autouse=True)
def same_threads():
    """`measure` sets torch's thread count for its process; here the process is pytest's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_prescribed_probabilities_are_bimodal_with_large_logits():
    x = prescribed(2000, 64, 3000, dtype=torch.float32)
    scores = token_logps(x.hidden_ND, x.weight_VD, x.targets_N)
    p = scores.probability
    assert 0.35 < (p > 0.99).float().mean() < 0.55 and 0.2 < (p < 0.01).float().mean() < 0.45
    assert 0.55 < len(x.supervised) / 2000 < 0.65
    assert 15 < scores.lse.mean() < 25
    again = prescribed(2000, 64, 3000, dtype=torch.float32)
    assert torch.equal(again.hidden_ND, x.hidden_ND) and torch.equal(again.targets_N, x.targets_N)


@pytest.mark.parametrize("real_text", [True, False])
def test_a_forward_pass_over_text(real_text, request, monkeypatch, tmp_path):
    folder = request.getfixturevalue("data_dir") if real_text else tmp_path
    monkeypatch.setenv("DFT_LORA_DATA", str(folder))
    x = SOURCES["forward"](400, 64, 151_936 if real_text else 256)
    assert x.hidden_ND.shape == (400, 64) and torch.isfinite(x.hidden_ND).all()
    assert ("GSM8K" in x.description) == real_text
    assert 0 < len(x.supervised) < 400 and x.targets_N[0] == -100 and x.targets_N.max() < len(x.weight_VD)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.exact], ids=lambda v: v.name)
def test_every_peer_computes_the_same_gradient(variant):
    """Otherwise its time would mean nothing."""
    if variant.missing("cpu"):
        pytest.skip(variant.missing("cpu"))
    x = prescribed(60, 32, 500, dtype=torch.float32)
    hidden = x.hidden_ND.clone().requires_grad_()
    variant.run(hidden, x)
    assert relative(hidden.grad, true_gradient(x)) < 5e-3  # the budget of skip 1e-3; others are near 1e-6
    assert (hidden.grad[x.targets_N == -100] == 0).all()


def test_a_result_has_its_provenance_and_its_table(tmp_path):
    out = tmp_path / "loss.json"
    options = [
        "--tokens",
        "80",
        "--hidden",
        "64",
        "--vocabulary",
        "700",
        "--rounds",
        "1",
        "--only",
        "unchecked",
    ]
    done = CliRunner().invoke(main, ["loss", *options, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(out.read_text())
    assert {"date", "command", "commit", "versions", "peers"} <= set(result["provenance"])
    assert result["shape"]["V"] == 700 and result["device"] and result["threads"] == 1
    ours = result["variants"]["ours, values unchecked"]
    assert ours["peak_mb"] >= 0 and ours["gradient_error"] < 1e-2 and len(ours["seconds"]) == 1
    assert result["variants"][FLOOR.name]["ratio"] == 1
    assert result["skip"]["error"] <= result["skip"]["bound"] + 1e-9
    assert done.stdout.strip() == loss_table(result)


def test_what_is_missing_is_said():
    result = measure(
        source="prescribed",
        N=20,
        D=16,
        V=50,
        dtype="float32",
        device="cpu",
        rounds=1,
        threads=1,
        only="Liger",
    )
    reason = result["variants"]["Liger fused linear CE, token scaling"]["missing"]
    assert reason in ("liger_kernel is not installed", "needs a CUDA GPU")
    assert f"not run: {reason}" in loss_table(result)


@pytest.mark.slow
def test_generation_measures_the_same_work_on_every_side(monkeypatch):
    """The embedded base: each side decodes as many tokens; a case that is too large is named, not run."""
    base, _ = load_base(ModelConfig(unpack=True), for_answers=True)
    model = random_adapters(base, decode.RANKS)
    case = decode.Case(rows=6, prompt=5, adapters=3, temperature=1.0)
    requests = case.requests(4, vocabulary=64)
    assert [len(ticks) for ticks in decode.ours(model, requests)] == [5]
    assert [len(ticks) for ticks in decode.theirs_mended(model, requests)] == [5, 5, 5]
    assert not bare(model).get_output_embeddings()._forward_pre_hooks

    floors, floor_seconds = [], decode.floor_seconds

    def spy(weights, rows):
        floors.append(len(weights))
        return floor_seconds(weights, rows)

    monkeypatch.setattr(decode, "floor_seconds", spy)
    *_, result = decode.measure(
        "tiny", rows=(1, 6), prompts=(5, 50), tokens=4, rounds=1, most_prompt_tokens=100
    )
    assert len(result["cases"]) == 2 + 4 + 2 and len(result["left_out"]) == 2 + 2 + 4
    matrices = 7 * base.config.num_hidden_layers + 1
    assert floors == [matrices] * len(result["cases"]), "the floor has no adapters in it"
    for measured in result["cases"]:
        assert measured["floor_seconds"] > 0
        for side in measured["sides"].values():
            assert side["decode_tokens_per_second"] > 0 and side["prefill_tokens_per_second"] > 0
    assert len(generation_table(result).splitlines()) == 4 + len(result["cases"])


def test_every_arrangement_of_the_packing_bench_holds_the_same_tokens():
    groups = ungrouped([Example(str(i), tuple(range(1, 20 + 9 * i)), 5) for i in range(6)])
    for name, arrange in packing.arrangements(capacity=128, even=64.0).items():
        batches = arrange(groups, 2, 0)
        assert sum(batch.tokens for batch in batches) == sum(len(e.ids) for (e,) in groups), name
