r"""A second opinion on the judge's verdicts: both answers are evaluated and their values compared.

It shares no comparison code with `dft_lora.tasks` or math_verify. LaTeX is rewritten into a Python
expression, the expression is evaluated in complex floats at three fixed points, and two answers agree when
all their parts have the same values there. Where that is impossible (words, units, lists of tuples) and the
answers are not the same string, there is no opinion.

    audit(pairs).rate      share of verdicts, among those with a second opinion, that it contradicts
"""

from __future__ import annotations

import ast
import cmath
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from dft_lora.tasks.judge import Verdict

_POINTS = (0.7310585786, 1.6180339887, 2.2360679775)  # of a free variable; shifted by its name
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS = {
    name: getattr(cmath, name) for name in ("sqrt", "sin", "cos", "tan", "exp", "log", "asin", "acos", "atan")
}
_CONSTANTS = {"pi": cmath.pi, "e": cmath.e, "i": 1j}
_REWRITES = [  # in this order; the ones with braces take the innermost first and are repeated
    (r"(?<=\d),(?:\\!)?(?=\d{3}(?!\d))|\{,\}", ""),
    (r"(?<![\d.}])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\\(?:left|right|quad|displaystyle)(?![a-z])|\\[!,;: ]|\\?\$|~|\s|\^\{?\\circ\}?|°", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"((\1)/(\2))"),
    (r"\\(?:cdot|times)", "*"),
    (r"\\sqrt(\d)", r"sqrt(\1)"),
    (r"\\(sin|cos|tan|exp|pi)", r"\1"),
    (r"\\ln", "log"),
    (r"(\d)[eE]([-+]?\d+)", r"\1*10**(\2)"),
]
_BRACES = [
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)"),
    (r"\\sqrt\[(\d+)\]\{([^{}]*)\}", r"((\2)**(1/\1))"),
    (r"\^\{([^{}]*)\}", r"**(\1)"),
]
_WORD = re.compile(r"sqrt|sin|cos|tan|exp|log|pi|[a-zA-Z]|\d+\.?\d*|\.\d+|\*\*|[-+*/()]")


@dataclass(frozen=True)
class Audit:
    """How often a second opinion could be had, and where it differs."""

    judged: int
    compared: int
    disagreements: tuple[tuple[str, str, str], ...]  # (answer, reference, the verdict's status)

    @property
    def rate(self) -> float:
        """Disagreements among the compared; 0 where nothing could be compared."""
        return len(self.disagreements) / self.compared if self.compared else 0.0


def audit(pairs: Iterable[tuple[Verdict, str]]) -> Audit:
    """Compare (verdict, reference) pairs with a second opinion; only correct and wrong ones can be."""
    judged, compared, disagreements = 0, 0, []
    for verdict, reference in pairs:
        judged += 1
        if verdict.status not in ("correct", "wrong"):
            continue
        opinion = second_opinion(verdict.extracted, reference)
        compared += opinion is not None
        if opinion is not None and opinion != verdict.correct:
            disagreements.append((verdict.extracted, reference, verdict.status))
    return Audit(judged, compared, tuple(disagreements))


def second_opinion(answer: str, reference: str) -> bool | None:
    """Same values (True), other values (False), or no opinion (None)."""
    if re.sub(r"\s|\$", "", answer) == re.sub(r"\s|\$", "", reference):
        return True
    if len(answer) + len(reference) > 600 or re.search(r"\)\s*,\s*\(|=", answer + reference):
        return None
    shapes = [re.sub(r"[^][()]", "", text) for text in (answer, reference)]
    if any("[" in shape or "]" in shape for shape in shapes) and shapes[0] != shapes[1]:
        return False if "," in answer and "," in reference else None
    ordered = any(re.match(r"\$?(?:\\left)?[(\[].*,", text) for text in (answer, reference))
    given, wanted = _values(answer, ordered), _values(reference, ordered)
    if given is None or wanted is None:
        return None
    near = 1e-4 if "." in answer + reference else 1e-10
    scales = {1, 100 ** (("%" in answer) - ("%" in reference))}
    return len(given) == len(wanted) and all(
        any(_near(a, b * scale, near) for scale in scales)
        for one, other in zip(given, wanted, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _near(a: complex, b: complex, relative: float) -> bool:
    return abs(a - b) <= (relative * max(abs(a), abs(b)) if a and b else 1e-12)


def _values(text: str, ordered: bool) -> list[tuple[complex, ...]] | None:
    """Values of each comma-separated part at each point; None where a part is not an expression."""
    text = text.strip().rstrip(".").replace("\\%", "").replace("%", "")
    for pattern, new in _REWRITES:
        text = re.sub(pattern, new, text)
    if re.search(r"(?<![a-zA-Z\\])(?!sqrt|sin|cos|tan|exp|pi|log)[a-zA-Z]{3,}", text):
        return None
    parts = [text]
    if "," in text:
        parts = re.sub(r"^(?:\\\{|[(\[])|(?:\\\}|[)\]])$", "", text).split(",")
    try:
        values = [tuple(_evaluate(part, point) for point in _POINTS) for part in parts]
    except (ValueError, SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return None
    return (
        values if ordered else sorted(values, key=lambda v: [(round(z.real, 9), round(z.imag, 9)) for z in v])
    )


def _evaluate(text: str, point: float) -> complex:
    """The value of a rewritten expression with its variables near `point`; ValueError if it is not one."""
    for _ in range(20):
        before = text
        for pattern, new in _BRACES:
            text = re.sub(pattern, new, text)
        if text == before:
            break
    text = text.replace("^", "**")
    words = _WORD.findall(text)
    if "".join(words) != text or not words:
        raise ValueError(text)
    source = words[0]
    for left, right in pairwise(words):
        product = (left[-1].isalnum() or left[-1] in ").") and (right[0].isalnum() or right == "(")
        source += ("*" if product and left not in _FUNCTIONS else "") + right
    return _walk(ast.parse(source, mode="eval").body, point)


def _walk(node: ast.expr, point: float) -> complex:
    match node:
        case ast.Constant(value=int() | float() as value):
            return complex(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return complex(_CONSTANTS[name])
        case ast.Name(id=name) if len(name) == 1:
            return complex(point + 0.1 * (ord(name) - 97))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_walk(operand, point)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _walk(operand, point)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(left, point), _walk(right, point))
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_walk(argument, point))
    raise ValueError(ast.dump(node))
