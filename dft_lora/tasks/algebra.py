r"""The one file that imports math_verify, and the process that runs it.

    python -m dft_lora.tasks.algebra      `judge` starts it, talks to it and kills it

A line in is `{"answer", "reference", "limit"}`, a line out a status. Nothing is trusted to end: the caller
kills the process after `limit` seconds, and the kernel's timer ends it a second later even where the caller
is gone. Its memory is limited too, where the system can do that.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from functools import lru_cache

from dft_lora.tasks.answers import TOLERANCE, agree

MEMORY = 2 << 30  # bytes of address space; sympy and an ordinary answer take 0.3


class Unreadable(Exception):
    """An answer that math_verify cannot read as mathematics."""


@lru_cache(256)  # the same few references come again and again
def _read(text: str) -> list:
    from math_verify import parse

    return parse(f"${text}$", parsing_timeout=None)


def same(answer: str, reference: str) -> bool:
    """Whether two expressions are equal; raises Unreadable where the answer is not mathematics.

    math_verify rounds numbers to six places: 2^{-99} sqrt(2) would be 2^{-98} sqrt(2). So two numbers are
    compared here, to 1e-12 relative, or to TOLERANCE where one is written as a decimal.
    """
    from math_verify import verify
    from sympy import Expr, Float

    given, gold = _read(answer), _read(reference)
    if not given or isinstance(given[0], str):
        raise Unreadable
    a, b = given[0], gold[0] if gold else None
    if isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number and b.is_finite:
        decimal = b.has(Float) or (a.has(Float) and not b.is_Integer)
        near = float(TOLERANCE) if decimal else 1e-12
        return bool(abs((a - b).evalf(30)) <= (near * abs(b.evalf(30)) or 1e-20))
    return verify(gold, given, timeout_seconds=None)


def status(answer: str, reference: str) -> str:
    """correct, wrong, or unparsable."""
    try:
        return "correct" if agree(answer, reference, same) else "wrong"
    except Unreadable:
        return "unparsable"
    except MemoryError:
        raise
    except Exception:  # sympy may raise anything on odd input, and none of it proves two answers equal
        return "wrong"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends this process
    timer = getattr(signal, "setitimer", lambda *_: None)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies, sys.stdout = sys.stdout, sys.stderr  # a stray print inside must not look like a reply
    same(r"\frac{x}{2}", "0.5x")  # imports and first-use tables are paid before the first question
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        timer(signal.ITIMER_REAL, job["limit"] + 1)
        print(status(job["answer"], job["reference"]), file=replies, flush=True)
        timer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
