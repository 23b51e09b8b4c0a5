r"""Untrusted text (problems, references, model output) as harmless HTML.

`plain` is for gr.HTML, which shows its input as it is. `rich` is for gr.Markdown, which renders LaTeX between
\( \) and \[ \]: it keeps formulas and escapes everything else, on one line that Markdown takes for a block of
HTML and does not touch. In whatever order Markdown, the sanitizer and KaTeX run, nothing in the text reaches
the browser as markup: no tag, no link, no image.
"""

from __future__ import annotations

import re
from html import escape

DELIMITERS = (
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
)
LONGEST_FORMULA = 1000  # characters; bounds the search for a closing delimiter

_ANY = f"(?:(?!\\n\\s*\\n).){{1,{LONGEST_FORMULA}}}?"
_MATH = re.compile(
    rf"\$\$({_ANY})\$\$|\\\[({_ANY})\\\]|\\\(({_ANY})\\\)"
    rf"|(?<![\\$\w])\$(?=[^\s$])([^$\n]{{1,{LONGEST_FORMULA}}})(?<![\s\\])\$(?![\d$])",
    re.S,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MARKUP = re.compile(r"[&<>\"'`$\\%\n*_\[\]#~|!]")


def plain(text: str) -> str:
    """Text for an HTML element or attribute. Control and bidi-override characters become U+FFFD."""
    return escape(_CONTROL.sub("\ufffd", text.replace("\r\n", "\n")))


def rich(text: str) -> str:
    """Text with its formulas, for gr.Markdown with DELIMITERS."""
    text = _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))
    parts, end = [], 0
    for match in _MATH.finditer(text):
        parts += [_characters(text[end : match.start()]), _formula(match)]
        end = match.end()
    return "".join([*parts, _characters(text[end:])])


def _characters(text: str) -> str:
    """Escape everything that Markdown or HTML could read as markup. `$` and `\\` also get an element of their
    own, so that KaTeX finds no delimiter that spans them."""

    def reference(match: re.Match[str]) -> str:
        character = f"&#{ord(match[0])};"
        return f"<span>{character}</span>" if match[0] in "$\\" else character

    return _MARKUP.sub(reference, text)


def _formula(match: re.Match[str]) -> str:
    """A formula between the delimiters that the page renders, free of HTML and Markdown characters."""
    block, bracket, paren, dollar = match.groups()
    body = " ".join((block or bracket or paren or dollar).split())
    body = body.replace("<", r"\lt ").replace(">", r"\gt ").replace("![", "!{}[").replace("](", "]{}(")
    body = re.sub(r"\\\\(?=[()\[\]])", r"\\\\ ", body)  # a row break before a bracket is no delimiter
    body = re.sub(r"(?<!\\)%", r"\\%", body)  # shown, not a comment; nor one of Gradio's own %%% marks
    body = body.replace("`", "'").replace('"', "''")
    if not body or any(mark in body for mark in ("\\(", "\\)", "\\[", "\\]")):
        return _characters(match[0])  # nested delimiters: shown as written
    return rf"\[{body}\]" if block or bracket else rf"\({body}\)"
