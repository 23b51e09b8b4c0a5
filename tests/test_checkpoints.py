"""What is written can be trusted: whole or not there, every damage seen, nothing executed."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

from dft_lora.config import digest
from dft_lora.errors import RunError
from dft_lora.runs.atomic import damage, discard, write_folder
from dft_lora.runs.folder import steps_in
from dft_lora.training.checkpoints import (
    PARTS,
    Checkpoints,
    State,
    pack,
    random_state,
    set_random_state,
    unpack,
)

FORK = multiprocessing.get_context("fork")


class Config:
    """Stands where a peft config stands."""

    def to_dict(self):
        return {"peft_type": "LORA", "target_modules": {"v_proj", "q_proj"}}


def make_state(step: int, width: int = 64) -> State:
    generator = torch.Generator().manual_seed(step)
    quantised = torch.randint(0, 256, (width, 64), generator=generator, dtype=torch.uint8)
    shared = torch.rand(256, generator=generator)
    of_parameter = {"step": 3, "state1": quantised, "qmap1": shared, "qmap2": shared, "none": None}
    groups = [{"lr": 1e-3 / 3, "betas": (0.9, 0.95), "params": [0, 1]}]
    optimizer = {"state": {0: of_parameter, 1: {"step": torch.tensor(7.0)}}, "param_groups": groups}
    return State(
        step=step,
        adapter={"layer.lora_A.weight": torch.randn(width, 64, generator=generator)},
        optimizer=optimizer,
        random=random_state(torch.device("cpu"))[None],
        progress={"seconds": 1 / 3, "layout": {"micro_batch_size": 2, "chunk_bytes": None}},
    )


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def same(a: State, b: State) -> bool:
    return equal(vars(a), vars(b))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Checkpoints of steps 10 and 20."""
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20):
        made.save(make_state(step), Config())
    return made


def test_a_checkpoint_comes_back_to_the_bit(checkpoints):
    state, passed_over = checkpoints.newest()
    assert same(state, make_state(20)) and not passed_over
    config = json.loads((checkpoints.path / "step-000020" / "adapter" / "adapter_config.json").read_text())
    assert config == {"inference_mode": True, "peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}


def test_pack_refuses_what_json_and_safetensors_cannot_hold():
    tensors = {}
    tree = {"a": [1, (2.5, None)], 3: {"b": torch.ones(2)}}
    assert equal(unpack(json.loads(json.dumps(pack(tree, tensors))), tensors), tree)
    with pytest.raises(TypeError, match=r"\.a\.0: a set"):
        pack({"a": [{1}]}, {})


def test_random_state_brings_back_the_same_draws():
    states = []
    for seed in (1, 2):  # two ranks
        torch.manual_seed(seed)
        states.append((random_state(torch.device("cpu")), torch.rand(5)))
    ranks = torch.stack([state for state, _ in states])
    for state, (_, drawn) in zip(ranks, states, strict=True):
        set_random_state(state, torch.device("cpu"))
        assert torch.equal(torch.rand(5), drawn)


def test_old_ones_are_pruned_after_the_new_one_and_so_is_an_abandoned_line(checkpoints):
    checkpoints.save(make_state(30), Config())
    assert [path.name for path in steps_in(checkpoints.path).values()] == ["step-000020", "step-000030"]
    (checkpoints.path / "step-000030" / "state.json").unlink()
    assert checkpoints.newest()[0].step == 20
    checkpoints.save(make_state(25), Config())
    assert [path.name for path in steps_in(checkpoints.path).values()] == ["step-000020", "step-000025"]


def test_the_same_step_can_be_saved_again(checkpoints):
    checkpoints.save(make_state(20, width=8), Config())
    assert same(checkpoints.newest()[0], make_state(20, width=8))


@pytest.mark.parametrize("part", [*PARTS, "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated"])
def test_each_file_is_needed_whole(checkpoints, part, how):
    file = checkpoints.path / "step-000020" / part
    content = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes(
        content[: 0 if how == "empty" else len(content) // 2]
    )
    state, passed_over = checkpoints.newest()
    assert same(state, make_state(10))
    assert len(passed_over) == 1 and passed_over[0].startswith("step-000020: ") and part in passed_over[0]


def test_a_checkpoint_sealed_without_its_optimizer_is_an_error(checkpoints):
    shutil.rmtree(checkpoints.path / "step-000010")
    path = checkpoints.path / "step-000020"
    files = [(name, (path / name).read_bytes()) for name in PARTS if not name.startswith("optimizer")]
    write_folder(path, files)
    with pytest.raises(RunError, match=r"step-000020: optimizer\.safetensors is not in its manifest\.json"):
        checkpoints.newest()


def test_a_manifest_cannot_point_outside(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    files = {"../secret": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"files": files, "sha256": digest(files)}))
    assert "outside" in damage(tmp_path / "a")


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert Checkpoints(tmp_path / "nothing", keep=1).newest() == (None, [])


def flip_bits(checkpoints: Checkpoints, count: int) -> int:
    """Flip a random bit in any file of any checkpoint, look, put it back; how many were found and named."""
    rng, found = random.Random(0), 0
    files = sorted(path for path in checkpoints.path.rglob("*") if path.is_file())
    for _ in range(count):
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(content)
        name = file.relative_to(checkpoints.path).parts[0]
        found += damage(checkpoints.path / name, PARTS) is not None
        state, passed_over = checkpoints.newest()
        if name == "step-000020":
            assert state.step == 10 and passed_over[0].startswith("step-000020: ")
        file.write_bytes(whole)
    assert same(checkpoints.newest()[0], make_state(20))
    return found


def test_bit_flips_are_found(checkpoints):
    assert flip_bits(checkpoints, 40) == 40


@pytest.mark.slow
def test_200_bit_flips_are_found(checkpoints):
    assert flip_bits(checkpoints, 200) == 200
    print("200 of 200 bit flips found")


# --- killed while saving ----------------------------------------------------------------------


def save_and_die(checkpoints: Checkpoints, state: State, at_line: int, counted=None) -> None:
    """Save, and be killed before the `at_line`-th line of Python that the save executes."""
    seen = 0

    def count(frame, event, _argument):
        nonlocal seen
        if frame.f_code.co_filename.endswith(("atomic.py", "checkpoints.py")) and event == "line":
            seen += 1
            if seen == at_line:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    torch.set_num_threads(1)
    sys.settrace(count)
    checkpoints.save(state, Config())
    sys.settrace(None)
    if counted is not None:
        counted.value = seen


def kill_saves(checkpoints: Checkpoints, by_line: int, by_time: int) -> int:
    """Kill saves of step 30, at lines spread over it and at random moments; how many left a whole one."""
    state, whole = make_state(30, width=20_000), 0  # 5 MB, so that a kill by the clock falls into a write
    counted = FORK.Value("i", 0)
    started = time.monotonic()
    child = FORK.Process(target=save_and_die, args=(checkpoints, state, -1, counted))
    child.start()
    child.join()
    length = time.monotonic() - started
    saved = checkpoints.path / "step-000030"
    rng = random.Random(0)
    lines = [1 + i * (counted.value - 1) // max(1, by_line - 1) for i in range(by_line)]
    for line, delay in [(line, None) for line in lines] + [
        (-1, rng.uniform(0, length)) for _ in range(by_time)
    ]:
        if saved.exists():
            discard(saved)
        for step in (10, 20):
            checkpoints.save(make_state(step), Config())
        child = FORK.Process(target=save_and_die, args=(checkpoints, state, line))
        child.start()
        if delay is not None:
            time.sleep(delay)
            child.kill()
        child.join()
        found, passed_over = checkpoints.newest()
        assert not passed_over, passed_over
        whole += same(found, state if found.step == 30 else make_state(20))
        with contextlib.suppress(FileNotFoundError):
            assert damage(saved, PARTS) in (None, "manifest.json is missing")
    checkpoints.save(make_state(40), Config())
    assert not list(checkpoints.path.glob(".*")), "leftovers"
    return whole


def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(checkpoints):
    assert kill_saves(checkpoints, by_line=12, by_time=4) == 16


@pytest.mark.slow
def test_a_save_killed_at_100_offsets_leaves_a_whole_checkpoint(checkpoints):
    assert kill_saves(checkpoints, by_line=60, by_time=40) == 100
    print("100 of 100 killed saves left a whole newest checkpoint")


def save_on_a_full_disk(checkpoints: Checkpoints, limit: int, told) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoints.save(make_state(30, width=20_000), Config())
    except RunError as error:
        told.put(str(error))


def test_a_full_disk_is_one_error_and_leaves_the_old_checkpoint(checkpoints):
    checkpoints.keep = 1
    for limit in (100, 10_000, 3_000_000):
        told = FORK.SimpleQueue()
        child = FORK.Process(target=save_on_a_full_disk, args=(checkpoints, limit, told))
        child.start()
        child.join()
        message = told.get()
        assert "File too large" in message and "step-000030" in message and "\n" not in message
        assert sorted(path.name for path in checkpoints.path.iterdir()) == ["step-000010", "step-000020"]
        assert same(checkpoints.newest()[0], make_state(20))


# --- nothing executes -------------------------------------------------------------------------


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_no_pickle_of_a_checkpoint_is_executed(checkpoints, tmp_path):
    canary = tmp_path / "executed"
    payload = pickle.dumps(Payload(canary))
    path = checkpoints.path / "step-000020"
    for name in (
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "scheduler.pkl",
        "adapter/adapter_model.bin",
    ):
        (path / name).write_bytes(payload)
    assert same(checkpoints.newest()[0], make_state(20))
    for name in PARTS:  # sealed by an attacker, so the checksums are right
        files = {part: (path / part).read_bytes() for part in PARTS}
        write_folder(path, (files | {name: payload}).items())
        found = checkpoints.newest()[0]
        assert found.step == (20 if name.endswith("adapter_config.json") else 10)
        write_folder(path, files.items())
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists(), "the payload works"
