"""The HTML of the Train tab: data as the model sees it, what to expect of a training, and one as it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.templates import Example, Renderer
from ..model.memory import MIB
from .charts import CURVES, curves
from .session import Token
from .text import plain
from .views import SCALE, Legend, count, html_table, strip
from .workshop import Inspection, Moment, Training

PREVIEWED = 3  # rows
LIVE_CURVES = (*CURVES, ("grad_norm", "gradient norm before clipping"))
STATES = {  # state -> (class of the chip, words)
    "loading": ("wait", "loading the base …"),
    "training": ("wait", "training …"),
    "paused": ("open", "paused"),
    "stopped": ("open", "stopped"),
    "done": ("good", "✓ done"),
}


def inspection_view(found: Inspection) -> str:
    """For gr.HTML: the verdict of the diagnosis, what the data doctor found, and the first rows."""
    plan, said = found.plan, found.diagnosis
    notes = [
        f"{len(finding.rows)} {plain(finding.what)} ({plain(', '.join(finding.rows[:3]))})"
        for finding in plan.findings
    ]
    doctor = "".join(f"<li>{note}</li>" for note in notes) or "<li>nothing to report</li>"
    rows = "".join(_row(plan.renderer, example) for example in plan.examples[:PREVIEWED])
    counts = plan.counts
    return (
        f"<h2>What to expect</h2><p>{plain(said['verdict'])} {plain(said['end_verdict'])}</p>"
        f'<p class="small">Scored: {count(said["examples"], "example")} under the base.</p>'
        f"<h2>What the data doctor says</h2><p>{counts['rows']:,} rows, {counts['examples']:,} examples, "
        f"{counts['supervised_tokens']:,} tokens to learn.</p><ul>{doctor}</ul>"
        f'<h2>As the model sees it</h2><p class="small">Each box is a token. <span class="t m0">Prompt tokens'
        '</span> are only read; <span class="t m1">underlined tokens</span> are learned.</p>'
        f'<div class="strips">{rows}</div>'
    )


def _row(renderer: Renderer, example: Example) -> str:
    pieces = renderer.pieces(list(example.ids))
    learned = max(1, example.prompt_length)
    spans = "".join(
        f'<span class="t m{int(i >= learned)}">{plain(piece).replace(chr(10), "⏎") or "·"}</span>'
        + ("\n" if piece.endswith("\n") else "")
        for i, piece in enumerate(pieces)
    )
    note = f"{count(len(pieces), 'token')}, {example.supervised} learned"
    name = plain(example.id)
    return (
        f'<div class="strip"><header>{name}<span class="small">{note}</span></header>'
        f'<div class="text" tabindex="0" role="group" aria-label="tokens of {name}">{spans}</div></div>'
    )


def measured_view(found: Mapping[str, Any]) -> str:
    """For gr.HTML: memory and time of a training of two runs over one base."""
    rows = [[plain(name.replace("_", " ")), f"{size / MIB:,.0f} MB"] for name, size in found["bytes"].items()]
    rows.append(["<b>peak</b>", f"<b>{found['peak'] / MIB:,.0f} MB</b>"])
    if found["seconds_a_step"] is None:
        said = "It runs out of memory here: take fewer rows per micro-batch, or a smaller base."
    else:
        seconds = 2 * found["seconds_a_step"]
        whole = f"{seconds * found['steps'] / 60:.1f} minutes for {count(found['steps'], 'step')}"
        said = f"Both runs together: {seconds:.1f} s per step, about {whole}; looking at tokens and answers "
        said += "comes on top."
    return (
        f"<h2>Measured on this machine</h2><p>{said}</p>"
        f'<p class="small">One run on {plain(found["device"])}, {plain(found["dtype"])}; the second shares '
        f"the base.</p>{html_table(['memory of one run', 'size'], rows, numbers=[1])}"
    )


def moment_view(now: Moment) -> str:
    """For gr.HTML: a training as it is now."""
    label = Legend(["base", *now.runs])
    kind, words = STATES[now.state]
    head = (
        f'<p class="status" role="status"><span class="chip {kind}">{words}</span> training {now.number}, '
        f"step {now.done} of {now.steps}</p>"
        f'<progress max="{now.steps}" value="{now.done}" aria-label="steps"></progress>'
    )
    return f"{head}{_left(now)}{_said(label, now)}{_tokens(label, now)}{_metrics(label, now)}"


def _left(now: Moment) -> str:
    if now.state not in ("paused", "stopped"):
        return ""
    commands = "".join(f"<li><code>{plain(command)}</code></li>" for command in now.commands)
    return (
        f'<p class="small">Both runs are saved. Continue here, or on the command line:</p><ul>{commands}</ul>'
    )


def _metrics(label: Legend, now: Moment) -> str:
    if not any(now.metrics.values()):
        return ""
    return f"<h2>Both runs, step by step</h2>{curves(label, now.metrics, LIVE_CURVES, now.steps)}"


def _tokens(label: Legend, now: Moment) -> str:
    if not now.probabilities:
        return ""
    strips = "".join(
        strip(label(run), run, [Token(text, p, ()) for text, p in zip(now.pieces, ps, strict=True)])
        for run, ps in now.probabilities.items()
    )
    return f'<h2>One training example under both</h2>{SCALE}<div class="strips">{strips}</div>'


def _said(label: Legend, now: Moment) -> str:
    if not now.said:
        return ""
    cards = "".join(
        f'<section class="card"><header>{label(run)}<span class="small">'
        f"{'unchanged' if run == 'base' else f'after step {now.said_at}'}</span></header>"
        f'<div class="said">{plain(said) or "(empty)"}</div></section>'
        for run, said in now.said.items()
    )
    return f'<h2>Their answers to your problem</h2><div class="columns n{len(now.said)}">{cards}</div>'


def unfinished_choices(trainings: Sequence[Training]) -> list[tuple[str, int]]:
    """(label, number) of trainings that may be continued."""
    return [(f"{t.number}: {' and '.join(recipe.name for recipe in t.recipes)}", t.number) for t in trainings]
