"""Real runs in real processes, to be killed: the command line itself, in children of one warm server.

A child is a process of its own (SIGKILL kills it, its exit code is the command's), forked from a server that
has the heavy imports behind it: half a second instead of eight.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from patience import HANG

BASE = "tiny"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fault_server"])


def write_data(path: Path, rows: int = 40) -> Path:
    """Short arithmetic rows of different lengths."""
    lines = [
        {"problem": f"What is {i} + {i * 7}?", "solution": "so " * (i % 5) + f"{i * 8}"} for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_recipe(path: Path, data: Path, output: Path, **changes) -> Path:
    """A QLoRA run with all that makes resuming hard: nf4, dropout, accumulation, 8-bit AdamW."""
    train = {"batch_size": 4, "micro_batch_size": 2, "optimizer": "adamw8bit", "learning_rate": 1e-3}
    train |= {"max_steps": 30, "save_steps": 3, "keep_checkpoints": 3}
    recipe = {
        "model": {"name": BASE},
        # r = 32: bitsandbytes keeps tensors under 4,096 elements in 32 bits.
        "adapter": {"r": 32, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "data": {"source": str(data), "max_length": 64},
        "train": train | changes.pop("train", {}),
        "output": str(output),
    } | changes
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def start(*arguments: str, setup=None, draws: bool = False):
    """`dft-lora ARGUMENTS` in a child; its stderr goes to a file named `log` on the returned process.

    A finished run `draws` its curves only where that is asked for: a third of the time of so short a run.
    """
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"fault-run-{os.getpid()}-{time.monotonic_ns()}.log"
    child = SERVER.Process(target=_child, args=(arguments, str(log), setup, draws))
    child.log = log
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()  # it looks for `fault_server` where we do
    child.start()
    return child


def run(*arguments: str, setup=None) -> tuple[int, str]:
    """`dft-lora ARGUMENTS` to its end: exit code and stderr."""
    return finish(start(*arguments, setup=setup))


def finish(child) -> tuple[int, str]:
    child.join(HANG)
    assert child.exitcode is not None, "the run hangs"
    text = child.log.read_text()
    child.log.unlink()
    return child.exitcode, text


def _child(arguments, log, setup, draws):
    import torch

    from dft_lora.training import loop

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    if not draws:
        loop.curves = lambda folders, file: None
    if setup is not None:
        setup()
    sys.argv = ["dft-lora", *arguments]
    from dft_lora.cli import main

    main(list(arguments))


def lines(run_dir: Path) -> list[dict]:
    """`metrics.jsonl` without what differs between two runs of the same steps: time and memory."""
    clock = {"seconds", "processor_seconds", "tokens_per_second", "peak_memory_mb"}
    text = (run_dir / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in text.splitlines()]


def adapter(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
