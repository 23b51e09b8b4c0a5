"""The recorded objective lab on the Results tab: which objective is better where.

lab.json holds what `docs/generate.py` takes from the recorded experiment; see docs/lab.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..runs.folder import read_json
from .text import plain
from .views import html_table

FILE = Path(__file__).with_name("lab.json")
FULL_COLOUR = 15
"""Points of difference to SFT from which a cell has its full colour."""


@cache
def lab_view() -> str:
    """For gr.HTML: every objective's difference to SFT in every regime, best mean rank first."""
    recorded = read_json(FILE)
    ranked = recorded["ranks"]
    others = [label for label in recorded["objectives"] if label not in ranked]
    note = "recorded with the kit, not on these runs; points above or below SFT, sampled at T = 1"
    regimes = [f"<b>{plain(name)}</b>: {plain(why)}" for name, why in recorded["regimes"].items()]
    rest = f"The other {len(others)} objectives, in the regimes that tested them"
    return (
        f'<section class="lab"><h2>Which objective? <span class="small">{note}</span></h2>'
        f"{_said(recorded)}{_table(recorded, list(ranked), 'sampled')}"
        f"{_folded('With greedy decoding', _table(recorded, list(ranked), 'greedy'))}"
        f"{_folded(rest, _table(recorded, others, 'sampled'))}"
        f"{_folded('The regimes', '<br>'.join(regimes))}{_limits(recorded)}</section>"
    )


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _said(recorded: Mapping[str, Any]) -> str:
    """Who ranks first, how far behind it can be, who is ahead on a real base, and what to do."""
    objectives, ranked = recorded["objectives"], recorded["ranks"]
    first, row = next(iter(ranked.items()))
    said = (
        f"<b>{plain(first)}</b> has the best mean rank of {len(ranked)} objectives over "
        f"{len(recorded['regimes'])} regimes, but none is good everywhere: in {plain(row['worst_in'])} it is "
        f"{100 * row['worst_gap']:.0f} points behind the best."
    )
    for regime in recorded["real"]:
        best = max(ranked, key=lambda label: objectives[label][regime]["sampled"]["accuracy"])
        said += f" On the real base ({plain(regime)}) <b>{plain(best)}</b> is ahead."
    ask = "<code>dft-lora diagnose RECIPE</code> measures which side your base and data are on."
    return f"<p>{said} {ask}</p>"


def _table(recorded: Mapping[str, Any], labels: Sequence[str], mode: str) -> str:
    """A line for each objective. SFT's cells are its accuracies; bold cells are clear after correction."""
    ranked = recorded["ranks"] if mode == "sampled" else {}
    has_ranks = any(label in ranked for label in labels)
    cells = {label: recorded["objectives"][label] for label in labels}
    regimes = [regime for regime in recorded["regimes"] if any(regime in found for found in cells.values())]
    rows = []
    for label, found in cells.items():
        rank = [f"{ranked[label]['mean_rank']:.1f}"] if has_ranks else []
        row = [_cell(found[regime][mode]) if regime in found else "" for regime in regimes]
        rows.append([plain(label), *rank, *row])
    head = ["objective", *(["mean rank"] if has_ranks else []), *map(plain, regimes)]
    return html_table(head, rows, numbers=range(1, len(head)), stacked=True)


def _cell(found: Mapping[str, Any]) -> str:
    if "minus_sft" not in found:
        return f"{100 * found['accuracy']:.1f} %"
    points = 100 * found["minus_sft"]
    colour, share = ("high" if points > 0 else "low"), min(1.0, abs(points) / FULL_COLOUR)
    said = f"{points:+.1f}".replace("-", "−") if round(points, 1) else "0.0"
    said = f"<b>{said}</b>" if found["clear"] else said
    return f'<span class="{colour}" style="--share: {100 * share:.0f}%">{said}</span>'


def _limits(recorded: Mapping[str, Any]) -> str:
    """What the table does not show, and where the rest is."""
    return (
        '<p class="small">Bold: the difference is significant after Holm’s correction. All regimes but '
        f"{plain(', '.join(recorded['real']))} use an embedded base of 1.1 million parameters; all bases are "
        "in 4 bits, with LoRA. Nothing here says what is best on a model of billions of parameters. Recorded "
        f"from {' to '.join(recorded['made'])}; docs/lab.md has intervals, settings and cost.</p>"
    )
