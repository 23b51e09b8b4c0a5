"""Advice before training: how probable the solutions are under the base, and which objective that favours.

DFT weights each token by its probability. This helps where the base already finds the solutions likely
(mathematics). Where it does not (new facts, other languages), almost no gradient is left. Beyond Log
Likelihood (arXiv 2510.00526, table 5) measured the turning point: DFT wins at a mean target probability of
about 0.8, neither wins at 0.5, and plain NLL wins near 0.1. The thresholds below lie halfway between these
points. Between them, a base that does not begin its answers as the solutions do favours SFT (docs/lab.md).

A mean hides single tokens. DFT hardly learns one that the base finds improbable, and the end token of an
unknown format is one: DFT's answers then never end. So the first token, the end token and the tokens that
most solutions share are reported on their own.

Legend: M supervised tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..config import Recipe
from ..data.doctor import check_examples, check_rows, usable
from ..data.sources import load_problems
from ..data.templates import Example, Renderer
from ..errors import DataError, RecipeError
from ..loss import Objective, objective
from ..loss.objectives import STARVED, Dft, Sft, starves
from ..model.load import load_base, load_tokenizer
from ..runs.provenance import certificate
from ..tasks.base import Problem
from ..training.plan import Plan, objective_of
from .token_table import TokenTable
from .tokens import score

FAVOURS_DFT, FAVOURS_SFT = 0.65, 0.30
UNKNOWN_START = 0.2  # between the two: p(first token) 0.01 and 0.12 where SFT won, 0.38 where DFT did
LOW, HIGH = 0.1, 0.9
COMMON = 0.5  # a token of the format: it occurs in at least this share of the solutions
REMEDIES = (
    "objective.floor=0.1 (a least weight for every token), objective.end=1 (plain NLL on the end token), the "
    "objective {name: power, anneal: 0.3} (from SFT to DFT during the run), or train on the base's own "
    "answers (dft-lora sample)"
)
SHOWN = 8
BINS = 10
FEW = 32  # examples that the data doctor scores
EXAMPLES = 256  # with about 200 tokens each, enough to know the mean probability to about 0.01


def diagnose(recipe: Recipe, examples: int = EXAMPLES) -> dict[str, Any]:
    """Score at most `examples` of the recipe's training examples under its base: metrics and a verdict.

    Only the drawn rows are tokenized. `data` counts what can be seen in the texts of all rows, `drawn` what
    can be seen in the tokens of the drawn rows. Each finding states in which of the two it was made.

    Raises a RequestError before a model is loaded when the recipe or the data cannot be used.
    """
    wanted = objective_of(recipe)
    if wanted.learns_from == "pairs" and recipe.rollouts is None:
        raise RecipeError(f"objective.name: diagnose reads solutions, and {wanted.name!r} learns from pairs")
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    rows = load_problems(recipe.data, recipe.train.seed)
    counts, findings = check_rows(rows, recipe.evaluate.tasks, recipe.data)
    solved = [problem for problem in rows.problems if problem.solution is not None]
    chosen, rendered = _draw(solved, examples, renderer, recipe)
    if not chosen:
        raise DataError(f"data.source {recipe.data.source!r}: no example is left to score")
    drawn_counts, drawn_findings = check_examples(rendered, recipe.data.max_length)
    model, hardware = load_base(recipe.model)
    table = score(model, chosen, pad_id=renderer.pad_id)
    hardest = np.argsort(table.nll_E)[::-1][:5]
    return {
        **metrics(table),
        **ends(table, wanted),
        "unexpected_tokens": unexpected_tokens(table, renderer),
        "examples": len(chosen),
        "least_likely_examples": [{"id": chosen[i].id, "nll": float(table.nll_E[i])} for i in hardest],
        "data": counts,
        "drawn": {"rows": len(rendered), **drawn_counts},
        "findings": [
            asdict(finding) | {"rows": finding.rows[:100], "count": len(finding.rows), "among": among}
            for among, made in (("all rows", findings), ("drawn rows", drawn_findings))
            for finding in made
        ],
        "provenance": certificate(device=hardware.name, seed=recipe.train.seed),
    }


def metrics(table: TokenTable) -> dict[str, Any]:
    """The metrics of scored tokens and the verdict that follows from them."""
    p_M = table.p_M
    mean = float(p_M.mean())
    dft_pull_M = p_M * table.pull_M
    favoured, verdict = advice(mean, float(table.first_E.mean()))
    return {
        "mean_probability": mean,
        "median_probability": float(np.median(p_M)),
        "nll": float(-table.logp_M.mean()),
        "histogram": np.histogram(p_M, BINS, (0, 1))[0].tolist(),
        "share_below_0.1": float((p_M < LOW).mean()),
        "share_above_0.9": float((p_M > HIGH).mean()),
        "tokens": len(p_M),
        "effective_tokens": {"sft": effective(table.pull_M), "dft": effective(dft_pull_M)},
        "gradient_kept": float(dft_pull_M.sum() / table.pull_M.sum()),
        "favours": favoured,
        "verdict": verdict,
    }


def learns_to_end(wanted: Objective, p_E: torch.Tensor) -> bool | None:
    """Whether end tokens of these probabilities have weight; None where it depends on more than these."""
    if isinstance(wanted, Dft) and wanted.end:
        return max(wanted.end, wanted.floor) >= STARVED or not starves(objective("dft"), p_E)
    if isinstance(wanted, Sft):
        return True
    return None if wanted.token_weight is None else not starves(wanted, p_E)


def ends(table: TokenTable, wanted: Objective) -> dict[str, Any]:
    """How probable ends and beginnings are, and whether plain DFT and the recipe's objective learn to end."""
    p_E = torch.from_numpy(table.end_E)
    found: dict[str, Any] = {"p_end": float(table.end_E.mean()), "p_first": float(table.first_E.mean())}
    lead = f"The base expects the end token with a probability of {found['p_end']:.3f} on average"
    plain, ours = not starves(objective("dft"), p_E), learns_to_end(wanted.at(0.0), p_E)
    name = "DFT" if wanted.name == "dft" else wanted.name
    stop = f"{name} will not learn to stop here. Remedies: {REMEDIES}."
    said = {
        (True, True): ": enough for DFT to learn it after the given solutions.",
        (True, False): f": enough for plain DFT to learn it after the given solutions, but {stop}",
        (False, True): ", too improbable for plain DFT to learn it. This recipe's objective does learn it.",
        (False, False): f", too improbable for plain DFT to learn it. {stop}",
        (True, None): f": enough for plain DFT to learn it; whether {name} will is not known.",
        (False, None): f", too improbable for plain DFT to learn it; whether {name} will is not known before "
        "the run, which logs p_end.",
    }
    return found | {
        "dft_learns_to_end": plain,
        "learns_to_end": ours,
        "end_verdict": lead + said[plain, ours],
    }


def base_expectations(plan: Plan) -> dict[str, str]:
    """How the recipe's base sees FEW of its examples: its end, its first token, improbable tokens."""
    examples = random.Random(plan.recipe.train.seed).sample(plan.examples, min(FEW, len(plan.examples)))
    table = score(load_base(plan.recipe.model)[0], examples, pad_id=plan.renderer.pad_id)
    found = ends(table, plan.objective)
    lines = _unexpected_text(unexpected_tokens(table, plan.renderer))
    return {
        "p(first token) under the base": f"{found['p_first']:.3f} ({len(examples)} examples)",
        "p(end token) under the base": f"{found['p_end']:.3f}",
        "end of answers": found["end_verdict"],
        "unexpected tokens": lines[0] if lines else "none",
    }


def unexpected_tokens(table: TokenTable, renderer: Renderer) -> list[dict[str, Any]]:
    """Tokens of most solutions that the base finds improbable, the least probable first."""
    ids, of_M, count = np.unique(table.ids_M, return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([of_M, table.example_M]), axis=1)
    share = np.bincount(pairs[0], minlength=len(ids)) / len(table.nll_E)
    p = np.bincount(of_M, table.p_M) / count
    found = [i for i in np.argsort(p) if share[i] >= COMMON and p[i] < LOW]
    return [
        {
            "token": renderer.tokenizer.decode([int(ids[i])]),
            "solutions": float(share[i]),
            "probability": float(p[i]),
        }
        for i in found
    ]


def effective(weight_M: np.ndarray) -> float:
    """The effective sample size of these weights: (sum w)^2 / sum w^2 (Kish 1965)."""
    return float(weight_M.sum() ** 2 / np.square(weight_M).sum())


def advice(mean_probability: float, p_first: float) -> tuple[str, str]:
    """The objective that is favoured (dft, sft or either), and why, in one sentence.

    `mean_probability` is that of all target tokens, `p_first` that of the solutions' first tokens.
    """
    lead = f"The base gives your target tokens a probability of {mean_probability:.2f} on average"
    if mean_probability >= FAVOURS_DFT:
        return "dft", f"{lead}: it already writes most of these solutions, which favours DFT."
    if mean_probability <= FAVOURS_SFT:
        return "sft", f"{lead}: much of this is new to it, and DFT would learn little of it; use SFT."
    if p_first < UNKNOWN_START:
        start = f"and the first token of a solution {p_first:.2f}"
        return "sft", f"{lead}, {start}: it begins its own answers differently, which favours SFT."
    return "either", f"{lead}: neither objective is expected to win; train both and compare."


def diagnosis_text(diagnosis: Mapping[str, Any]) -> str:
    """The diagnosis for a terminal: the verdict first, then the metrics behind it."""
    tokens = diagnosis["tokens"]
    widest = max(diagnosis["histogram"]) or 1
    bars = [
        f"  {i / BINS:.1f}-{(i + 1) / BINS:.1f}  {'#' * round(40 * n / widest):40}  {n / tokens:6.1%}"
        for i, n in enumerate(diagnosis["histogram"])
    ]
    even = diagnosis["effective_tokens"]
    rest = ", ".join(f"{row['id']} ({row['nll']:.2f})" for row in diagnosis["least_likely_examples"])
    lines = [
        diagnosis["verdict"],
        diagnosis["end_verdict"],
        "",
        f"{tokens} target tokens in {diagnosis['examples']} examples; probability under the base:",
        *bars,
        f"below 0.1: {diagnosis['share_below_0.1']:.1%}; above 0.9: {diagnosis['share_above_0.9']:.1%}; "
        f"plain NLL {diagnosis['nll']:.3f} nats per token",
        f"effective tokens, of {tokens}: {even['sft']:.0f} under SFT, {even['dft']:.0f} under DFT, "
        f"which keeps {diagnosis['gradient_kept']:.0%} of the gradient",
        f"first token: p {diagnosis['p_first']:.3f} on average; end token: p {diagnosis['p_end']:.3f}",
        *_unexpected_text(diagnosis["unexpected_tokens"]),
        f"least likely examples (NLL): {rest}",
        "all rows: " + _counts(diagnosis["data"]),
        "drawn rows: " + _counts(diagnosis["drawn"]),
        *(f"  {found['what']}: {found['count']} of {found['among']}" for found in diagnosis["findings"]),
    ]
    return "\n".join(lines)


def _unexpected_text(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line on the tokens that most solutions share and the base finds improbable, if there are any."""
    if not found:
        return []
    shown = [f"{json.dumps(f['token'], ensure_ascii=False)} {f['probability']:.3f}" for f in found[:SHOWN]]
    rest = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"in most solutions, but p < {LOW} under the base: {', '.join(shown)}{rest}"]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())


def _draw(
    problems: Sequence[Problem], wanted: int, renderer: Renderer, recipe: Recipe
) -> tuple[list[Example], list[Example]]:
    """At most `wanted` usable examples, drawn at random, and all examples that were rendered to find them.

    Rows are drawn before they are rendered. A row that cannot be used is replaced by another.
    """
    rng, left = random.Random(recipe.train.seed), list(problems)
    rendered: list[Example] = []
    chosen: list[Example] = []
    while left and len(chosen) < wanted:
        missing = wanted - len(chosen)
        drawn = left if len(left) <= missing else rng.sample(left, missing)
        taken = {problem.id for problem in drawn}
        left = [problem for problem in left if problem.id not in taken]
        batch = renderer.render_all(drawn)
        rendered += batch
        chosen += usable(batch, recipe.data.max_length)
    return chosen, rendered
