r"""Where an answer is judged: `judge(text, reference) -> Verdict`, in any thread of any process.

The final answer is extracted and compared exactly (`answers`); only what needs algebra goes to math_verify,
which can neither be stopped nor be used outside a main thread. So it lives in processes of its own:
started when first needed, killed when an answer takes more than `LIMIT` seconds, ended with the
program. They are plain subprocesses that import nothing but the checker (no fork of a process
with threads and CUDA, no re-run of the user's script as `spawn` would do), and a warm spare takes the
place of a killed one, so that a hostile answer costs its own three seconds and nobody else's.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dft_lora.errors import DataError, RunError
from dft_lora.tasks.answers import LONGEST, NeedsAlgebra, agree, extract
from dft_lora.tasks.base import Verdict

LIMIT = 3.0  # seconds for one answer


def judge(text: str, reference: str) -> Verdict:
    """The verdict on a model's text, given the reference answer.

    correct, wrong; unparsable: no final answer could be found or read; timed_out: the comparison was ended
    after LIMIT seconds, or by its memory limit. Raises DataError where the reference is empty.
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
    """(the extracted answer, its status or None where algebra must decide)."""
    if not reference.strip():
        raise DataError("the reference answer is empty: a problem can be judged only against an answer")
    answer = extract(text)
    if answer is None or len(answer) > max(LONGEST, 2 * len(reference)):
        return answer and answer[:LONGEST], "unparsable"
    try:
        return answer, "correct" if agree(answer, reference) else "wrong"
    except NeedsAlgebra:
        return answer, None


class _Worker:
    """One checking process."""

    def __init__(self):
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dft_lora.tasks.algebra"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        )
        self.ready = False

    def ask(self, answer: str, reference: str) -> str | None:
        """The status; "timed_out" where the process had to be killed; None where it was dead before."""
        if not self.ready:
            if not self.process.stdout.readline():
                self.close()
                raise RunError("the answer checker does not start: try `python -m dft_lora.tasks.algebra`")
            self.ready = True
        try:
            self.process.stdin.write(
                json.dumps({"answer": answer, "reference": reference, "limit": LIMIT}) + "\n"
            )
            self.process.stdin.flush()
        except OSError:
            self.close()
            return None
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        reply = self.process.stdout.readline().strip()
        timer.cancel()
        timer.join()  # a kill under way has happened after this
        if not reply:
            self.close()
            return "timed_out"
        return reply

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Kill and reap: no zombie stays."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was still buffered for a dead process
                pipe.close()


class _Pool:
    """As many checkers as cores and a spare, each started when first wanted."""

    def __init__(self, size: int | None = None):
        self.size = size or min(os.cpu_count() or 1, 16)
        self.slots = threading.BoundedSemaphore(self.size)
        self.lock = threading.Lock()
        self.idle: deque[_Worker] = deque()  # the warmest left, a starting spare right

    def ask(self, answer: str, reference: str) -> str:
        with self.slots:
            while True:
                with self.lock:
                    worker = self.idle.popleft() if self.idle else _Worker()
                    if not self.idle:
                        self.idle.append(_Worker())
                status = worker.ask(answer, reference)
                if worker.alive:
                    with self.lock:
                        self.idle.appendleft(worker)
                if status is not None:
                    return status

    def close(self) -> None:
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
    """After a fork: the checkers are the parent's; the child starts its own."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
