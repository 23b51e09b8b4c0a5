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
from typing import Any

from dft_lora.tasks.answers import TOLERANCE, agree

MEMORY = 2 << 30  # bytes of address space; sympy and an ordinary answer take 0.3


class Unreadable(Exception):
    """An answer that math_verify cannot read as mathematics."""


@lru_cache(256)  # the same few references come again and again
def _read(text: str, units: bool = False) -> Any:
    """A sympy object, or None. `units`: a trailing m, c or s is a unit, not a variable."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    reading = NormalizationConfig(malformed_operators=True, nits=True, units=units)
    found = parse(f"${text}$", [LatexExtractionConfig(normalization_config=reading)], parsing_timeout=None)
    return found[0] if found and not isinstance(found[0], str) else None


def same(answer: str, reference: str) -> bool:
    """Whether two expressions are equal; raises Unreadable where the answer is not mathematics."""
    given, gold = _read(answer), _read(reference)
    if given is None:
        raise Unreadable
    if gold is None:
        return False
    if _equal(given, gold):
        return True
    return bool(given.free_symbols) and not gold.free_symbols and _equal(_read(answer, units=True), gold)


def _equal(given: Any, gold: Any) -> bool:
    """math_verify's opinion, save for expressions whose values settle it.

    math_verify rounds numbers to six places, so that 2^{-99} sqrt(2) would be 2^{-98} sqrt(2), and knows few
    identities. So numbers are compared to 1e-12 relative (TOLERANCE where one is written as a decimal), and
    expressions in variables at a few points, negative ones too.
    """
    from math_verify import verify
    from sympy import Expr, Float, Rational

    if not (isinstance(given, Expr) and isinstance(gold, Expr)):
        return verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True)
    names = sorted(given.free_symbols | gold.free_symbols, key=str)
    if not names and gold.is_infinite:
        return given == gold
    decimal = gold.has(Float) or (given.has(Float) and not gold.is_Integer)
    near = float(TOLERANCE) if decimal else 1e-12
    for start in (Rational(13, 7), Rational(-5, 11), Rational(29, 3)) if names else (0,):
        point = {name: start + Rational(k, 17) for k, name in enumerate(names)}
        a, b = given.subs(point).evalf(30), gold.subs(point).evalf(30)
        if not abs(a - b) <= (near * abs(b) or 1e-20):
            return bool(names) and verify(gold, given, timeout_seconds=None)
    return True


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
    same(r"\frac{x}{2}", r"\sqrt{x}")  # imports and first-use tables are paid before the first question
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        timer(signal.ITIMER_REAL, job["limit"] + 1)
        print(status(job["answer"], job["reference"]), file=replies, flush=True)
        timer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
