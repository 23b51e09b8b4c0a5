r"""Final answers without algebra: find them in a text, bring them into one form, compare them exactly.

    extract       a model's text -> its final answer as written, or None
    agree         two final answers -> same or not
    clean_gsm8k   a GSM8K solution -> (solution with its answer boxed, answer)

`agree` takes an answer apart (lists, sets, tuples, intervals, unions, matrices) down to leaves and
compares numbers as exact fractions, with units, percentages and degrees. A pair of leaves that needs
algebra goes to the function given as `algebra`; the default raises `NeedsAlgebra`. Only the standard
library is used, and every step is linear in the text or bounded, so that a hostile answer costs no
more than an ordinary one.

Rules where practice differs (the reference harness is Qwen2.5-Math's, which the DFT paper used):
- The last complete box counts, then `####`, then "answer is"; a short line is an answer by itself;
  else the last number of the text is taken, as that harness does.
- Integers and fractions match exactly. Where a decimal is involved 1e-4 relative is near enough (that
  harness's tolerance), except that an integer reference wants the integer.
- `50%` matches 50 and 0.5; a bare 0.5 does not match 50. Degrees are a unit. A unit that one side leaves
  out or that is not in the table is ignored; two units of the table are converted.
- Values separated by commas form a set; a tuple, an interval and a matrix keep their order.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial
from typing import NamedTuple

LONGEST = 1000  # characters of an answer that is still worth reading
TOLERANCE = Fraction(1, 10_000)
_BITS = 20_000  # of the largest number computed exactly: 2^1009 yes, 10^{10^{10}} no


class NeedsAlgebra(Exception):
    """Two answers that exact arithmetic cannot compare."""


# ---------------------------------------------------------------------------------- finding the answer

_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.S)
_STATED = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[\s:*]*(?=\S)", re.I)
_MATHS = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}\b")
_NUMBER = re.compile(r"-?\\[dt]?frac\{\d+\}\{\d+\}|(?<![\w.,])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def extract(text: str) -> str | None:
    """The final answer of a text as it stands there, or None."""
    box = _last_box(text)
    if box is not None:
        return box.strip() or None
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    stated = deque(_STATED.finditer(text), maxlen=1)
    line = text.strip()
    if stated:
        line = text[stated[0].end() :].partition("\n")[0]
        if maths := _MATHS.match(line):
            return next(filter(None, maths.groups())).strip() or None
        line = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip(" *")
    if len(line) <= 100 and "\n" not in line and "\\boxed" not in line and not _PROSE.search(line):
        return line or None
    numbers = _NUMBER.findall(line[-10_000:])
    return numbers[-1].rstrip(",") if numbers else None


def _last_box(text: str) -> str | None:
    r"""Content of the last \boxed{...} (\fbox, \framebox) whose braces close; one pass over the text."""
    starts, last = [], None  # starts: of the content of each open brace; None for a brace that is no box
    for token in _BRACE.finditer(text):
        mark = token[0]
        if mark == "{":
            starts.append(None)
        elif mark == "}" and starts:
            start = starts.pop()
            last = last if start is None else text[start : token.start()]
        elif len(mark) > 2:
            starts.append(token.end())
    if last is None and (bare := re.findall(r"\\boxed\s+([^\s${}]+)", text)):
        last = bare[-1]
    return last


def has_box(text: str) -> bool:
    r"""Whether a text holds a complete \boxed{...}."""
    return _last_box(text) is not None


def clean_gsm8k(text: str) -> tuple[str, str]:
    """(solution without `<<...>>` marks and with its answer boxed, answer) of a GSM8K `answer` field.

    Raises ValueError where the text does not end in `#### x`.
    """
    worked, mark, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError("a GSM8K answer ends in '#### x'; this one does not")
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()
    return f"{worked}\n\\boxed{{{answer}}}", answer


# ------------------------------------------------------------------------------------------- one form

_TIDY = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"[−–]", "-"),
        (r"×", r"\\times "),
        (r"[·⋅]", r"\\cdot "),
        (r"π|(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"∪", r"\\cup "),
        (r"√\s*(\d+)|(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1\2}"),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r",\s*\\!\s*|\{,\}", ","),
        (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-z])|~|\xa0", " "),
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
    """The answer without typography: spacing, dollar signs, degree marks, other spellings of one thing."""
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
    """A tidy answer as nested groups with leaves of text; `thousands`: read a bare 1,234 as one number."""
    text = text.strip()
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
    """The non-empty parts of a text between separators that stand outside every bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth <= 0 and letter in separators:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()] or [""]


def _wrapped(text: str) -> bool:
    """Whether the bracket that opens a text closes at its very end."""
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


# ----------------------------------------------------------------------------------------- exact numbers

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:[eE][-+]?\d{1,4}(?!\w))?"
    r"|\.\d+(?:[eE][-+]?\d{1,4}(?!\w))?)|(?P<sign>\\frac|\\cdot|\\times|\\binom|[-+*/^!(){}]))"
)


class _NotExact(Exception):
    """The text goes on with something that is no exact number."""


class _Calculator:
    r"""Exact value of + - * / ^ ! \frac \binom, mixed numbers and products by juxtaposition.

    `value()` reads as far as the text is such an expression; the rest begins at `at`.
    """

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def peek(self) -> re.Match | None:
        return _TOKEN.match(self.text, self.at)

    def take(self, *signs: str) -> str | None:
        token = self.peek()
        if token is None or token["sign"] not in signs:
            return None
        self.at = token.end()
        return token["sign"]

    def attempt(self, read: Callable[[], Fraction]) -> Fraction | None:
        """`read()`, or None with nothing consumed."""
        start = self.at
        try:
            return read()
        except _NotExact:
            self.at = start
            return None

    def value(self) -> Fraction:
        self.depth += 1
        if self.depth > 50:
            raise _NotExact
        total = self.product()
        while True:
            start, sign = self.at, self.take("+", "-")
            term = self.attempt(self.product) if sign else None
            if term is None:
                self.at, self.depth = start, self.depth - 1
                return total
            total = self.bounded(total + (term if sign == "+" else -term))

    def product(self) -> Fraction:
        total = self.signed()
        while True:
            start, sign = self.at, self.take("*", "/", r"\cdot", r"\times")
            factor = self.attempt(self.signed if sign else self.juxtaposed)
            if factor is None or (sign == "/" and not factor):
                self.at = start
                return total
            total = self.bounded(total / factor if sign == "/" else total * factor)

    def juxtaposed(self) -> Fraction:
        """A factor that follows without a sign: a bracket or a fraction, never a second bare number."""
        token = self.peek()
        if token is None or token["sign"] not in ("(", r"\frac", r"\binom"):
            raise _NotExact
        return self.power()

    def signed(self) -> Fraction:
        sign = self.take("-", "+")
        return -self.power() if sign == "-" else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while self.take("!"):
            if base.denominator != 1 or not 0 <= base <= 1000:
                raise _NotExact
            base = Fraction(factorial(int(base)))
        if not self.take("^"):
            return base
        exponent = self.argument() if self.peek() and self.peek()["sign"] == "{" else self.signed()
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * bits > _BITS or (not base and exponent <= 0):
            raise _NotExact
        return base ** int(exponent)

    def atom(self) -> Fraction:
        token = self.peek()
        if token is None:
            raise _NotExact
        if token["number"]:
            return self.number(token)
        if self.take("("):
            return self.closed(")")
        if self.take("{"):
            return self.closed("}")
        if self.take(r"\frac"):
            top, bottom = self.argument(), self.argument()
            if not bottom:
                raise _NotExact
            return top / bottom
        if self.take(r"\binom"):
            n, k = self.argument(), self.argument()
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 1000:
                raise _NotExact
            return Fraction(comb(int(n), int(k)))
        raise _NotExact

    def number(self, token: re.Match) -> Fraction:
        """A decimal, or a mixed number: an integer straight before a fraction below one."""
        self.at = token.end()
        digits = token["number"].replace(",", "")
        if len(digits) > 1000:
            raise _NotExact
        whole = Fraction(digits)
        part = re.compile(r"\s*\\frac\s*(?:(\d)\s*(\d)(?!\d)|\{(\d+)\}\s*\{(\d+)\})|\s+(\d+)/(\d+)").match(
            self.text, self.at
        )
        if part and digits.isdigit():
            top, bottom = (int(n) for n in part.groups() if n)
            if top < bottom:
                self.at = part.end()
                return whole + Fraction(top, bottom)
        return whole

    def argument(self) -> Fraction:
        r"""What \frac and ^ take: a group in braces, or a single digit."""
        if self.take("{"):
            return self.closed("}")
        digit = re.compile(r"\s*(\d)").match(self.text, self.at)
        if not digit:
            raise _NotExact
        self.at = digit.end()
        return Fraction(digit[1])

    def closed(self, bracket: str) -> Fraction:
        value = self.value()
        if not self.take(bracket):
            raise _NotExact
        return value

    def bounded(self, value: Fraction) -> Fraction:
        if value.numerator.bit_length() + value.denominator.bit_length() > 2 * _BITS:
            raise _NotExact
        return value


# ------------------------------------------------------------------------------------- units, quantities

_UNITS = {  # word -> (dimension, how many of the dimension's unit); plurals of long words are understood
    word: (dimension, Fraction(size))
    for dimension, sizes in {
        "length": "mm millimeter millimetre 1/1000 cm centimeter centimetre 1/100 m meter metre 1 "
        "km kilometer kilometre 1000 nm 1/1000000000 in inch inches 127/5000 ft foot feet 381/1250",
        "time": "ms 1/1000 s sec second 1 min minute 60 h hr hour 3600 day 86400 week 604800",
        "mass": "mg 1/1000000 g gram 1/1000 kg kilogram 1",
        "volume": "mL ml milliliter 1/1000 L liter litre 1",
        "money": "cent 1/100 dollar 1",
    }.items()
    for words, size in re.findall(r"((?:[A-Za-z]+ )+)([\d/]+)", sizes)
    for word in words.split()
}
_WRAP = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT_WORDS = re.compile(r"(?:[\s/.]*[A-Za-z]+\.?(?:\s*\^\s*\{?-?\d+\}?)?)+[\s.]*")


class Quantity(NamedTuple):
    """An exact number as it was written."""

    value: Fraction
    decimal: bool = False  # a point or an exponent was used
    percent: bool = False
    unit: tuple[tuple[str, int], ...] | None = None  # dimensions with powers; None: none, or not known
    size: Fraction = Fraction(1)  # of the unit, in the units of its dimensions


@lru_cache(4096)
def quantity(text: str, letters: bool = False) -> Quantity | None:
    """The exact number, with its unit, that a tidy text is; None where it is anything else.

    `letters`: whether a bare m or s after a space is a unit; else it is a variable.
    """
    reader = _Calculator(text)
    try:
        value = reader.value()
    except _NotExact:
        return None
    written, rest = text[: reader.at], text[reader.at :]
    decimal = bool(re.search(r"\.\d|\d[eE]", written))
    if rest.strip() in ("%", r"\text{percent}", "percent"):
        return Quantity(value, decimal, percent=True)
    if base := re.fullmatch(r"_\{?(\d+)\}?", rest):  # 52_8: digits in another base are kept as digits
        return Quantity(value, unit=((f"base {base[1]}", 1),)) if written.isdigit() else None
    if not rest.strip():
        return Quantity(value, decimal)
    if (unit := _unit(rest, letters)) is None:
        return None
    size, dimensions = unit
    return Quantity(value, decimal, unit=dimensions, size=size)


def _unit(rest: str, letters: bool) -> tuple[Fraction, tuple[tuple[str, int], ...] | None] | None:
    """(size, dimensions) of what stands after a number; (1, None) for unknown units; None: not a unit."""
    plain = _WRAP.sub(r" \1 ", rest).replace(r"\cdot", " ")
    if not _UNIT_WORDS.fullmatch(plain):
        return None
    words = re.findall(r"(/|\bper\b)|([A-Za-z]+)\.?\s*(?:\^\s*\{?(-?\d+)\}?)?", plain)
    names = [word for _, word, _ in words if word]
    if not _WRAP.search(rest):  # bare letters may be variables: 6m, 2 n, 5xy
        short = [name for name in names if len(name) < 3]
        variable = len(names) == 1 and len(names[0]) == 1 and not letters
        if variable or not rest[0].isspace() or any(name not in _UNITS for name in short):
            return None
    factor, dimensions, sign = Fraction(1), {}, 1
    for divided, word, power in words:
        if divided:
            sign = -1
            continue
        known = _UNITS.get(word) or _UNITS.get(word.lower().removesuffix("s"))
        if known is None:
            return Fraction(1), None
        exponent = sign * int(power or 1)
        factor *= known[1] ** exponent if abs(exponent) < 10 else 1
        dimensions[known[0]] = dimensions.get(known[0], 0) + exponent
    return factor, tuple(sorted(dimensions.items()))


# -------------------------------------------------------------------------------------------- comparison


def _no_algebra(answer: str, reference: str) -> bool:
    raise NeedsAlgebra


def agree(answer: str, reference: str, algebra: Callable[[str, str], bool] = _no_algebra) -> bool:
    """Whether two final answers say the same; `algebra(answer, reference)` decides what is not exact.

    Raises NeedsAlgebra where the default `algebra` would be asked.
    """
    given, wanted = tidy(answer), tidy(reference)
    if _squeezed(given) == _squeezed(wanted):
        return True
    if choice := re.fullmatch(r"\(?([A-J])\)?", _WRAP.sub(r"\1", wanted).strip()):
        chosen = re.match(r"\(?([A-J])(?:\)|[.:](?=\s|$)|$)", _WRAP.sub(r"\1", given).strip())
        if chosen:
            return chosen[1] == choice[1]
    given, wanted = parse(given), parse(wanted)
    if isinstance(wanted, Group) and isinstance(given, str) and "," in given:
        given = parse(given, False)  # 100,200,300 against a list of three
    if isinstance(given, Group) and isinstance(wanted, str) and "," in wanted:
        wanted = parse(wanted, False)
    return _same(given, wanted, algebra)


def _squeezed(text: str) -> str:
    return _WRAP.sub(r"\1", text).replace(" ", "")


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
    words = [_WRAP.sub(r"\1", text).strip() for text in (a, b)]
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
