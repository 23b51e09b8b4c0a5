"""Run programs against their tests, each in cells of its own (`cell.py`), several at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from dft_lora.errors import RequestError, RunError
from dft_lora.tasks.judge import Status

CELL = Path(__file__).with_name("cell.py")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}  # all that a cell inherits: sets in one order
DOES_NOT_COMPILE = 3  # cell.py's exit status


@dataclass(frozen=True)
class Limits:
    """What a program, and its tests, may use each. A program may start no process and no thread."""

    seconds: int = 10
    """Of processor time, so that a busy machine changes no verdict."""
    patience: float = 20.0
    """Seconds on the clock, for a program that sleeps."""
    memory_mb: int = 512
    file_mb: int = 8
    """Of one file and, behind walls, of all files together."""


DEFAULT = Limits()


def run_all(jobs: Sequence[tuple[str, str]], limits: Limits = DEFAULT) -> list[Status]:
    """The status of each (program, tests) pair, in order; equal pairs run once.

    `tests` is a Python module that takes the program's functions `from candidate`. correct: the tests pass;
    timed_out: the program or its tests exceed the limits of time; unparsable: the program is not Python.
    Raises RequestError where the system cannot run programs this way, RunError if a cell breaks.
    """
    distinct = list(dict.fromkeys(jobs))
    walled = bool(distinct) and walls() is None
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        statuses = threads.map(lambda job: _run(*job, limits, walled), distinct)
        found = dict(zip(distinct, statuses, strict=True))
    return [found[job] for job in jobs]


@cache
def walls() -> str | None:
    """Why programs have no namespaces of their own on this system; None if they have.

    Raises RequestError where an ordinary program does not run without them either.
    """
    if not hasattr(os, "fork"):
        raise RequestError("programs can be run on Linux and macOS only: this system cannot fork a process")
    why = _obstacle(walled=True)
    if why and (without := _obstacle(walled=False)):
        raise RequestError(
            f"programs cannot be run here: {why}; and without namespaces: {without}. Programs of root run as "
            "the user nobody, so Python must lie outside of root's folders"
        )
    return why


def _obstacle(walled: bool) -> str | None:
    """Why a harmless program does not run."""
    try:
        program = "import random, socket\ndef f(): return 1"
        status = _run(program, "from candidate import f\nassert f() == 1", DEFAULT, walled)
    except RunError as error:
        return str(error)
    return None if status == "correct" else "it cannot read Python's library"


def _run(program: str, tests: str, limits: Limits, walled: bool) -> Status:
    """Judge one program. Both cells have ended when this returns."""
    with TemporaryDirectory(prefix="dft-lora-") as folder, ExitStack() as ends, ExitStack() as cells:
        os.chmod(folder, 0o777 if os.geteuid() == 0 else 0o700)  # root's programs run as nobody
        calls_out, calls_in, replies_out, replies_in = (
            ends.enter_context(open(end, mode + "b", 0))
            for pipe in (os.pipe(), os.pipe())
            for end, mode in zip(pipe, "rw", strict=True)
        )
        job = {**asdict(limits), "walls": walled, "folder": folder}
        candidate, tester = (
            cells.enter_context(_Cell({**job, **part}))
            for part in (
                _work("program", program, calls_out, replies_in),
                _work("tests", tests, replies_out, calls_in),
            )
        )
        ends.close()  # now the end of one cell is the end of the other's input
        tested = tester.result()
        tried = candidate.result(stop=True)
    if tested["passed"]:
        return "correct"
    if tried["exit"] == DOES_NOT_COMPILE:
        return "unparsable"
    return "timed_out" if tested["late"] or tried["late"] else "wrong"


def _work(role: str, source: str, read: IO[bytes], write: IO[bytes]) -> dict[str, Any]:
    return {"role": role, "source": source, "read": read.fileno(), "write": write.fileno()}


class _Cell:
    """A running cell. Its warden, which no program can reach, ends it as soon as `stop` closes its input."""

    def __init__(self, job: dict[str, Any]):
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", CELL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=(job["read"], job["write"]),
            start_new_session=True,  # Ctrl-C is for us
        )
        with contextlib.suppress(BrokenPipeError):  # `result` says why it has died
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def result(self, stop: bool = False) -> dict[str, Any]:
        """What the warden says when the work is done, or when `stop` ends it. Raises RunError if it broke."""
        if stop:
            self._stop()
        said = self.process.stdout.read()
        try:
            found = json.loads(said)
        except ValueError:
            lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            found = {"broken": lines[-1] if lines else "its process was killed"}
        if "broken" in found:
            raise RunError(f"a program could not be run: {found['broken']}")
        return found

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def __enter__(self) -> _Cell:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
