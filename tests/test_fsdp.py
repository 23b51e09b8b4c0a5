"""A base shared among two gloo processes: the same adapter, half of the base in each, no orphan."""

import json
import os
import re
import signal
from collections import Counter
from functools import partial

import pytest
import torch
from fault_runs import finish, run, start
from patience import HANG, wait_for
from test_ddp import free_port, join, recipe, start_two, weights

from dft_lora.runs.folder import steps_in
from dft_lora.training.checkpoints import Checkpoints


@pytest.mark.parametrize(
    ("changes", "train"),
    [
        pytest.param(["model.dtype=bfloat16"], {}, id="nf4 stored as bfloat16"),
        pytest.param(
            ["objective.name=asft"],
            {"gradient_checkpointing": True},
            id="reference and checkpointing",
            marks=pytest.mark.slow,
        ),
        pytest.param(["objective.name=dft"], {}, id="nf4", marks=pytest.mark.slow),
        pytest.param(["model.quantization=none"], {}, id="not quantized", marks=pytest.mark.slow),
    ],
)
def test_a_shared_base_trains_the_adapter_that_whole_ones_train_to_the_bit(tmp_path, changes, train):
    """ASFT needs the base itself too: a second forward pass, adapter off."""
    changes = [word for change in changes for word in ("--set", change)]
    two_of_them(tmp_path, recipe(tmp_path, "whole", **train), *changes)
    two_of_them(tmp_path, recipe(tmp_path, "shared", shard=True, **train), *changes)
    whole, shared = weights(tmp_path / "whole"), weights(tmp_path / "shared")
    assert whole.keys() == shared.keys()
    assert all(torch.equal(weight, shared[name]) for name, weight in whole.items())
    assert any(weight.abs().max() > 1e-4 for name, weight in whole.items() if "lora_B" in name)
    all_of_it, share = (
        json.loads((tmp_path / name / "run.json").read_text())["frozen_mb"] for name in ("whole", "shared")
    )
    assert 0.5 * all_of_it < share < 0.7 * all_of_it  # embeddings and head are in each


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_layer_is_whole_at_a_time(tmp_path, checkpointing):
    """Checkpointing computes a layer's forward pass again, with the weights gathered for its backward."""
    path = recipe(tmp_path, "two", shard=True, max_steps=1, gradient_checkpointing=checkpointing)
    arguments, port = ("train", str(path), "--set", "data.packing=false"), free_port()
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    children = [start(*arguments, setup=partial(watch, rank, port, logs[rank])) for rank in (0, 1)]
    ends = [finish(child) for child in children]
    assert [code for code, _ in ends] == [0, 0], ends
    passes = 2 * 4  # micro-batches of each process, layers
    for log in logs:
        seen = Counter(log.read_text().splitlines())
        assert seen == {"forward 1": passes * (1 + checkpointing), "backward 1": passes}


def watch(rank: int, port: int, log) -> None:
    """In a child: a line in `log` for each pass of a layer, with how many layers are whole at that moment."""
    from torch.distributed.tensor import DTensor

    from dft_lora.model import backends
    from dft_lora.model.head import bare

    def shard_and_watch(model, device):
        shard(model, device)
        layers = bare(model).get_decoder().layers

        def note(kind, *_):
            whole = sum(
                not any(isinstance(weight, DTensor) for weight in layer.parameters()) for layer in layers
            )
            with log.open("a") as file:
                file.write(f"{kind} {whole}\n")

        for layer in layers:
            layer.mlp.register_forward_pre_hook(partial(note, "forward"))
            layer.mlp.register_full_backward_hook(partial(note, "backward"))

    join(rank, port)
    shard, backends.shard = backends.shard, shard_and_watch


@pytest.mark.slow
def test_dpo_over_a_shared_base_is_dpo_over_whole_ones(tmp_path):
    """Three epochs, in which a pair is not always the same rank's."""
    rows = [
        {
            "problem": f"{i} + 1?",
            "chosen": "so " * (1 + 3 * i % 13) + str(i + 1),
            "rejected": "no " * (1 + 7 * i % 11) + str(i),
        }
        for i in range(8)
    ]
    for name, shard in (("whole", False), ("shared", True)):
        train = {"batch_size": 4, "max_steps": 6, "shard": shard}
        path = recipe(tmp_path, name, "dpo", **train)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        two_of_them(tmp_path, path)
    whole, shared = weights(tmp_path / "whole"), weights(tmp_path / "shared")
    assert all(torch.equal(weight, shared[name]) for name, weight in whole.items())


def two_of_them(tmp_path, path, *arguments):
    ends = [finish(child) for child in start_two("train", str(path), *arguments)]
    assert [code for code, _ in ends] == [0, 0], ends


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_the_run_goes_on_to_the_bit(tmp_path):
    settings = {"max_steps": 40, "save_steps": 2, "shard": True}
    path = recipe(tmp_path, "two", **settings)
    children = start_two("train", str(path))
    checkpoints = Checkpoints(tmp_path / "two" / "checkpoints", keep=3)
    wait_for(lambda: len(steps_in(checkpoints.path)) >= 2 or not all(child.is_alive() for child in children))
    assert all(child.is_alive() for child in children), "no checkpoint"
    os.kill(children[1].pid, signal.SIGKILL)
    children[0].join(HANG)
    assert not children[0].is_alive(), "the other process hangs"
    code, log = finish(children[0])
    assert code == 1 and re.search(r"error: another process of this run is gone .*--resume", log), log
    assert "Traceback" not in log
    two_of_them(tmp_path, path, "--resume")
    two_of_them(tmp_path, recipe(tmp_path, "straight", **settings))
    straight = weights(tmp_path / "straight")
    assert all(torch.equal(weight, straight[name]) for name, weight in weights(tmp_path / "two").items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "train.shard: there is only one process"),
        (["model.backend=unsloth"], "train.shard: not with model.backend 'unsloth'"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, changes, words):
    changes = [word for change in changes for word in ("--set", change)]
    code, log = run("train", str(recipe(tmp_path, "one", shard=True)), *changes)
    assert code == 2 and words in log and "Traceback" not in log, log


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.batch_size=5"], "train.batch_size 5: with train.shard it must be a multiple of the 2"),
        (["data.packing=true"], "data.packing: true cannot be combined with train.shard"),
    ],
)
def test_two_processes_that_would_not_keep_step_are_refused(tmp_path, changes, words):
    changes = [word for change in changes for word in ("--set", change)]
    children = start_two("train", str(recipe(tmp_path, "two", shard=True)), *changes)
    for code, log in [finish(child) for child in children]:
        assert code == 2 and words in log and "Traceback" not in log, log
