r"""Whether two final answers are equal, without algebra.

`agree` splits an answer (lists, sets, tuples, intervals, unions, matrices) into leaves and compares numbers
as exact fractions, with units, percentages and degrees. A pair of leaves that needs algebra goes to the
function given as `algebra`; the default raises `NeedsAlgebra`. It uses only the standard library, and every
step is linear in the text or bounded, so a hostile answer costs no more than an ordinary one.

Rules where practice differs (the reference harness is Qwen2.5-Math's, which the DFT paper used):
- Integers and fractions match exactly. If a decimal is involved, a relative 1e-4 is close enough (that
  harness's tolerance), except that an integer reference requires the integer.
- `50%` matches 50 and 0.5; a bare 0.5 does not match 50. Degrees are a unit. A unit that one side omits or
  that is not in the table is ignored; two units of the table are converted.
- Values separated by commas form a set; a tuple, an interval and a matrix keep their order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from dft_lora.tasks.quantities import WRAP, Quantity, quantity

TOLERANCE = Fraction(1, 10_000)


class NeedsAlgebra(Exception):
    """Two answers that exact arithmetic cannot compare."""


# ------------------------------------------------------------------------------------------- one form

_TIDY = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\s+", " "),  # first, and again where spaces may have met: the patterns below are then linear
        (r"[−–]", "-"),
        (r"×", r"\\times "),
        (r"[·⋅]", r"\\cdot "),
        (r"π|(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"∪", r"\\cup "),
        (r"∅|\\varnothing(?![a-z])", r"\\emptyset "),
        (r"√\s*(\d+)|(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1\2}"),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r",\s*\\!\s*|\{,\}", ","),
        (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|~|\xa0", " "),
        (r" +", " "),
        (r"\\?\$|\\\(|\\\)|\*\*|[€£]|\\pounds", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:textbf|mathbf|boldsymbol|bf)\s*\{([^{}]*)\}", r"\1"),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-z])|°|(?:\\text\s*\{)?\s*\bdegrees?\b\s*\}?", " "),
        (r"\\leqslant|\\leq(?![a-z])", r"\\le "),
        (r"\\geqslant|\\geq(?![a-z])", r"\\ge "),
        (r"\\lbrace(?![a-z])", r"\\{"),
        (r"\\rbrace(?![a-z])", r"\\}"),
        (r"(?:,\s*)?(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![\\{A-Za-z])\b(?:and|or)\b(?!\}))", ", "),
        (r"\s+", " "),
    ]
]
_LHS = re.compile(
    r"((?:[A-Za-z]|\\[a-z]+)(?:_(?:\{[^{}]*\}|\w))?(?:\([^()]*\))?)\s*(?:=|\\in(?![a-z]))(?!.*=)\s*(?=\S)"
)


@lru_cache(4096)
def tidy(answer: str) -> str:
    """The answer without typography: spacing, dollar signs, degree marks, alternative spellings."""
    for pattern, new in _TIDY:
        answer = pattern.sub(new, answer)
    return answer.strip().rstrip(".,;:").strip()


class Group(NamedTuple):
    r"""An answer of several parts.

    `kind`: "set" (unordered), "union", "matrix", "row", the two brackets of a tuple or an interval, or
    "equation" (its items: the left side, the right side).
    """

    kind: str
    items: tuple[Group | str, ...]
    text: str


@lru_cache(4096)
def parse(text: str, thousands: bool = True) -> Group | str:
    """A tidy answer as nested groups whose leaves are texts; `thousands`: read a bare 1,234 as one number."""
    text = text.strip()
    if "," in text and (words := WRAP.fullmatch(text)):
        text = words[1]
    if matrix := re.fullmatch(r"\\begin\s*\{([bpvBV]?matrix)\}(.*)\\end\s*\{\1\}", text):
        rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
        return Group("matrix", tuple(Group("row", tuple(map(parse, row)), "") for row in rows), text)
    if not (thousands and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?(?!\d).{,30}", text)):
        values = [sign for part in _split(text, ",;") for sign in _both_signs(part)]
        if len(values) > 1:
            return Group("set", tuple(map(parse, values)), text)
    if len(pieces := text.split(r"\cup")) > 1:
        return Group("union", tuple(map(parse, pieces)), text)
    if text.startswith(r"\{") and _wrapped(text[1:]):
        inner = parse(text[2:-2], False)
        items = inner.items if isinstance(inner, Group) and inner.kind == "set" else (inner,)
        return Group("set", items, text)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _wrapped(text):
        items = tuple(map(parse, _split(text[1:-1], ",;")))
        return items[0] if text[0] == "(" and len(items) == 1 else Group(text[0] + text[-1], items, text)
    if left := _LHS.match(text):
        return Group("equation", (left[1].replace(" ", ""), parse(text[left.end() :], thousands)), text)
    return text


def _split(text: str, separators: str) -> list[str]:
    """The non-empty parts of a text between separators outside of all brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth <= 0 and letter in separators:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()] or [""]


def _wrapped(text: str) -> bool:
    """Whether the bracket that opens a text closes at its end."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth <= 0:
            return i == len(text) - 1
    return False


def _both_signs(value: str) -> list[str]:
    if r"\pm" not in value or value.startswith(("(", "[", r"\{")):
        return [value]
    return [value.replace(r"\pm", a).replace(r"\mp", b) for a, b in ("+-", "-+")]


# -------------------------------------------------------------------------------------------- comparison


def _no_algebra(answer: str, reference: str) -> bool:
    raise NeedsAlgebra


def agree(answer: str, reference: str, algebra: Callable[[str, str], bool] = _no_algebra) -> bool:
    """Whether two final answers are equal; `algebra(answer, reference)` decides what is not exact.

    Raises NeedsAlgebra if the default `algebra` would have to decide.
    """
    given, wanted = tidy(answer), tidy(reference)
    if _squeezed(given) == _squeezed(wanted):
        return True
    if choice := re.fullmatch(r"\(?([A-J])\)?", WRAP.sub(r"\1", wanted).strip()):
        chosen = re.match(r"\(?([A-J])(?:\)|[.:](?=\s|$)|$)", WRAP.sub(r"\1", given).strip())
        if chosen:
            return chosen[1] == choice[1]
    given, wanted = parse(given), parse(wanted)
    if isinstance(wanted, Group) and isinstance(given, str) and "," in given:
        given = parse(given, False)  # 100,200,300 against a list of three
    if isinstance(given, Group) and isinstance(wanted, str) and "," in wanted:
        wanted = parse(wanted, False)
    return _same(given, wanted, algebra)


def _squeezed(text: str) -> str:
    return WRAP.sub(r"\1", text).replace(" ", "")


def _same(a: Group | str, b: Group | str, algebra) -> bool:
    if any(isinstance(side, Group) and side.kind == "equation" for side in (a, b)):
        return _same_equation(a, b, algebra)
    if isinstance(a, str) and isinstance(b, str):
        return _same_leaf(a, b, algebra)
    if isinstance(a, str) or isinstance(b, str):
        group, leaf = (a, b) if isinstance(a, Group) else (b, a)
        if group.kind == "set" and len(group.items) == 1:
            a, b = (group.items[0], leaf) if group is a else (leaf, group.items[0])
            return _same(a, b, algebra)
        if quantity(leaf):  # one number is never several values
            return False
        return algebra(_text(a), _text(b))
    if len(a.items) != len(b.items):
        return False
    if a.kind in ("set", "union") and a.kind == b.kind:
        left = list(b.items)
        for item in a.items:
            match = next((i for i, other in enumerate(left) if _same(item, other, algebra)), None)
            if match is None:
                return False
            del left[match]
        return True
    column = {a.kind, b.kind} == {"matrix", "()"}  # a column vector written as a tuple
    bare = {a.kind, b.kind} == {"set", "()"} and not any(g.text.startswith("\\{") for g in (a, b))
    if a.kind != b.kind and not column and not bare:
        return False
    return all(_same(_cell(x), _cell(y), algebra) for x, y in zip(a.items, b.items, strict=True))


def _cell(item: Group | str) -> Group | str:
    """A row of one cell is that cell."""
    return item.items[0] if isinstance(item, Group) and item.kind == "row" and len(item.items) == 1 else item


def _same_equation(a: Group | str, b: Group | str, algebra) -> bool:
    """`x = 5` is `5`; two equations with one left side agree by their right sides."""
    sides = [(g.items if isinstance(g, Group) and g.kind == "equation" else (None, g)) for g in (a, b)]
    (left_a, right_a), (left_b, right_b) = sides
    if left_a == left_b or (None in (left_a, left_b) and "=" not in _text(right_a) + _text(right_b)):
        return _same(right_a, right_b, algebra)
    return algebra(_text(a), _text(b))


def _text(answer: Group | str) -> str:
    return answer if isinstance(answer, str) else answer.text


def _same_leaf(a: str, b: str, algebra) -> bool:
    if _squeezed(a) == _squeezed(b):
        return True
    y = quantity(b)
    x = quantity(a, letters=y is not None)
    if x and y:
        return _same_quantity(x, y)
    words = [WRAP.sub(r"\1", text).strip() for text in (a, b)]
    plain = [bool(re.fullmatch(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+", word)) for word in words]
    if all(plain) and words[0].casefold() == words[1].casefold():
        return True
    if (x or y) and any(plain):  # a number against a word
        return False
    return algebra(a, b)


def _same_quantity(answer: Quantity, reference: Quantity) -> bool:
    a, b = answer.value, reference.value
    if answer.unit and reference.unit:
        if answer.unit != reference.unit:
            return False
        a, b = a * answer.size, b * reference.size
    inexact = reference.decimal or (answer.decimal and reference.value.denominator != 1)
    near = TOLERANCE * abs(b) if inexact else 0
    scales = (Fraction(1),)
    if answer.percent != reference.percent:
        scales = (Fraction(1), Fraction(1, 100) if answer.percent else Fraction(100))
    return any(abs(a * scale - b) <= near for scale in scales)
