"""`bench gpu` end to end without a GPU, and rehearsals of the branches that only CUDA takes (docs/gpu.md)."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dft_lora.bench.__main__ import main
from dft_lora.bench.gpu import steps
from dft_lora.bench.gpu.lab import Lab
from dft_lora.bench.gpu.loss import against_peers, row_kernel
from dft_lora.bench.gpu.run import child
from dft_lora.bench.gpu.stages import STAGES
from dft_lora.bench.peers import VARIANTS
from dft_lora.bench.table import gpu_table
from dft_lora.config import ModelConfig, load_recipe
from dft_lora.model import memory
from dft_lora.model.accelerator import Cpu, accelerator
from dft_lora.model.load import load_base
from dft_lora.model.random_base import write_random_base
from dft_lora.training import loop, probe
from dft_lora.training.checkpoints import random_state, set_random_state
from dft_lora.training.learner import Learner
from dft_lora.training.loop import train

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), torch.device("cpu"), small=True)


# --- the stages -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_stage_measures_every_peer_or_says_why_not(lab):
    found = dict(against_peers(lab, 1536, 2048))
    assert list(found) == [variant.name for variant in VARIANTS]
    for name, figures in found.items():
        assert "missing" in figures or (figures["seconds"] > 0 and figures["peak_mb"] >= 0), name
    assert found["ours"]["gradient_error"] < 0.02
    assert dict(row_kernel(lab))["kernel"] == {"missing": "no CUDA device"}


@pytest.mark.slow
def test_memory_auto_and_retreat_on_a_base_of_random_weights(lab):
    found = dict(steps.memory(lab, "7B"))
    assert set(found) == {"trace", "preflight's fit"}
    (rows,) = dict(steps.auto(lab, "1.5B")).values()
    assert rows["fits"] and rows["rows"] == probe.MOST_ROWS
    (line,) = dict(steps.retreat(lab)).values()
    assert line["recovered"] and line["rows"] == 2


def test_random_weights_are_those_of_the_seed(tmp_path):
    config = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_base(tmp_path / name, config, seed)
    ids = torch.tensor([[1, 2, 3]])
    a, b, c = (load_base(ModelConfig(name=str(tmp_path / name)))[0](ids).logits for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c) and a.std() > 0.01


# --- the driver -------------------------------------------------------------------------------


def ended(script: str, seconds: float = 60.0):
    kept = []
    with tempfile.TemporaryFile("w") as log:
        end = child([sys.executable, "-c", script], seconds, log, lambda *result: kept.append(result))
    return end, kept


SAY = "import json; print(json.dumps(['a', {'x': 1}]), flush=True); "


@pytest.mark.parametrize(
    ("rest", "end"),
    [
        ("", {}),
        ("print(json.dumps(['error', 'ValueError: no']))", {"error": "ValueError: no"}),
        ("print(json.dumps(['missing', 'no trl']))", {"missing": "no trl"}),
        ("raise SystemExit(3)", {"error": "ended with code 3 (see gpu.log)"}),
        ("import os; os.kill(os.getpid(), 11)", {"error": "died of signal 11"}),
    ],
)
def test_a_stage_that_fails_keeps_its_results_and_says_why(rest, end):
    assert ended(SAY + rest) == (end, [("a", {"x": 1})])


@pytest.mark.slow
def test_a_stage_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    script = f"{SAY}import subprocess, time; p = subprocess.Popen(['sleep', '600']); "
    script += f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    # Time enough to start a Python; a wait for the file would need a thread.
    end, kept = ended(script, seconds=15)
    assert "its share of the time" in end["error"] and kept == [("a", {"x": 1})]
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid.read_text()}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(OSError):
        os.readlink(f"/proc/{pid.read_text()}/cwd")  # gone, or a zombie


def test_the_table_says_what_was_found_and_what_not():
    result = {
        "machine": {"name": "Tesla T4", "capability": "7.5", "memory_gb": 14.6, "cuda": "13.0"},
        "stages": {
            "float16": {"seconds": 9.0, "results": {"three steps": {"equal": True, "loss_differs": 0.001}}},
            "unsloth": {"seconds": 3.0, "results": {}, "missing": "unsloth is not installed"},
        },
        "provenance": {
            "date": "2026-12-01T10:00",
            "commit": "abc",
            "peers": {"python": "3.12", "trl": None},
            "versions": {"torch": "2.11.0", "transformers": "5.17.0", "bitsandbytes": "0.50.2"},
        },
    }
    text = gpu_table(result)
    assert text.startswith("**Tesla T4, 14.6 GB, compute capability 7.5, CUDA 13.0**; torch 2.11.0")
    assert "| float16 | 9 | three steps | equal yes, loss differs 0.001 |" in text
    assert "| unsloth | 3 |  | missing: unsloth is not installed |" in text


@pytest.mark.slow
def test_the_rehearsal_runs_end_to_end(tmp_path):
    done = CliRunner().invoke(
        main, ["gpu", "--device", "cpu", "--small", "--minutes", "60", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out").glob("*.json")
    stages = json.loads(path.read_text())["stages"]
    assert list(stages) == [stage.name for stage in STAGES if stage.rehearsed]
    assert not {name: found["error"] for name, found in stages.items() if "error" in found}
    missing = {name for name, found in stages.items() if "missing" in found}
    assert missing <= {"tests", "variable-length attention", "unsloth"}
    assert stages["float16"]["results"]["three steps"]["equal"]
    assert stages["kill and resume"]["results"]["adapter"]["bit_exact"]


# --- rehearsed, not run: one stand-in at one seam each ----------------------------------------


def test_a_checkpoint_holds_the_generator_of_the_gpu(monkeypatch):
    device_state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: device_state.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: device_state.copy_(state))
    kept = random_state(CUDA)
    first = torch.rand(3)
    device_state.zero_()
    set_random_state(kept, CUDA)
    assert torch.equal(device_state, torch.arange(16, dtype=torch.uint8))
    assert torch.equal(torch.rand(3), first)


def test_the_gauge_of_a_gpu_is_pytorchs_allocator(monkeypatch):
    numbers = {
        "memory_allocated": 5,
        "memory_reserved": 6,
        "max_memory_allocated": 7,
        "reset_peak_memory_stats": None,
    }
    for name, value in {**numbers, "synchronize": None, "mem_get_info": (3, 9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    gauge = memory.memory_of(CUDA)
    assert (gauge.now(), gauge.peak(), gauge.reset()) == (5, 7, None)
    assert accelerator(CUDA).free_memory == 3 + 1, "free ones and those that the allocator keeps"


@pytest.mark.parametrize(("megabytes", "rows"), [(1, 1), (10**6, 8)])
def test_auto_takes_the_rows_that_fit_before_the_first_step(tmp_path, monkeypatch, megabytes, rows):
    monkeypatch.setattr(Learner, "finds_micro_batch", True)
    monkeypatch.setattr(Cpu, "total_memory", megabytes * 2**20)
    changes = ["data.sample=8", "train.batch_size=8", "train.micro_batch_size=auto", "train.max_steps=1"]
    run = loop.train(load_recipe("tiny_dft", [*changes, f"output={tmp_path / 'run'}"]))
    assert run.run()["micro_batch_size"] == rows


def test_the_paged_optimizer_takes_the_steps_of_the_8_bit_one(tmp_path):
    """States of small tensors are not paged, so both run without CUDA."""
    found = []
    for name in ("adamw8bit", "paged_adamw8bit"):
        changes = [
            f"train.optimizer={name}",
            "data.sample=8",
            "train.batch_size=2",
            "train.micro_batch_size=2",
        ]
        run = train(load_recipe("tiny_dft", [*changes, "train.max_steps=2", f"output={tmp_path / name}"]))
        found.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
