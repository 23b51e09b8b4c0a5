"""The page's HTML: answers side by side, coloured tokens, many samples, votes.

Pure functions of values. Text from a model or a person goes through `text.plain` or `text.rich`. HTML for
gr.Markdown is a single line, which Markdown does not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .counts import Tally
from .text import plain, rich
from .votes import Pair, Standing

if TYPE_CHECKING:  # torch is not needed to show what it computed
    from .session import Answer, Token

CHIPS = {  # status -> (class, mark, words)
    "correct": ("good", "✓", "correct"),
    "wrong": ("bad", "✕", "wrong"),
    "unparsable": ("open", "?", "no answer found"),
    "timed_out": ("open", "?", "could not be judged"),
}
LISTED = 12  # tokens in the list of those that differ most
ANSWERS_LISTED = 6


MAX_COLUMNS = 4
"""Runs of a page: as many as it has colours."""


class Legend:
    """The runs of a page; each has the same colour everywhere."""

    def __init__(self, runs: Sequence[str]):
        self.runs = list(runs)

    def colour(self, run: str) -> str:
        """The CSS class of the run's colour."""
        return f"run-{self.runs.index(run)}"

    def __call__(self, run: str) -> str:
        """The run's name as HTML."""
        return f'<span class="run {self.colour(run)}">{plain(run)}</span>'


# --- answers --------------------------------------------------------------------------------------


def answers_view(runs: Sequence[str], answers: Sequence[Answer], label: Legend | None = None) -> str:
    """For gr.Markdown: one column per run with its samples, or a placeholder when there are none."""
    label = label or Legend(runs)
    columns = []
    for run in runs:
        mine = [answer for answer in answers if answer.run == run]
        body = "".join(map(_sample, mine)) or '<p class="nothing">The answer will appear here.</p>'
        columns.append(f'<section class="card"><header>{label(run)}{_score(mine)}</header>{body}</section>')
    return f'<div class="columns n{len(runs)}">{"".join(columns)}</div>'


def _score(answers: Sequence[Answer]) -> str:
    if len(answers) < 2 or not all(answer.verdict for answer in answers):
        return ""
    right = sum(answer.verdict.correct for answer in answers)
    return f'<span class="small">{right} of {len(answers)} correct</span>'


def _sample(answer: Answer) -> str:
    caret = '<span class="caret"></span>' if answer.state == "writing" else ""
    text = rich(answer.text) or ("" if caret else '<span class="nothing">(empty)</span>')
    return (
        f'<div class="sample"><div class="said">{text}{caret}</div>'
        f'<footer>{chip(answer)}<span class="small">{count(len(answer.ids), "token")} · '
        f"{answer.seconds:.2f} s</span></footer></div>"
    )


def chip(answer: Answer) -> str:
    """The verdict with the answer that was judged, or the state when there is no verdict."""
    if answer.state == "writing":
        return '<span class="chip wait">writing …</span>'
    ended = "" if answer.state == "done" else f'<span class="chip open">{answer.state}</span>'
    if answer.verdict is None:
        return ended or '<span class="chip wait">done</span>'
    kind, mark, words = CHIPS[answer.verdict.status]
    said = f" <b>{rich(answer.verdict.extracted)}</b>" if answer.verdict.extracted else ""
    return f'<span class="chip {kind}">{mark} {words}{said}</span>{ended}'


def html_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
    stacked: bool = False,
    name: str = "table",
) -> str:
    """A table of HTML cells with a head; the columns in `numbers` are right-aligned figures.

    `name`: what a screen reader calls it.

    `stacked`: on a phone each row becomes a block, with the heads (plain text) before its cells.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        if stacked and tag == "td":
            kinds = [f'{kind} data-head="{name}"' for kind, name in zip(kinds, head, strict=True)]
        return "".join(
            f"<{tag}{kind}>{cell}</{tag.split()[0]}>" for kind, cell in zip(kinds, cells, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{line('th scope=col', head)}</tr></thead>"
    kind = ' class="stacked"' if stacked else ""
    table = f"<table{kind}>{top}<tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">{table}</div>'


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# --- tokens ---------------------------------------------------------------------------------------


def tokens_view(
    runs: Sequence[str], rows: Sequence[tuple[str, Sequence[Token]]], pair: tuple[str, str] | None
) -> str:
    """For gr.HTML: one strip of coloured tokens per (run, tokens) row.

    With `pair`, all rows are the same text. Then it also shows each objective's gradient per token under the
    first run, and the tokens whose probabilities differ most between the two runs of `pair`.
    """
    label = Legend(runs)
    strips = "".join(strip(label(run), run, tokens) for run, tokens in rows)
    view = f'{SCALE}<div class="strips">{strips}</div>'
    if pair is None:
        return view
    first, tokens = rows[0]
    peak = {norm: max(map(norm, tokens)) or 1.0 for norm in (_sft, _dft)}
    gradients = "".join(
        strip(name, name, tokens, note, lambda token, norm=norm: norm(token) / peak[norm], "grad")
        for name, note, norm in (
            ("SFT gradient", "2 (1 − p): largest for unlikely tokens", _sft),
            ("DFT gradient", "2 p (1 − p): small for unlikely tokens", _dft),
        )
    )
    return (
        f"{view}<h2>Gradient per token, under {label(first)}</h2>"
        '<p class="small">The stronger the colour, the larger the gradient (L1 norm over the logits). DFT '
        "multiplies SFT’s gradient by the token’s probability, so unlikely tokens no longer dominate.</p>"
        f'<div class="strips">{gradients}</div>'
        f"{_differing(label, dict(rows), pair)}"
    )


SCALE = (
    '<p class="scale small"><span>unlikely 0</span><i class="ramp"></i><span>1 certain</span>'
    "<span>The colour shows a token’s probability, which is also its weight in DFT; in SFT every token has "
    "weight 1. Tokens below 0.25 are underlined. Hover over a token, or use the arrow keys, to see its "
    "figures.</span></p>"
)


def _sft(token: Token) -> float:
    return token.sft_gradient


def _dft(token: Token) -> float:
    return token.dft_gradient


def _figures(tokens: Sequence[Token]) -> str:
    mean = sum(token.probability for token in tokens) / len(tokens)
    return f"mean p {mean:.3f} · {count(len(tokens), 'token')}"


def _probability(token: Token) -> float:
    return token.probability


def strip(
    name: str,
    spoken: str,
    tokens: Sequence[Token],
    note: str = "",
    shade: Callable[[Token], float] = _probability,
    kind: str = "p",
) -> str:
    """A strip of coloured tokens. `name` is HTML, `spoken` the same for screen readers; `note` (default: the
    mean probability) stands beside it."""
    note = note or _figures(tokens)
    spans = "".join(
        f'<span class="t {kind}{round(10 * shade(token))}" tabindex="-1" data-tip="{_tip(token)}">'
        f"{_shown(token.text)}</span>{_break(token.text)}"
        for token in tokens
    )
    named = plain(f"tokens, {spoken}: {note}")
    return (
        f'<div class="strip"><header>{name}<span class="small">{note}</span></header>'
        f'<div class="text" tabindex="0" role="group" aria-label="{named}">{spans}</div></div>'
    )


def _shown(text: str) -> str:
    """A token on the strip: a line break gets a mark, an empty piece (half a character) a dot."""
    return plain(text).replace("\n", "⏎") or "·"


def _break(text: str) -> str:
    """A line break after a token that ends a line, outside the token's box."""
    return "\n" if text.endswith("\n") else ""


def _tip(token: Token) -> str:
    lines = [
        quoted(token.text),
        f"probability (= DFT weight) {token.probability:.4f}",
        f"gradient: SFT {token.sft_gradient:.3f}, DFT {token.dft_gradient:.3f}",
        *(["most likely tokens"] if token.top else []),
        *(f"  {probability:.4f}  {quoted(text)}" for text, probability in token.top),
    ]
    return plain("\n".join(lines)).replace("\n", "&#10;")


def quoted(text: str) -> str:
    """A token's text on one line, with visible white space."""
    return "‘" + text.replace("\n", "⏎").replace("\t", "⇥") + "’"


def _differing(label: Legend, rows: Mapping[str, Sequence[Token]], pair: tuple[str, str]) -> str:
    (a, b), start = pair, next(iter(rows))
    differing = sorted(
        enumerate(zip(rows[a], rows[b], strict=True)),
        key=lambda item: -abs(item[1][1].probability - item[1][0].probability),
    )[:LISTED]
    texts = [token.text for token in rows[a]]
    head = ["token in context", f"p under {label(a)}", f"p under {label(b)}", "difference"]
    cells = [
        [
            _context(texts, i),
            _bar(x.probability, a, label),
            _bar(y.probability, b, label),
            f"{y.probability - x.probability:+.3f}",
            _bar(rows[start][i].weight, start, label),
        ]
        for i, (x, y) in differing
    ]
    return (
        f"<h2>Where {label(a)} and {label(b)} disagree most</h2>"
        f"{html_table([*head, f'DFT weight under {label(start)}'], cells, numbers=[3])}"
    )


def _context(texts: Sequence[str], i: int, before: int = 6, after: int = 3) -> str:
    left, right = "".join(texts[max(0, i - before) : i]), "".join(texts[i + 1 : i + 1 + after])
    flat = [plain(part.replace("\n", "⏎")) for part in (left, texts[i], right)]
    return f'<div class="context">{flat[0]}<mark>{flat[1] or "·"}</mark>{flat[2]}</div>'


def _bar(share: float, run: str, label: Legend) -> str:
    return f'<span class="bar {label.colour(run)}"><i style="width:{100 * share:.1f}%"></i></span>{share:.3f}'


# --- samples --------------------------------------------------------------------------------------


def samples_view(runs: Sequence[str], tallies: Sequence[Tally], written: int, wanted: int) -> str:
    """For gr.HTML: per run the share correct, distinct answers, majority; `written` of `wanted` are done."""
    label = Legend(runs)
    cards = "".join(_tally(label, tally) for tally in tallies)
    progress = (
        f'<p class="small">{written} of {wanted} answers finished.</p>'
        f'<progress max="{wanted}" value="{written}" aria-label="answers finished"></progress>'
    )
    return f'{progress if written < wanted else ""}<div class="columns n{len(runs)}">{cards}</div>'


def _tally(label: Legend, tally: Tally) -> str:
    share = '<p class="nothing">Not judged: there is no reference answer.</p>' if tally.samples else ""
    if tally.judged:
        low, high = (100 * bound for bound in tally.interval)
        middle = 100 * tally.correct / tally.samples
        share = (
            f'<p class="big">{middle:.0f} %</p><p class="small">{tally.correct} of {tally.samples} correct, '
            f"95 % interval {low:.0f} to {high:.0f} %</p>{interval_bar(low, middle, high)}"
        )
    rows = "".join(
        f'<tr class="{"right" if answer in tally.right else ""}"><td class="answer">{plain(answer)}'
        f"{' <b>✓</b>' if answer in tally.right else ''}"
        f"{' <i>majority</i>' if answer == tally.majority else ''}</td>"
        f'<td class="number">{n}</td></tr>'
        for answer, n in tally.answers[:ANSWERS_LISTED]
    )
    more = len(tally.answers) - ANSWERS_LISTED
    notes = [
        f"{more} more" if more > 0 else "",
        f"{tally.unparsable} with no answer found" if tally.unparsable else "",
        f"{tally.truncated} truncated" if tally.truncated else "",
    ]
    return (
        f'<section class="card"><header>{label(tally.run)}'
        f'<span class="small">{count(len(tally.answers), "distinct answer")}</span></header>{share}'
        f'<table class="answers"><tbody>{rows}</tbody></table>'
        f'<p class="small">{", ".join(filter(None, notes))}</p></section>'
    )


def interval_bar(low: float, middle: float, high: float) -> str:
    """A point and its interval on a scale from 0 to 100 %."""
    return (
        f'<div class="interval" aria-hidden="true"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<b style="left:{middle:.1f}%"></b></div>'
    )


# --- blind vote -----------------------------------------------------------------------------------


def pair_view(pair: Pair | None, runs: Sequence[str] = ()) -> str:
    """For gr.Markdown: two answers; with their runs' names only when `runs` is given."""
    if pair is None:
        return '<p class="nothing">Two answers to the same problem will appear here, without run names.</p>'
    sides = (("Left", pair.left, pair.left_text), ("Right", pair.right, pair.right_text))
    cards = "".join(
        f'<section class="card"><header><span class="side">{side}</span>'
        f"{Legend(runs)(run) if runs else ''}</header>"
        f'<div class="said">{rich(text)}</div></section>'
        for side, run, text in sides
    )
    return f'<div class="asked">{rich(pair.problem)}</div><div class="columns n2">{cards}</div>'


def standings_view(runs: Sequence[str], standings: Sequence[Standing]) -> str:
    """For gr.HTML: the count of votes on the page's runs."""
    if not standings:
        return '<p class="nothing">No votes yet.</p>'
    label = Legend(runs)
    rows = []
    for s in standings:
        low, high = (100 * bound for bound in s.interval)
        share = "—"
        if s.share is not None:
            share = f"{100 * s.share:.0f} % ({low:.0f} to {high:.0f}){interval_bar(low, 100 * s.share, high)}"
        pair = f"{label(s.a)} against {label(s.b)}"
        rows.append([pair, str(s.for_a), str(s.for_b), str(s.ties), share])
    head = ["runs", "first wins", "second wins", "ties", "first run’s share of decided votes (95 % interval)"]
    return html_table(head, rows, numbers=[1, 2, 3])
