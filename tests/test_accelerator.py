"""XPU and MPS, rehearsed: a fake answers what the kit asks of a device; the tensors stay on the CPU."""

import json
import logging
from datetime import timedelta
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from dft_lora.config import load_recipe
from dft_lora.errors import RecipeError, RequestError
from dft_lora.evaluation.shard import Shard
from dft_lora.model.accelerator import KINDS, Accelerator, Cpu, Mps, accelerator, default_device
from dft_lora.model.generate import Request, _choose, _Row, random_stream
from dft_lora.model.hardware import choose
from dft_lora.model.limits import overflows_float16
from dft_lora.training.faults import is_out_of_memory
from dft_lora.training.loop import train
from dft_lora.training.ranks import Ranks

CPU = torch.device("cpu")
STEPS = [
    "train.max_steps=1",
    "train.batch_size=2",
    "train.micro_batch_size=1",
    "data.sample=8",
]


class TorchModule(SimpleNamespace):
    """torch.xpu or torch.mps: one generator, a fixed memory, and a count of what was asked."""

    def __init__(self):
        super().__init__(asked=set(), generator=torch.arange(8, dtype=torch.uint8))

    def __getattr__(self, name):
        answers = {
            "get_device_name": "an accelerator",
            "get_device_properties": SimpleNamespace(total_memory=2**33, has_fp64=False),
            "recommended_max_memory": 2**33,
            "current_allocated_memory": 2**32,
            "mem_get_info": (2**32, 2**33),
            "memory_allocated": 2**20,
            "memory_reserved": 2**20 + 2**19,
            "max_memory_allocated": 2**21,
        }

        def call(*arguments):
            self.asked.add(name)
            if name == "get_rng_state":
                return self.generator.clone()
            if name == "set_rng_state":
                self.generator.copy_(arguments[0])
            return answers.get(name)

        return call


class NoFloat64(TorchDispatchMode):
    """Apple's GPUs, and some of Intel's: a float64 tensor cannot exist there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(getattr(x, "dtype", None) == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"{func}: this device has no float64")
        return out


@pytest.fixture(params=["xpu", "mps"])
def fake(request, monkeypatch):
    """torch's module of an accelerator that answers in place of the CPU."""
    base = {"xpu": Accelerator, "mps": Mps}[request.param]
    module = TorchModule()
    answers = {"kind": request.param, "_torch": module, "computes_bfloat16": False}
    monkeypatch.setitem(KINDS, "cpu", type("Fake", (base,), answers))
    return module


def test_a_resumed_run_takes_up_the_devices_own_generator(fake, tmp_path):
    """With cadft, which also sums over each example."""
    recipe = [*STEPS, "objective={name: cadft}", f"output={tmp_path / 'run'}"]
    with NoFloat64():
        train(load_recipe("tiny_dft", recipe))
    fake.generator.zero_()
    run = train(load_recipe("tiny_dft", [*recipe, "train.max_steps=2"]), resume=True, extend=True)
    assert torch.equal(fake.generator, torch.arange(8, dtype=torch.uint8))
    assert run.run()["recipe"]["model"]["quantization"] == "nf4"


def test_memory_is_what_the_device_says(fake):
    device = accelerator(CPU)
    kept = 2**19 if device.counts_memory else 0  # by the allocator, for reuse
    assert (device.total_memory, device.free_memory) == (2**33, 2**32 + kept)
    if device.counts_memory:
        assert (device.allocated(), device.peak()) == (2**20, 2**21)


def test_a_draw_is_the_same_where_float64_is_missing(monkeypatch):
    """There the logits go to the CPU first. The device is one without contents, so nothing else can."""
    logits_RV = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    asked = [Request((1, 2), None, seed=seed) for seed in range(2)]

    def to(device):
        assert device == CPU
        return logits_RV

    def drawn(h_RD, logits):
        rows = [_Row(i, request, random_stream(request)) for i, request in enumerate(asked)]
        return _choose(SimpleNamespace(row_bytes=1, raw_logits=lambda h_RD: logits), h_RD, rows)

    monkeypatch.setitem(KINDS, "meta", Mps)
    on_meta = drawn(torch.empty(2, 8, device="meta"), SimpleNamespace(to=to))
    assert on_meta == drawn(torch.empty(2, 8), logits_RV)


def test_the_dtype_follows_what_the_device_computes(fake, monkeypatch):
    monkeypatch.setattr(KINDS["cpu"], "computes_bfloat16", True)
    assert choose(parameters=10**9, device=CPU).dtype == torch.bfloat16
    monkeypatch.setattr(KINDS["cpu"], "computes_bfloat16", False)
    assert choose(parameters=10**9, device=CPU).dtype == torch.float32


def test_processes_wait_for_each_other_longer_than_ten_minutes(monkeypatch):
    """NCCL's default, after which one that is done would kill the others, which still answer or sample."""
    asked = {}
    accelerated = accelerate.Accelerator

    def spy(**options):
        asked["training"] = options["kwargs_handlers"][0].timeout
        return accelerated(**options)

    def state(cpu, timeout):
        asked["evaluation"] = timeout
        return SimpleNamespace(process_index=1, num_processes=2)

    monkeypatch.setattr(accelerate, "Accelerator", spy)
    monkeypatch.setattr(accelerate, "PartialState", state)
    Ranks(load_recipe("tiny_dft"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Shard.of_this_process() == Shard(1, 2)
    assert len(asked) == 2 and min(asked.values()) > timedelta(days=1)


def test_gemma_is_not_computed_in_float16(monkeypatch):
    gemma, qwen = (AutoConfig.for_model(kind) for kind in ("gemma3_text", "qwen2"))
    monkeypatch.setitem(KINDS, "cuda", type("T4", (Accelerator,), {"name": "T4", "computes_bfloat16": False}))
    for config, dtype in ((gemma, torch.float32), (qwen, torch.float16)):
        chosen = choose("auto", 10**9, torch.device("cuda", 0), overflows_float16(config))
        assert chosen.dtype == dtype and chosen.scales_loss == (dtype == torch.float16)
    assert choose("float16", 10**9, torch.device("cuda", 0), overflows=True).dtype == torch.float16


def test_without_4_bits_the_base_stays_in_16_and_the_run_says_so(fake, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(KINDS["cpu"], "quantizes", False)
    with caplog.at_level(logging.WARNING):
        run = train(load_recipe("tiny_dft", [*STEPS, f"output={tmp_path / 'run'}"]))
    assert "model.quantization: bitsandbytes cannot compute with nf4 on" in caplog.text
    assert caplog.text.count("stays in 16 bits") == 1
    assert run.run()["recipe"]["model"]["quantization"] == "none"
    assert "quantization_config" not in json.dumps(run.run())
    loftq = ["adapter.init=loftq", f"output={tmp_path / 'loftq'}"]
    with pytest.raises(RecipeError, match="loftq corrects what 4 bits lost"):
        train(load_recipe("tiny_dft", loftq))


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_an_accelerator_that_torch_finds_is_taken(monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setenv("LOCAL_RANK", "1")
    for count, index in ((2, 1), (1, 0)):  # SLURM may show each process one device only
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        assert default_device() == torch.device(kind, index)
    monkeypatch.delenv("LOCAL_RANK")  # without a launcher: the device that the caller chose
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 2)
    assert default_device() == torch.device(kind, 2)
    monkeypatch.setenv("DFT_LORA_DEVICE", "cpu")
    assert default_device() == CPU
    monkeypatch.setenv("DFT_LORA_DEVICE", "gpu")
    with pytest.raises(RequestError, match="DFT_LORA_DEVICE=gpu: only 'cpu'"):
        default_device()


def test_bitsandbytes_computes_on_both():
    assert Accelerator(torch.device("xpu")).quantizes and Mps(torch.device("mps")).quantizes
    assert not Accelerator(torch.device("mtia")).quantizes


def test_the_out_of_memory_error_of_mps_is_known():
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"))


def test_a_container_has_the_memory_of_its_limit(tmp_path):
    host = Cpu(torch.device("cpu"))
    assert host._container(tmp_path) == (2**62, 0), "no such files: no limit"
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host._container(tmp_path) == (2**62, 0)
    (tmp_path / "memory.max").write_text("9000\n")
    assert host._container(tmp_path) == (9000, 4000)
