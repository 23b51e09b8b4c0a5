r"""The one file that imports math_verify, and the process that runs it.

    python -m dft_lora.tasks.algebra      `judge` starts it, talks to it and kills it

An input line is `{"id", "answer", "reference", "seconds", "patience"}`, an output line `ID STATUS`. The
process that was started stays warm and computes nothing; a forked child answers, and announces itself with
`ready PID`. No computation is trusted to end: the kernel ends the child after `seconds` of processor time,
the caller after `patience` seconds on the clock, and the kernel again one second later, in case the caller
has died. Memory is limited too, if the system can. (Without fork the process itself answers, and only the
caller can end it.)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from functools import lru_cache
from typing import Any

from dft_lora.tasks.answers import TOLERANCE, agree

MEMORY = 2 << 30  # bytes of address space; sympy and an ordinary answer take 0.3 GB


class Unreadable(Exception):
    """An answer that math_verify cannot read as mathematics."""


@lru_cache(256)  # the same few references recur
def _read(text: str, units: bool = False) -> Any:
    """A sympy object, or None. `units`: a trailing m, c or s is a unit, not a variable."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    reading = NormalizationConfig(malformed_operators=True, nits=True, units=units)
    found = parse(f"${text}$", [LatexExtractionConfig(normalization_config=reading)], parsing_timeout=None)
    return found[0] if found and not isinstance(found[0], str) else None


def same(answer: str, reference: str) -> bool:
    """Whether two expressions are equal. Raises Unreadable if the answer is not mathematics."""
    given, gold = _read(answer), _read(reference)
    if given is None:
        raise Unreadable
    if gold is None:
        return False
    if _equal(given, gold):
        return True
    return bool(given.free_symbols) and not gold.free_symbols and _equal(_read(answer, units=True), gold)


def _equal(given: Any, gold: Any) -> bool:
    """Compares expressions and equations by their values, everything else with math_verify.

    math_verify rounds numbers to six places, so that 2^{-99} sqrt(2) would equal 2^{-98} sqrt(2), knows few
    identities, and spends its time on simplification. So numbers are compared to a relative 1e-12 (TOLERANCE
    if one of them is written as a decimal), and expressions with variables at a few points, including
    negative ones. Two equations are the same if their left sides minus their right sides have a constant
    ratio.
    """
    from math_verify import verify
    from sympy import Equality, Expr, Float

    equations = isinstance(given, Equality) and isinstance(gold, Equality)
    expressions = isinstance(given, Expr) and isinstance(gold, Expr)
    words = given.is_Symbol or gold.is_Symbol  # \text{no solution} is one symbol, and so is x
    if words or not (equations or expressions):
        return verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True)
    decimal = gold.has(Float) or (given.has(Float) and not gold.is_Integer)
    near = float(TOLERANCE) if decimal else 1e-12
    if equations:
        given, gold = given.lhs - given.rhs, gold.lhs - gold.rhs
    values = _values(given, gold)
    if not all(a.is_finite and b.is_finite for a, b in values):
        return verify(gold, given, timeout_seconds=None)
    if equations:
        (first_a, first_b), *values = values
        values = [(a * first_b, first_a * b) for a, b in values]
    return all(abs(a - b) <= (near * abs(b) or 1e-20) for a, b in values)


def _values(*expressions: Any) -> list[tuple[Any, ...]]:
    """The values of expressions at three points, or once if they have no variables."""
    from sympy import Rational

    names = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    starts = (Rational(13, 7), Rational(-5, 11), Rational(29, 3)) if names else (Rational(0),)
    points = [{name: start + Rational(k, 17) for k, name in enumerate(names)} for start in starts]
    return [tuple(expression.subs(point).evalf(30) for expression in expressions) for point in points]


def status(answer: str, reference: str) -> str:
    """correct, wrong, or unparsable."""
    try:
        return "correct" if agree(answer, reference, same) else "wrong"
    except Unreadable:
        return "unparsable"
    except MemoryError:
        raise
    except Exception:  # sympy may raise anything on odd input, which never means that the answers are equal
        return "wrong"


def main() -> None:
    """Warm up, then let forked children answer: when one is killed the next is ready in milliseconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which ends this process
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    same(r"\frac{x}{2}", r"\sqrt{x}")  # pays for imports and first-use tables here, once
    while hasattr(os, "fork"):
        child = os.fork()
        if not child:
            break
        if os.waitpid(child, 0)[1] == 0:  # no more questions
            return
    try:
        serve()
    except BrokenPipeError:  # the caller is gone; any other status would fork the next child
        os._exit(0)


def serve() -> None:
    """Announce this process, then answer line by line until the input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # a stray print inside must not look like a reply
    print("ready", os.getpid(), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        _alarms(job["seconds"], job["patience"] + 1)
        reply = status(job["answer"], job["reference"])
        _alarms(0, 0)  # before the reply: a process that has answered must not be killed
        print(job["id"], reply, file=replies, flush=True)


def _alarms(seconds: float, patience: float) -> None:
    """Let the kernel end this process after that much processor time or wall time; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, patience)


if __name__ == "__main__":
    main()
