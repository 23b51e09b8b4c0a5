"""Exact numbers with units: `quantity` parses an answer that is one, and nothing else.

Integers, fractions, decimals, powers, percentages and units from a small table, as `fractions.Fraction`.
Every number is bounded, so `10^{10^{10}}` costs no more than `10`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial
from typing import NamedTuple

_BITS = 20_000  # of the largest number computed exactly: 2^1009 yes, 10^{10^{10}} no
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:[eE][-+]?\d{1,4}(?!\w))?"
    r"|\.\d+(?:[eE][-+]?\d{1,4}(?!\w))?)|(?P<sign>\\frac|\\cdot|\\times|\\binom|[-+*/^!(){}]))"
)


class _NotExact(Exception):
    """The text continues with something that is not an exact number."""


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
        """A factor that follows without an operator: a bracket or a fraction, never a second bare number."""
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
        """A decimal, or a mixed number: an integer directly before a fraction below one."""
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
        r"""The argument of \frac or ^: a group in braces, or a single digit."""
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
WRAP = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT_WORDS = re.compile(  # possessive: backtracking over so many ways to cut words takes exponential time
    r"(?:[\s/.]*+[A-Za-z]++\.?+(?:\s*+\^\s*+\{?+-?+\d++\}?+)?+)++[\s.]*+"
)


class Quantity(NamedTuple):
    """An exact number as it was written."""

    value: Fraction
    decimal: bool = False  # a point or an exponent was used
    percent: bool = False
    unit: tuple[tuple[str, int], ...] | None = None  # dimensions with powers; None: no unit, or unknown
    size: Fraction = Fraction(1)  # of the unit, in the units of its dimensions


@lru_cache(4096)
def quantity(text: str, letters: bool = False) -> Quantity | None:
    """The exact number, with its unit, that a tidy text states; None if it is anything else.

    `letters`: whether a bare m or s after a space is a unit; otherwise it is a variable.
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
    """(size, dimensions) of the text after a number; (1, None) for unknown units; None: not a unit."""
    plain = WRAP.sub(r" \1 ", rest).replace(r"\cdot", " ")
    if not _UNIT_WORDS.fullmatch(plain):
        return None
    words = re.findall(r"(/|\bper\b)|([A-Za-z]+)\.?\s*(?:\^\s*\{?(-?\d+)\}?)?", plain)
    names = [word for _, word, _ in words if word]
    if not WRAP.search(rest):  # bare letters may be variables: 6m, 2 n, 5xy
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
