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
    note = "recorded with the kit, not on these runs; points above or below SFT, whose row is percent correct"
    regimes = [f"<b>{plain(name)}</b>: {plain(why)}" for name, why in recorded["regimes"].items()]
    rest = f"The other {len(others)} objectives at T = 1, in the regimes that tested them"
    return (
        f'<section class="lab"><h2>Which objective? <span class="small">{note}</span></h2>'
        f"{_said(recorded)}{_table(recorded, list(ranked), 'sampled', 'Sampled at T = 1')}"
        f"{_folded('With greedy decoding', _table(recorded, list(ranked), 'greedy', 'Greedy'))}"
        f"{_folded(rest, _table(recorded, others, 'sampled', 'The other objectives'))}"
        f"{_folded('The regimes', '<br>'.join(regimes))}{_limits(recorded)}</section>"
    )


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _said(recorded: Mapping[str, Any]) -> str:
    """What the lab's rule recommends and what that costs, who is ahead on a real base, and what to do."""
    said = ["Sampled at T = 1, no objective is good everywhere."]
    for label in recorded["recommended"]:
        row = recorded["ranks"][label]
        said.append(
            f"The lab’s rule recommends <b>{plain(label)}</b>, a compromise: "
            f"mean rank {row['mean_rank']:.1f}, at most {100 * row['worst_gap']:.0f} points behind the best "
            f"({plain(row['worst_in'])})."
        )
    for regime in recorded["real"]:
        shares = {
            label: cells[regime]["sampled"]["accuracy"]
            for label, cells in recorded["objectives"].items()
            if regime in cells
        }
        best = plain(max(shares, key=shares.__getitem__))
        said.append(f"On the real base ({plain(regime)}) <b>{best}</b> is ahead.")
    right, of = recorded["advice"]["right"], recorded["advice"]["of"]
    said.append(
        "Before a run, <code>dft-lora diagnose RECIPE</code> estimates which of SFT and DFT suits your base "
        f"and data; here its rule is right in {right} of {of} regimes."
    )
    return f"<p>{' '.join(said)}</p>"


def _table(recorded: Mapping[str, Any], labels: Sequence[str], mode: str, name: str) -> str:
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
    return html_table(head, rows, numbers=range(1, len(head)), stacked=True, name=name)


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
        "in 4 bits, with LoRA. Each objective had four settings; those with a number to choose tried only "
        "the two middle rates. Nothing here says what is best on a model of billions of parameters. "
        f"Recorded from {' to '.join(recorded['made'])}. docs/lab.md has intervals, settings and cost, "
        "docs/lab-protocol.md which objectives were compared with a later run of SFT.</p>"
    )
