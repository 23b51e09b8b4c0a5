"""The examples of docs/trainers.md, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_ddp import free_port
from trainers import BATCH, RATE, STEPS, adapter_of, arguments, built, losses_of, padded, plan_of, rows_of

from dft_lora.training.ranks import Ranks
from dft_lora.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "trainers.md").read_text()


def example(heading: str) -> str:
    """The last code block below a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    return re.findall(r"```python\n(.*?)```", section, re.S)[-1]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("plan"), quantization="none")


@pytest.fixture(scope="module")
def own(plan):
    """Losses and adapter of our loop."""
    trainer = Trainer(plan, Ranks(plan.recipe))
    return [trainer.step(i)["loss"] for i in range(STEPS)], adapter_of(trainer.learner.adapter_model)


def assert_same(adapter, own):
    assert adapter.keys() == own[1].keys()
    for name, weight in own[1].items():
        assert (adapter[name] - weight).abs().max() < 2e-4, name


class Kept:
    """Stands in for a trainer's class, to look at the trainer that an example makes."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, *args, **kwargs):
        self.made = self.kind(*args, **kwargs)
        return self.made


def test_transformers(plan, own, tmp_path, monkeypatch):
    import transformers

    kept = Kept(transformers.Trainer)
    monkeypatch.setattr(transformers, "Trainer", kept)
    model = built(plan)
    exec(
        example("transformers"),
        {
            "model": model,
            "arguments": arguments(tmp_path),
            "rows": rows_of(plan),
            "collate": padded,
        },
    )
    assert losses_of(kept.made) == pytest.approx(own[0], rel=1e-4)
    assert_same(adapter_of(model), own)


def test_trl(plan, own, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset

    kept = Kept(trl.SFTTrainer)
    monkeypatch.setattr(trl, "SFTTrainer", kept)
    model = built(plan)
    settings = arguments(tmp_path, trl.SFTConfig, max_length=256, bf16=False, gradient_checkpointing=False)
    exec(
        example("TRL"),
        {
            "model": model,
            "arguments": settings,
            "dataset": Dataset.from_list(rows_of(plan)),
            "tokenizer": plan.renderer.tokenizer,
        },
    )
    assert losses_of(kept.made) == pytest.approx(own[0], rel=1e-4)
    assert_same(adapter_of(model), own)
    first = kept.made.state.log_history[0]
    assert 0.5 < first["mean_token_accuracy"] < 1 and 0 < first["entropy"] < 1


def accelerate_loop(plan, rank=0, world=1):
    """The example of the page, over each process's share of every batch; the adapter."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, rows = built(plan), rows_of(plan)
    batches = [padded(rows[start : start + BATCH][rank::world]) for start in range(0, len(rows), BATCH)]
    settings = plan.recipe.train
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=RATE, betas=settings.betas, weight_decay=settings.weight_decay
    )
    model.train()
    exec(
        example("accelerate, DDP"),
        {
            "model": model,
            "optimizer": optimizer,
            "batches": batches,
            "accelerator": accelerator,
        },
    )
    return adapter_of(model)


@pytest.mark.slow
def test_accelerate_in_two_processes(plan, own, tmp_path):
    """The shares differ in length: a mean of the processes' means would be off."""
    code = (
        "import sys, torch; from pathlib import Path\n"
        "sys.path.insert(0, 'tests'); import test_trainers as t\n"
        "out, rank = Path(sys.argv[1]), int(sys.argv[2])\n"
        "adapter = t.accelerate_loop(t.plan_of(out, quantization='none'), rank, 2)\n"
        "torch.save(adapter, out / f'{rank}.pt')"
    )
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    joined |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)],
            cwd=ROOT,
            env=os.environ | joined | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ends = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same({name.removeprefix("module."): weight for name, weight in one.items()}, own)


def test_axolotl(plan, own, tmp_path, monkeypatch):
    """The plugin of the page, called as axolotl calls it, with a stand-in for its base class alone."""
    import transformers

    stand_in = ModuleType("axolotl.integrations.base")
    stand_in.BasePlugin = object
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    names = {}
    exec(example("axolotl"), names)
    model = built(plan)
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=rows_of(plan), data_collator=padded
    )
    names["Dft"]().post_trainer_create(None, trainer)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(own[0], rel=1e-4)
    assert_same(adapter_of(model), own)


def test_every_example_of_the_page_is_run():
    """A section with Python has a test above, named after its heading."""
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    shown = {heading for heading, text in sections if "```python" in text}
    source = Path(__file__).read_text()
    assert shown == set(re.findall(r'example\("(.*?)"\)', source))


def test_just_the_loss():
    torch.manual_seed(0)
    names = {
        "hidden": torch.randn(6, 4, requires_grad=True),
        "weight": torch.randn(9, 4),
        "targets": torch.tensor([1, -100, 3, 8, 0, -100]),
    }
    exec(example("Just the loss"), names)
    assert names["hidden"].grad.norm() > 0
