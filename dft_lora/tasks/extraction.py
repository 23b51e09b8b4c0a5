r"""The final answer in a text.

    extract        a model's text -> its final answer as written, or None
    has_box        whether a text holds a complete \boxed{...}
    gsm8k_answer   a text -> the number in its last line, where that is GSM8K's `#### number`, or None
    clean_gsm8k    a GSM8K solution -> (solution with its answer boxed, answer)

The last complete box takes precedence, then `####`, then "answer is". A short line is an answer by itself.
Otherwise it is the last number of the text, as in the reference harness (Qwen2.5-Math's, which the DFT paper
used). Every step is linear in the text, so a hostile answer costs no more than an ordinary one.
"""

from __future__ import annotations

import re
from collections import deque

_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.S)
_STATED = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[\s:*]*(?=\S)", re.I)
_MATHS = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z][A-Za-z']+\s+[A-Za-z]{2,}\b")
_MARK = re.compile(r"^####", re.M)
_MARKED_NUMBER = re.compile(r"^####[ \t]*(-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?)\s*\Z", re.M)
_NUMBER = re.compile(r"-?\\[dt]?frac\{\d+\}\{\d+\}|(?<![\w.,])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def extract(text: str) -> str | None:
    """The final answer of a text as written, or None."""
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


def gsm8k_answer(text: str) -> str | None:
    """The answer of a text in GSM8K's form, without thousands separators; None for any other text.

    In that form the last line is `#### number`, and no other line begins with `####`. So neither a Markdown
    heading nor a trailing `####` is mistaken for it.
    """
    if len(_MARK.findall(text)) != 1 or not (last := _MARKED_NUMBER.search(text)):
        return None
    return last[1].replace(",", "")


def clean_gsm8k(text: str) -> tuple[str, str]:
    """(solution without `<<...>>` marks and with its answer boxed, answer) of a GSM8K `answer` field.

    Raises ValueError if the text does not end in `#### number`.
    """
    answer = gsm8k_answer(text)
    if answer is None:
        raise ValueError("a GSM8K answer ends in a line '#### number'; this one does not")
    worked = re.sub(r"<<[^<>]*>>", "", text.rpartition("####")[0]).strip()
    return f"{worked}\n\\boxed{{{answer}}}".lstrip(), answer
