r"""The one file that imports math_verify: `same(answer, reference)`, and the process that runs it.

    python -m dft_lora.tasks.algebra      the process; `judge` starts it, talks to it and kills it

A line in is `{"answer", "reference", "limit"}`, a line out a status. Nothing is trusted to end: the caller
kills the process after `limit` seconds, and a timer in the kernel ends it a little later even where the
caller is gone. Memory is limited too, where the system can.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import lru_cache

from dft_lora.tasks.answers import TOLERANCE, agree

MEMORY = 4 << 30  # bytes of address space


class Unreadable(Exception):
    """An answer that math_verify cannot read."""


@lru_cache(256)  # the same few references come again and again
def _read(text: str) -> list:
    from math_verify import parse

    return parse(f"${text}$", parsing_timeout=None)


def same(answer: str, reference: str) -> bool:
    """Whether two expressions are equal; raises Unreadable where the answer is not mathematics.

    math_verify compares numbers to six places after the point, so that 2^{-99} would be 2^{-98}: numbers
    are compared here, to a relative 1e-12, or TOLERANCE where one is written as a decimal.
    """
    from math_verify import verify
    from sympy import Expr, Float

    gold, given = _read(reference), _read(answer)
    if not given:
        raise Unreadable
    if not verify(gold, given, timeout_seconds=None):
        wide = True
    else:
        wide = False
    a, b = given[0], gold[0] if gold else None
    if isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number:
        decimal = a.has(Float) and not b.is_Integer or b.has(Float)
        near = float(TOLERANCE) if decimal else 1e-12
        return bool(abs((a - b).evalf(30)) <= near * abs(b.evalf(30)))
    return not wide


def status(answer: str, reference: str) -> str:
    """correct, wrong, or unparsable."""
    try:
        return "correct" if agree(answer, reference, same) else "wrong"
    except Unreadable:
        return "unparsable"
    except (Exception, RecursionError):  # whatever breaks inside is no proof of equality
        return "wrong"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    alarm = getattr(signal, "setitimer", None)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass
    replies, sys.stdout = sys.stdout, sys.stderr  # a stray print must not look like a reply
    same(r"\frac{x}{2}", "0.5x")  # warm: imports and first-use tables are paid before the first question
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if alarm:
            alarm(signal.ITIMER_REAL, job["limit"] + 1)
        print(status(job["answer"], job["reference"]), file=replies, flush=True)
        if alarm:
            alarm(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
