"""The stages in order: what comes first is worth most if the run is cut off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ...errors import MissingPart
from . import answers, exact, loss, steps
from .lab import Lab, Result

Work = Callable[[Lab], Iterator[tuple[str, Result]]]
"""Yields each result as soon as it is there, by a name; a later one of the same name replaces it."""


@dataclass(frozen=True)
class Stage:
    name: str
    work: Work
    seconds: int
    """At most, in a run of ten minutes on a GPU."""
    rehearsed: bool = True
    """False: another size of a stage before it, which small runs leave out."""


def gpu_tests(_lab: Lab) -> Iterator[tuple[str, Result]]:
    """The tests marked `gpu`, of the checkout or the bundle."""
    tests = Path(__file__).resolve().parents[3] / "tests"
    if not (tests / "test_loss_kernel.py").is_file() or find_spec("pytest") is None:
        raise MissingPart("no tests beside the package, or pytest is not installed")
    options = ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tests / "test_loss_kernel.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    said = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode == 0 and "passed" not in said:
        raise MissingPart(said)
    yield "pytest -m gpu", {"passed": done.returncode == 0, "said": said}


STAGES = (
    Stage("tests", gpu_tests, 60),
    Stage("float16", partial(exact.same_as_cpu, dtype="float16"), 60),
    Stage("bfloat16", partial(exact.same_as_cpu, dtype="bfloat16"), 60),
    Stage("kill and resume", exact.kill_and_resume, 60),
    Stage("loss, D = 1536, 2,048 tokens", partial(loss.against_peers, D=1536, N=2048), 40),
    Stage("loss, D = 1536, 8,192 tokens", partial(loss.against_peers, D=1536, N=8192), 50, rehearsed=False),
    Stage("loss, D = 3584, 2,048 tokens", partial(loss.against_peers, D=3584, N=2048), 50, rehearsed=False),
    Stage("loss, D = 3584, 8,192 tokens", partial(loss.against_peers, D=3584, N=8192), 60, rehearsed=False),
    Stage("row kernel", loss.row_kernel, 30),
    Stage("steps, 0.5B", partial(steps.speed, size="0.5B"), 45),
    Stage("steps, 1.5B", partial(steps.speed, size="1.5B"), 60, rehearsed=False),
    Stage("steps, 7B", partial(steps.speed, size="7B"), 90, rehearsed=False),
    Stage("ladder, 0.5B", steps.ladder, 60),
    Stage("memory, 0.5B", partial(steps.memory, size="0.5B"), 40),
    Stage("memory, 1.5B", partial(steps.memory, size="1.5B"), 40, rehearsed=False),
    Stage("memory, 7B", partial(steps.memory, size="7B"), 60, rehearsed=False),
    Stage("auto micro-batch, 1.5B", partial(steps.auto, size="1.5B"), 45),
    Stage("retreat", steps.retreat, 40),
    Stage("decoding, 1.5B", answers.decoding, 90),
    Stage("GRPO step", answers.grpo, 45),
    Stage("variable-length attention", steps.varlen, 40),
    Stage("unsloth", steps.unsloth, 60),
)
