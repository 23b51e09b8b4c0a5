"""Two gloo processes on a CPU: the same adapter as one process, and no orphan when one of them dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from fault_runs import finish, run, start, write_data, write_recipe
from patience import HANG, wait_for
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from dft_lora.runs.folder import RunFolder, steps_in
from dft_lora.training.checkpoints import Checkpoints

PLAIN = {"optimizer": "adamw", "max_steps": 4, "batch_size": 6, "save_steps": None}


def join(rank: int, port: int) -> None:
    """What a launcher sets in the environment of each process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(*arguments: str) -> list:
    port = free_port()
    return [start(*arguments, setup=partial(join, rank, port)) for rank in (0, 1)]


def recipe(tmp_path, name: str, objective: str = "dft", **train):
    data = write_data(tmp_path / "rows.jsonl")
    adapter = {"r": 8, "dropout": 0.0, "target_modules": "all-linear"}
    changes = {"train": PLAIN | train, "adapter": adapter, "objective": {"name": objective}}
    return write_recipe(tmp_path / f"{name}.json", data, tmp_path / name, **changes)


def weights(path):
    return load_file(path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("objective", [pytest.param("dft", marks=pytest.mark.slow), "cadft"])
def test_two_processes_equal_one(tmp_path, objective):
    """Examples of different lengths: a mean of each process's means would be far off, and so would cadft's
    standard scores over each process's examples."""
    code, log = run("train", str(recipe(tmp_path, "one", objective)))
    assert code == 0, log
    ends = [finish(child) for child in start_two("train", str(recipe(tmp_path, "two", objective)))]
    assert [code for code, _ in ends] == [0, 0], ends
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() <= 1e-5, name
    assert any(weight.abs().max() > 1e-4 for name, weight in one.items() if "lora_B" in name)
    for a, b in zip(
        RunFolder(tmp_path / "one").metrics(), RunFolder(tmp_path / "two").metrics(), strict=True
    ):
        assert a["supervised_tokens"] == b["supervised_tokens"] and a["tokens"] == b["tokens"]
        assert b["nll"] == pytest.approx(a["nll"], abs=1e-5) and b["loss"] == pytest.approx(
            a["loss"], abs=1e-5
        )


def test_two_processes_share_the_answers_of_a_rollout(tmp_path):
    """Each samples for half of the prompts; rewards, advantages and the adapter are those of one process."""
    made = {}
    for name in ("one", "two"):
        changes = {
            "objective": {"name": "grpo"},
            "rollouts": {"samples": 4, "max_new_tokens": 48, "updates": 2},
            "adapter": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
            "train": PLAIN | {"batch_size": 6, "max_steps": 2},
        }
        path = write_recipe(tmp_path / f"{name}.json", tmp_path, tmp_path / name, **changes)
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"data": {"sample": 12, "max_length": 256}})
        )
        children = start_two("train", str(path)) if name == "two" else [start("train", str(path))]
        ends = [finish(child) for child in children]
        assert {code for code, _ in ends} == {0}, ends
        made[name] = weights(tmp_path / name)
    for name, weight in made["one"].items():
        assert (weight - made["two"][name]).abs().max() <= 1e-4, name
    for a, b in zip(*(RunFolder(tmp_path / name).metrics() for name in made), strict=True):
        assert a["reward"] == b["reward"] and a["generated_tokens"] == b["generated_tokens"]
        assert a["answers"] == b["answers"] == 12 and a["supervised_tokens"] == b["supervised_tokens"]


def join_and_starve(rank: int, port: int) -> None:
    """`join`; the first rank runs out of memory in its first pass, after DDP has prepared it."""
    join(rank, port)
    if rank == 0:
        pass_once = DistributedDataParallel._run_ddp_forward

        def starved(*_, **__):
            DistributedDataParallel._run_ddp_forward = pass_once
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        DistributedDataParallel._run_ddp_forward = starved


def test_a_rank_out_of_memory_in_its_first_pass_leaves_none_waiting(tmp_path):
    path, port = str(recipe(tmp_path, "two", max_steps=2, micro_batch_size=2)), free_port()
    children = [start("train", path, setup=partial(join_and_starve, rank, port)) for rank in (0, 1)]
    ends = [finish(child) for child in children]
    assert [code for code, _ in ends] == [0, 0], ends
    folder = RunFolder(tmp_path / "two")
    assert len(folder.metrics()) == 2 and folder.run()["retreats"]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_with_a_valid_checkpoint(tmp_path, victim):
    path = recipe(tmp_path, "two", max_steps=10_000, save_steps=2)
    children = start_two("train", str(path))
    checkpoints = Checkpoints(tmp_path / "two" / "checkpoints", keep=3)
    wait_for(lambda: len(steps_in(checkpoints.path)) >= 2 or not all(child.is_alive() for child in children))
    assert all(child.is_alive() for child in children), "no checkpoint"
    os.kill(children[victim].pid, signal.SIGKILL)
    children[1 - victim].join(HANG)
    assert not children[1 - victim].is_alive(), "the other process hangs"
    code, log = finish(children[1 - victim])
    assert code == 1
    assert re.search(r"error: another process of this run is gone .*--resume", log), log
    assert "Traceback" not in log
    state, _ = checkpoints.newest()
    assert state.step >= 2 and all(torch.isfinite(weight).all() for weight in state.adapter.values())


@pytest.mark.slow
def test_the_documented_launcher_starts_two_processes(tmp_path):
    """torchrun, which is what `accelerate launch --multi_gpu` calls; accelerate's `--cpu` starts only one."""
    path = recipe(tmp_path, "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "dft_lora", "train", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["provenance"]["processes"] == 2
    assert len(RunFolder(tmp_path / "two").metrics()) == 4
