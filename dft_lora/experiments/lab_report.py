"""What the lab found, from its lab.json: tables with Holm-corrected differences, ranks, and the advice.

Everything here is a function of the recorded result; nothing is run again.

Legend: Q labels (objectives) of a regime, W regimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ..evaluation import diagnosis
from ..evaluation import statistics as st
from .advice import MEASURED
from .lab import CANDIDATES, CORE, MODES, REGIMES

LEVEL = 0.05
RESAMPLES = 10_000


def lines_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Regime -> label -> what was found of it, in the order of REGIMES; only what is recorded."""
    bases = result["bases"]
    return {
        regime: {
            name.removeprefix("test/"): part["found"]
            for name, part in sorted(bases[regime].items(), key=lambda item: _order(regime, item[0]))
            if name.startswith("test/")
        }
        for regime in REGIMES
        if regime in bases
    }


def complete(result: Mapping[str, Any], labels: Collection[str] = CORE) -> dict[str, dict[str, Any]]:
    """`lines_of` the regimes in which each of `labels` was tested: those that are ranked."""
    return {regime: some for regime, some in lines_of(result).items() if set(some) >= {*labels}}


def _order(regime: str, part: str) -> int:
    labels, label = REGIMES[regime].labels, part.partition("/")[2]
    return labels.index(label) if label in labels else -1


def corrected(lines: Mapping[str, Any], rival: str, mode: str) -> dict[str, float]:
    """Label -> p against the rival, corrected over all labels of the regime by Holm's method."""
    against = {
        label: line["against"][rival][mode] for label, line in lines.items() if rival in line["against"]
    }
    if not against:
        return {}
    adjusted = st.holm([part["p_value"] for part in against.values()])
    return dict(zip(against, map(float, adjusted), strict=True))


def regime_table(lines: Mapping[str, Any]) -> str:
    """One regime as Markdown. Differences in points; in bold where the corrected p is below LEVEL."""
    head = ["objective", "rate", *MODES, "ended", "minus SFT, T = 1", "minus DFT, T = 1", "at equal entropy"]
    head += ["other text, NLL", "s a step"]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    adjusted = {rival: corrected(lines, rival, "sampled") for rival in ("sft", "dft")}
    for label, line in lines.items():
        accuracy = list(line["accuracy"].items())
        means = [
            np.mean([share for name, share in accuracy if name.endswith(" greedy") == is_greedy])
            for is_greedy in (False, True)
        ]
        cells = [line["kind"], f"{line['learning_rate']:g}"]
        cells += [f"{100 * share:.1f}" for share in (*means, line["pass@4"])]
        cells += [f"{100 * np.mean(list(line['ended'].values())):.0f} %"]
        for rival in ("sft", "dft"):
            part = line["against"].get(rival)
            clear = adjusted[rival].get(label, 1.0) < LEVEL
            cells += [_points(part["sampled"], clear) if part else ""]
        cells += [_points(line["at_equal_entropy"]) if "at_equal_entropy" in line else ""]
        cells += [f"{line['other_text_nll']:.2f}", f"{line['seconds_per_step']:.2f}"]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _points(part: Mapping[str, Any], clear: bool = False) -> str:
    low, high = (100 * bound for bound in part["ci95"])
    said = f"{100 * part['difference']:+.1f}"
    return f"{f'**{said}**' if clear else said} ({low:+.1f} to {high:+.1f})"


def ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Regime -> label -> score (higher is better) becomes label -> ranks over the regimes, best first.

    Only labels that every regime has are ranked, 1 the best, ties shared. The interval of the mean rank is a
    bootstrap over regimes. `worst_gap` is the largest distance from a regime's best score.
    """
    regimes = list(scores)
    labels = [label for label in scores[regimes[0]] if all(label in scores[r] for r in regimes)]
    score_WQ = np.array([[scores[regime][label] for label in labels] for regime in regimes])
    rank_WQ = rankdata(-score_WQ, axis=1)
    gap_WQ = score_WQ.max(1, keepdims=True) - score_WQ
    drawn = np.random.default_rng(0).integers(len(regimes), size=(RESAMPLES, len(regimes)))
    low_Q, high_Q = np.percentile(rank_WQ[drawn].mean(1), (2.5, 97.5), axis=0)
    found: dict[str, Any] = {
        label: {
            "mean_rank": float(rank_WQ[:, q].mean()),
            "ci95": [float(low_Q[q]), float(high_Q[q])],
            "worst_gap": float(gap_WQ[:, q].max()),
            "worst_in": regimes[int(gap_WQ[:, q].argmax())],
        }
        for q, label in enumerate(labels)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["mean_rank"]))


def recommended(ranked: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The labels that docs/lab-protocol.md recommends: by mean rank and by distance from the best ahead of
    both SFT and DFT.
    """
    rivals = [ranked[label] for label in ("sft", "dft") if label in ranked]
    return [
        label
        for label, row in ranked.items()
        if rivals and all(row[key] < rival[key] for rival in rivals for key in ("mean_rank", "worst_gap"))
    ]


def scores_of(lines: Mapping[str, Mapping[str, Any]], what: str = "sampled") -> dict[str, dict[str, float]]:
    """Regime -> label -> sampled or greedy accuracy, pass@4, or what was kept of other text (minus NLL)."""

    def score(line: Mapping[str, Any]) -> float:
        if what == "kept":
            return -line["other_text_nll"]
        if what == "pass@4":
            return line["pass@4"]
        wanted = [s for n, s in line["accuracy"].items() if n.endswith(" greedy") == (what == "greedy")]
        return float(np.mean(wanted))

    return {regime: {label: score(line) for label, line in some.items()} for regime, some in lines.items()}


def winner(lines: Mapping[str, Any]) -> str:
    """`dft` or `sft` where plain DFT's interval against SFT excludes zero at T = 1; else `either`."""
    low, high = lines["dft"]["against"]["sft"]["sampled"]["ci95"]
    return "dft" if low > 0 else "sft" if high < 0 else "either"


def stump(values: Sequence[float], winners: Sequence[str]) -> tuple[float, str, str]:
    """(threshold, winner below, winner above) that is right most often; of equals the first threshold.

    Thresholds lie half way between neighbouring values. There is nothing else to fit.
    """
    points = sorted(set(values))
    cuts = [(a + b) / 2 for a, b in pairwise(points)] or [points[0]]
    names = sorted(set(winners))
    rules = [(cut, below, above) for cut in cuts for below in names for above in names]

    def right(rule: tuple[float, str, str]) -> int:
        return sum(_said(rule, v) == w for v, w in zip(values, winners, strict=True))

    return max(rules, key=right)


def _said(rule: tuple[float, str, str], value: float) -> str:
    cut, below, above = rule
    return below if value < cut else above


def left_out(values: Sequence[float], winners: Sequence[str]) -> float:
    """Leave-one-regime-out accuracy of `stump` on one quantity."""
    hits = []
    for i, (value, won) in enumerate(zip(values, winners, strict=True)):
        others = [j for j in range(len(values)) if j != i]
        rule = stump([values[j] for j in others], [winners[j] for j in others])
        hits.append(_said(rule, value) == won)
    return float(np.mean(hits))


def _share_right(said: Sequence[str], winners: Sequence[str]) -> float | None:
    return float(np.mean([a == b for a, b in zip(said, winners, strict=True)])) if winners else None


def _revised_left_out(p_mean: Sequence[float], p_first: Sequence[float], winners: Sequence[str]) -> list[str]:
    """What the present rule says of each regime if its threshold on p(first token) came from the others.

    As in the rule, p(first token) speaks only where the mean probability names neither, and only for SFT.
    """
    said = []
    for i, mean in enumerate(p_mean):
        others = [j for j in range(len(p_mean)) if j != i]
        found = stump([p_first[j] for j in others], [winners[j] for j in others])
        starts_differently = _said(found, p_first[i]) == "sft"
        said.append(diagnosis.advice(mean, 0.0 if starts_differently else 1.0)[0])
    return said


def advice(result: Mapping[str, Any]) -> dict[str, Any]:
    """How well what `diagnose` measured predicts the winner of SFT and DFT; see docs/lab.md.

    `then`: accuracy of the advice as it was given before the runs. `now`: of the present rule on the same
    measurements. `left_out`: of the present rule with its threshold on p(first token) read off the other
    regimes. `majority`: of always naming the most frequent winner. `by_quantity`: leave-one-regime-out
    accuracy of one threshold on each measured quantity.
    """
    lines = {r: some for r, some in lines_of(result).items() if {"sft", "dft"} <= set(some)}
    said = {regime: result["bases"][regime]["diagnosis"]["found"] for regime in lines}
    winners = [winner(some) for some in lines.values()]
    p_mean, p_first = ([said[r][key] for r in lines] for key in ("mean_probability", "p_first"))
    rule = [diagnosis.advice(p, first)[0] for p, first in zip(p_mean, p_first, strict=True)]
    most = max((winners.count(name) for name in set(winners)), default=0)
    enough = len(lines) > 2
    return {
        "regimes": {
            regime: {
                "advised": said[regime]["favours"],
                "now": now,
                "winner": won,
                **{key: said[regime][key] for key in ("mean_probability", "p_first")},
            }
            for regime, won, now in zip(lines, winners, rule, strict=True)
        },
        "then": _share_right([said[regime]["favours"] for regime in lines], winners),
        "now": _share_right(rule, winners),
        "left_out": _share_right(_revised_left_out(p_mean, p_first, winners), winners) if enough else None,
        "majority": most / len(lines) if lines else None,
        "by_quantity": {
            key: left_out([said[regime][key] for regime in lines], winners) for key in MEASURED if enough
        },
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report for docs/lab.md."""
    lines = {regime: some for regime, some in lines_of(result).items() if some}
    blocks = [_made(result, lines)] if lines else []
    blocks += [
        f"### {regime}: {REGIMES[regime].why}\n\n{regime_table(some)}" for regime, some in lines.items()
    ]
    if full := complete(result):
        blocks.append("### Ranks over the regimes that are complete\n\n" + rank_table(full))
    if every := complete(result, CANDIDATES):
        title = f"### Ranks of all {len(CANDIDATES)} objectives over the regimes that tested them"
        blocks.append(f"{title}\n\n{rank_table(every)}")
    found = advice(result)
    if found["regimes"]:
        blocks.append("### Was the advice right?\n\n" + advice_text(found))
    return "\n\n".join(blocks)


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows: the ranks, and each objective's accuracy and difference to SFT in each regime.

    A difference is clear if its p, corrected by Holm's method, is below LEVEL.
    """
    lines = {regime: some for regime, some in lines_of(result).items() if some}
    objectives: dict[str, dict[str, Any]] = {}
    for mode in ("sampled", "greedy"):
        for regime, shares in scores_of(lines, mode).items():
            adjusted = corrected(lines[regime], "sft", mode)
            for label, share in shares.items():
                cell: dict[str, Any] = {"accuracy": share}
                if label in adjusted:
                    difference = lines[regime][label]["against"]["sft"][mode]["difference"]
                    cell |= {"minus_sft": difference, "clear": adjusted[label] < LEVEL}
                objectives.setdefault(label, {}).setdefault(regime, {})[mode] = cell
    full = complete(result)
    ranked = ranks(scores_of(full)) if full else {}
    judged = advice(result)["regimes"].values()
    return {
        "regimes": {regime: REGIMES[regime].why for regime in lines},
        "real": [regime for regime in lines if not REGIMES[regime].recipe.startswith("tiny_")],
        "objectives": {label: objectives[label] for label in CANDIDATES if label in objectives},
        "ranks": ranked,
        "recommended": recommended(ranked),
        "advice": {"right": sum(row["now"] == row["winner"] for row in judged), "of": len(judged)},
        "made": _days(part for parts in result["bases"].values() for part in parts.values()),
    }


def _days(parts: Iterable[Mapping[str, Any]]) -> list[str]:
    """The first and the last day on which one of these was made; [] where none says."""
    days = sorted(part["date"][:10] for part in parts if "date" in part)
    return [days[0], days[-1]] if days else []


def _made(result: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> str:
    """What was run, when, and what is missing."""
    parts = [part for regime in lines for part in result["bases"][regime].values()]
    short = [f"{r} ({len(some)} of {len(REGIMES[r].labels)} objectives)" for r, some in lines.items()]
    missing = [regime for regime in REGIMES if regime not in lines]
    said = f"Recorded: {', '.join(short)}. "
    said += f"Not run: {', '.join(missing)}. " if missing else ""
    if days := _days(parts):
        commits = ", ".join(sorted({part["commit"] for part in parts if "commit" in part}))
        said += f"Made from {days[0]} to {days[-1]}, commit {commits}. "
    return (
        f"{said}Percent correct, means over seeds; differences in points with paired 95 % intervals, in bold "
        f"where the p corrected by Holm's method is below {LEVEL}."
    )


def rank_table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean rank with its interval at T = 1, and the ranks by the other measures."""
    by = {what: ranks(scores_of(lines, what)) for what in (*MODES, "kept")}
    head = ["objective", "mean rank, T = 1", "95 % interval", "furthest from the best, points", "in"]
    head += ["greedy", "pass@4", "other text kept"]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, row in by["sampled"].items():
        low, high = row["ci95"]
        cells = [label, f"{row['mean_rank']:.1f}", f"{low:.1f} to {high:.1f}"]
        cells += [f"{100 * row['worst_gap']:.1f}", row["worst_in"]]
        cells += [f"{by[what][label]['mean_rank']:.1f}" for what in list(by)[1:]]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([*table, "", f"{len(lines)} regimes: {', '.join(lines)}."])


def advice_text(found: Mapping[str, Any]) -> str:
    """The advice analysis in a table and a sentence."""
    table = ["| regime | mean p | p(first token) | advised then | present rule | won at T = 1 |"]
    table += ["|---|---:|---:|---|---|---|"]
    for regime, row in found["regimes"].items():
        p = f"{row['mean_probability']:.2f} | {row['p_first']:.3f}"
        table.append(f"| {regime} | {p} | {row['advised']} | {row['now']} | {row['winner']} |")
    quantities = ", ".join(f"{key} {share:.2f}" for key, share in found["by_quantity"].items())
    said = f"The advice given before the runs was right in {found['then']:.2f} of the regimes, the present "
    said += f"rule in {found['now']:.2f}; always naming the most frequent winner in {found['majority']:.2f}."
    if quantities:
        said += " With its threshold read off the other regimes the present rule is right in "
        said += f"{found['left_out']:.2f}."
        said += (
            f" One threshold on a measured quantity, leaving out the regime that it predicts: {quantities}."
        )
    return "\n".join([*table, "", said])
