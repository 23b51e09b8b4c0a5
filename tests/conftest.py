"""Shared fixtures. Real data is found through DFT_LORA_DATA (default ../shared/data)."""

import gc
import os
from pathlib import Path

import pytest
from patience import HANG

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: one thread per worker, in its subprocesses too. Workers that each use every
    # core wait for one another; the tests' tensors are so small that more threads gain nothing.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = """ui_browser train generate faults resume preflight evaluate judge trace fsdp notebooks ui_server
rollouts hub patch demo ddp gpu gguf adapter_options sweep benchmarks packaging real ui_train side_by_side
code"""
"""The test files that take more than ten seconds, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: two workers that take one file at a time then end together."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What the test files import stays, so the garbage collector need not look at it: a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def patient_judge() -> None:
    """The judge's limit on the clock waits for a busy machine; its limit of processor time stays."""
    from dft_lora.tasks import judge

    judge.PATIENCE = HANG


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real benchmark files and tokenizers; absent: a skip for a person, an error in CI."""
    path = Path(os.environ.get("DFT_LORA_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        message = f"no real data at {path}: set DFT_LORA_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def qwen_dir(data_dir, tmp_path_factory) -> Path:
    """A random-weight Qwen2-shaped model that carries the real Qwen2.5 tokenizer (vocabulary 151,936)."""
    import shutil

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("qwen")
    for file in (data_dir / "tokenizers" / "qwen2.5").iterdir():
        shutil.copy(file, path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=151_643,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def many_runs():
    """For a file of many runs over the embedded base, and not about how it is loaded or what is drawn.

    The base is read and quantized once for each way to hold it, and copied; training draws no curves.
    """
    from copy import deepcopy

    from dft_lora.evaluation import engines
    from dft_lora.experiments import own_samples
    from dft_lora.model import backends
    from dft_lora.training import loop, side_by_side

    load_base, kept = backends.load_base, {}

    def copied(config, device=None, **how):
        if config.name != "tiny":
            return load_base(config, device, **how)
        key = config, device, tuple(how.items())
        if key not in kept:
            kept[key] = load_base(config, device, **how)
        model, hardware = kept[key]
        return deepcopy(model), hardware

    with pytest.MonkeyPatch.context() as patch:
        for module in (backends, engines, own_samples, side_by_side):
            patch.setattr(module, "load_base", copied)
        patch.setattr(loop, "curves", lambda folders, file: None)
        yield


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision per process: forget it before and after a test that asks for another."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def url():
    """The page over the embedded base, served; its address."""
    from ui_cases import served

    with served() as address:
        yield address
