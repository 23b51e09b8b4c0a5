"""Charts as SVG in the page's own colours, without a plotting library.

Colour and line pattern both identify a run. Each chart states its figures for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .text import plain
from .views import Legend

CURVES = (
    ("nll", "NLL, nats per token"),
    ("mean_probability", "mean probability of the target token"),
    ("p_end", "mean probability of the end token"),
    ("entropy", "entropy, nats"),
)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 170, 40, 24, 8
LEAST = 1e-4  # share of tokens at the bottom of the log scale
POINTS = 320  # of a curve, at most


def shares(label: Legend, histograms: Mapping[str, Sequence[int]]) -> str:
    """The share of tokens in each of equal steps of probability, as stairs on a log scale."""
    across, down = _axes((0, 1), (math.log10(LEAST), 0))
    stairs, said = "", []
    for run, counts in histograms.items():
        parts = [n / (sum(counts) or 1) for n in counts]
        edges = [across(i / len(counts)) for i in range(len(counts) + 1)]
        heights = [down(math.log10(max(LEAST, part))) for part in parts]
        stairs += _path(label, run, [(x, y) for i, y in enumerate(heights) for x in edges[i : i + 2]])
        step = 1 / len(counts)
        said.append(f"{run} {parts[0]:.1%} below {step:g} and {parts[-1]:.1%} above {1 - step:g}")
    grid = _grid(
        {10.0**n: f"{10.0 ** (n + 2):g}%" for n in range(round(math.log10(LEAST)), 1)}, down, math.log10
    )
    ends = _along({0: "p = 0", 0.5: "0.5", 1: "p = 1"}, across)
    return _svg(grid + stairs + ends, f"share of tokens by probability: {', '.join(said)}")


def bars(bins: Sequence[int], most: int, colour: str) -> str:
    """Problems by their share of correct samples; `most` is the height of the chart."""
    across, down = _axes((0, 1), (0, most or 1))
    width = (WIDTH - LEFT) / len(bins)
    blocks = "".join(
        f'<rect class="{colour} fill" x="{LEFT + i * width + 2:.1f}" y="{down(n):.1f}" '
        f'width="{width - 4:.1f}" height="{down(0) - down(n):.1f}"><title>{n} problems</title></rect>'
        f"{_text(LEFT + (i + 0.5) * width, max(down(n) - 4, 10), n)}"
        for i, n in enumerate(bins)
    )
    ticks = "".join(
        _text(across(i / len(bins)), HEIGHT - 6, f"{100 * i // len(bins)} %", anchor)
        for i, anchor in enumerate(["middle"] * len(bins) + ["end"])
    )
    said = ", ".join(map(str, bins))
    return _svg(blocks + ticks, f"problems by share of correct samples, from none to all: {said}")


def costs(
    label: Legend,
    points: Mapping[str, tuple[float, float, float, float]],
    base: tuple[str, float] | None = None,
) -> str:
    """Accuracy over seconds of training: run -> (seconds, low, accuracy, high). `base`: name and accuracy."""
    longest = max(seconds for seconds, *_ in points.values())
    shares = [share for _, *interval in points.values() for share in interval]
    shares += [] if base is None else [base[1]]
    low, high = min(shares), max(shares)
    if low == high:
        low, high = low - 0.01, high + 0.01
    across, down = _axes((0, longest), (low, high))
    drawn, named = "", []
    for run, (seconds, least, share, most) in sorted(points.items(), key=lambda point: -point[1][2]):
        x, colour = across(seconds), label.colour(run)
        drawn += (
            f'<line class="{colour} whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{down(least):.1f}" '
            f'y2="{down(most):.1f}"></line><circle class="{colour} fill" cx="{x:.1f}" cy="{down(share):.1f}" '
            f'r="4"><title>{plain(run)}</title></circle>'
        )
        right = seconds > longest / 2
        places = sorted(range(12, HEIGHT - BOTTOM), key=lambda place: abs(place - down(share) - 4))
        taken = [place for side, place in named if side == right]
        y = next((p for p in places if all(abs(p - other) >= 12 for other in taken)), places[0])
        named.append((right, y))
        drawn += _text(x - 8 if right else x + 8, y, plain(run), "end" if right else "start")
    if base is not None:
        (run, share), y = base, down(base[1])
        drawn += f'<line class="{label.colour(run)} line" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}">'
        drawn += f"</line>{_text(LEFT + 6, y - 4, plain(run), 'start')}"
    grid = _grid({y: f"{100 * y:.0f} %" for y in (low, (low + high) / 2, high)}, down)
    ends = _along({s: _seconds(s) for s in (0, longest / 2, longest)}, across)
    said = ", ".join(f"{run} {share:.1%} after {_seconds(s)}" for run, (s, _, share, _) in points.items())
    return _svg(grid + drawn + ends, f"accuracy over seconds of training: {said}")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 or not seconds else f"{seconds:.2g} s"


def curves(
    label: Legend,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: Sequence[tuple[str, str]] = CURVES,
    steps: int | None = None,
) -> str:
    """One figure per metric of KEYS over the training steps, with each run's latest value in its caption."""
    figures = "".join(_curve(label, key, title, metrics, steps) for key, title in keys)
    return f'<div class="charts">{figures}</div>'


def _curve(
    label: Legend,
    key: str,
    title: str,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    steps: int | None,
) -> str:
    points = {
        run: [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        for run, lines in metrics.items()
    }
    points = {run: _thinned(series) for run, series in points.items() if series}
    if not points:
        return figure(plain(title), _svg("", f"{title}: no data yet"))
    values = [y for series in points.values() for _, y in series]
    first = min(series[0][0] for series in points.values())
    last = steps or max(series[-1][0] for series in points.values())
    low, high = min(0.0, *values), max(values) or 1.0
    across, down = _axes((first, last), (low, high))
    paths = "".join(
        _path(label, run, [(across(x), down(y)) for x, y in series]) for run, series in points.items()
    )
    grid = _grid({y: f"{y:.2g}" for y in (low, (low + high) / 2, high)}, down)
    ends = _along({first: f"step {first}", last: str(last)}, across)
    now = {run: f"{series[-1][1]:.3g}" for run, series in points.items()}
    caption = f"{plain(title)}: {', '.join(f'{label(run)} {value}' for run, value in now.items())}"
    said = f"{title}, step {first} to {last}: " + ", ".join(f"{run} ends at {now[run]}" for run in now)
    return figure(caption, _svg(grid + paths + ends, said))


def _thinned(series: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about POINTS of the points, the last one among them."""
    stride = -(-len(series) // POINTS)
    return series[(len(series) - 1) % stride :: stride]


def figure(caption: str, chart: str) -> str:
    """A chart with its caption, and buttons that save both as a file (`page.js`)."""
    buttons = "".join(
        f'<button type="button" data-save="{kind}" aria-label="Save this chart as {kind.upper()}">'
        f"{kind.upper()}</button>"
        for kind in ("svg", "png")
    )
    return f'<figure><figcaption>{caption} <span class="save">{buttons}</span></figcaption>{chart}</figure>'


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Data to pixels."""
    (x0, x1), (y0, y1) = x_range, y_range
    return (
        lambda x: LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - 6),
        lambda y: HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - BOTTOM - TOP - 8),
    )


def _path(label: Legend, run: str, points: Sequence[tuple[float, float]]) -> str:
    placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline class="{label.colour(run)} line" points="{placed}"><title>{plain(run)}</title></polyline>'
    )


def _grid(
    marks: Mapping[float, str], down: Callable[[float], float], scale: Callable[[float], float] = float
) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{down(scale(y)):.1f}" y2="{down(scale(y)):.1f}">'
        f"</line>{_text(LEFT - 5, down(scale(y)) + 4, said, 'end')}"
        for y, said in marks.items()
    )


def _along(marks: Mapping[float, str], across: Callable[[float], float]) -> str:
    """What stands below the axis; the first mark begins at its place, the last one ends there."""
    places = list(marks)
    anchors = ["start", *["middle"] * (len(places) - 2), "end"]
    return "".join(
        _text(across(x), HEIGHT - 6, marks[x], anchor) for x, anchor in zip(places, anchors, strict=False)
    )


def _text(x: float, y: float, said: object, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>'


def _svg(body: str, said: str) -> str:
    axis = (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"></line>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{plain(said)}">{axis}{body}</svg>'
