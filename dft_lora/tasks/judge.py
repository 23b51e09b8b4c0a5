r"""Judging answers: `judge(text, reference) -> Verdict`, in any thread of any process.

The final answer is extracted and compared exactly (`answers`); only what needs algebra goes to math_verify,
which cannot be interrupted and works only in a main thread. So it runs in processes of its own, which start
when first needed and end with the program. They are plain subprocesses that import only the checker: no fork
of a process with threads and CUDA, and no second run of the user's script as with `spawn`. If an answer takes
more than LIMIT, the computing process is killed and the warm one behind it forks another, so a hostile answer
costs its own three seconds and delays no other.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dft_lora.errors import DataError, RunError
from dft_lora.tasks.answers import NeedsAlgebra, agree
from dft_lora.tasks.extraction import extract

LONGEST = 1000  # characters; longer answers are not read
LIMIT = 3.0  # seconds of processor time per answer, so that a busy machine changes no verdict
PATIENCE = 20.0 if hasattr(signal, "setitimer") else LIMIT  # seconds on the clock

Status = Literal["correct", "wrong", "unparsable", "timed_out"]


@dataclass(frozen=True)
class Verdict:
    """How one answer was judged, and the part of it that was judged."""

    status: Status
    extracted: str | None = None

    @property
    def correct(self) -> bool:
        return self.status == "correct"


def judge(text: str, reference: str) -> Verdict:
    """The verdict on a model's text, given the reference answer.

    correct; wrong; unparsable: no final answer was found, or it could not be read; timed_out: the comparison
    exceeded its limit of time or memory. Raises DataError if the reference is empty.
    """
    extracted, status = _exactly(text, reference)
    return Verdict(status or _pool().ask(extracted, reference), extracted)


def judge_many(pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
    """`judge` over many (text, reference) pairs, on every core; equal answers are compared once."""
    judged = [(_exactly(text, reference), reference) for text, reference in pairs]
    open_ = list(dict.fromkeys((a, reference) for (a, status), reference in judged if status is None))
    asked = {}
    if open_:
        pool = _pool()
        with ThreadPoolExecutor(pool.size) as threads:
            asked = dict(zip(open_, threads.map(lambda job: pool.ask(*job), open_), strict=True))
    return [Verdict(status or asked[answer, reference], answer) for (answer, status), reference in judged]


def _exactly(text: str, reference: str) -> tuple[str | None, str | None]:
    """(the extracted answer, its status or None if algebra must decide)."""
    if not reference.strip():
        raise DataError("the reference answer is empty: answers can only be judged against one")
    answer = extract(text)
    if answer is None or len(answer) > max(LONGEST, 2 * len(reference)):
        return answer and answer[:LONGEST], "unparsable"
    try:
        return answer, "correct" if agree(answer, reference) else "wrong"
    except NeedsAlgebra:
        return answer, None
    except RecursionError:  # brackets, a thousand deep
        return answer, "unparsable"


class _Checker:
    """One checking process and its computing child (see `algebra`)."""

    def __init__(self):
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dft_lora.tasks.algebra"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        self.child: int | None = None  # its process id, once it has announced itself
        self.asked = 0

    def ask(self, answer: str, reference: str) -> str:
        """The status; "timed_out" if the computing child was killed or died.

        First waits until a child is ready: a second after the start of the process, milliseconds after a
        kill. The answer's time does not include this. Raises RunError if the process does not start.
        """
        while self.child is None:
            if self._read()[0] == "":
                raise RunError(
                    "the answer checker does not start; run `python -m dft_lora.tasks.algebra` to see why"
                )
        self.asked += 1
        job = {"id": self.asked, "answer": answer, "reference": reference}
        kind, reply = "", ""
        killed = threading.Event()
        timer = threading.Timer(PATIENCE, self._kill_child, [self.child, killed])
        timer.start()
        try:
            print(
                json.dumps({**job, "seconds": LIMIT, "patience": PATIENCE}),
                file=self.process.stdin,
                flush=True,
            )
            kind, reply = self._read()
            while kind not in (
                "",
                "ready",
                str(self.asked),
            ):  # a reply to an earlier job, whose child was killed before it was read
                kind, reply = self._read()
        finally:
            timer.cancel()
            timer.join()
            if killed.is_set() and kind != "ready":  # killed as it replied: the next child is not ready yet
                self.child = None
        return reply if kind == str(self.asked) else "timed_out"

    def _read(self) -> tuple[str, str]:
        """The next line, `ready PID` or `ID STATUS`; empty at the end. Notes which child is ready."""
        kind, _, rest = self.process.stdout.readline().strip().partition(" ")
        if kind == "ready":
            self.child = int(rest)
        if not kind:
            self.close()
        return kind, rest

    @staticmethod
    def _kill_child(child: int, killed: threading.Event) -> None:
        with contextlib.suppress(OSError):  # it has just exited by itself
            os.kill(child, getattr(signal, "SIGKILL", signal.SIGTERM))
            killed.set()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End both processes and reap them, so that no zombie is left."""
        with contextlib.suppress(OSError):  # data still buffered for a dead process
            self.process.stdin.close()
        if self.child is not None:
            self._kill_child(self.child, threading.Event())
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class _Pool:
    """A checker per core, at most 8, each started when first needed."""

    def __init__(self):
        self.size = min(os.cpu_count() or 1, 8)
        self.slots = threading.BoundedSemaphore(self.size)
        self.lock = threading.Lock()
        self.idle: list[_Checker] = []

    def ask(self, answer: str, reference: str) -> str:
        """The status of one answer; waits while all checkers are busy."""
        with self.slots:
            while True:
                with self.lock:
                    checker = self.idle.pop() if self.idle else _Checker()
                try:
                    status = checker.ask(answer, reference)
                except OSError:  # it was killed while idle: a new one answers
                    checker.close()
                    continue
                except BaseException:  # Ctrl-C while it computes
                    checker.close()
                    raise
                if checker.alive:
                    with self.lock:
                        self.idle.append(checker)
                return status

    def close(self) -> None:
        """End every idle checker."""
        with self.lock:
            while self.idle:
                self.idle.pop().close()


_lock = threading.Lock()
_shared: _Pool | None = None


def _pool() -> _Pool:
    global _shared
    with _lock:
        if _shared is None:
            _shared = _Pool()
            atexit.register(_shared.close)
        return _shared


def _forget() -> None:
    """After a fork: the checkers belong to the parent; the child starts its own."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
