"""Rejection sampling: a model's own answers that were judged correct, as a fine-tuning set.

RFT (arXiv 2308.01825) and RAFT train on such data, and so does the experiment in which DFT is strongest
(arXiv 2508.05629, about 140k verified samples): what a model samples is probable under it, so DFT's weights
are high. Pairs of a correct and a wrong answer to one question are the data of DPO.

The file is read back exactly as it was written: a row with its answer in a separate column is used unchanged
(`data/sources.py`), whatever the base ends its answers with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..config import Recipe, RolloutConfig, digest
from ..data.sources import ANSWER, CHOSEN, REJECTED, judgeable, load_problems, readable
from ..data.templates import Renderer
from ..errors import DataError, RequestError, RunError
from ..model.fingerprint import base_fingerprint
from ..model.head import check_head
from ..model.limits import refuse_long_answers
from ..model.load import load_adapters, load_base, load_model_config, load_tokenizer
from ..runs.folder import RunFolder, read_json, write_json, write_text
from ..runs.provenance import certificate
from ..tasks import judge_of
from ..tasks.base import Problem
from ..training.rollouts import correct_ones, pairs_of, refuse_all_truncated, sample_answers

log = logging.getLogger(__name__)


def own_samples(
    recipe: Recipe,
    out: Path,
    *,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    run: RunFolder | None = None,
    pairs: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write correct answers to the training problems of a recipe to `out`, a .jsonl file.

    The base answers, or `run`: the base with that run's adapter. The columns are problem, solution and
    answer. `recipe.rollouts` says how many answers each problem gets, unless `samples` does; duplicate texts
    are kept once. A problem with several turns is written as a list of turns. `pairs` gets rows of problem,
    chosen, rejected and answer. OUT.made.json records how they were made; files made in the same way are
    reused.

    Raises RequestError when `run` has another base or a file exists that was made in another way, unless
    `overwrite` is set, DataError when no row has a reference answer and a prompt of at most `data.max_length`
    tokens, or when the model has too few positions, RunError when none of the answers was correct, when all
    were cut, or when `pairs` would be empty.
    """
    if run is not None and not run.has_adapter:
        raise RequestError(f"--run: {run.path} has no adapter; without --run the base answers")
    if run is not None and run.base_fingerprint not in (None, base_fingerprint(recipe.model)):
        raise RequestError(f"--run: {run.path} was trained on another base than {recipe.model.name!r}")
    judge = judge_of(recipe.data.source).allowed(recipe.evaluate.allow_code)
    problems = judgeable(load_problems(recipe.data, recipe.train.seed, "prompts"), recipe.data)
    config = recipe.rollouts or RolloutConfig()
    given = {"samples": samples, "max_new_tokens": max_new_tokens}
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    problems, longest = _fitting(problems, renderer, recipe.data.max_length)
    how: dict[str, Any] = {
        "model": recipe.model.model_dump(mode="json"),
        "base": base_fingerprint(recipe.model),
        "template": renderer.fingerprint,
        "problems": digest([[p.id, _asked(p), p.answer] for p in problems]),
        "rollouts": config.model_dump(mode="json", exclude={"rounds", "updates"}),
        "seed": recipe.train.seed,
        "adapter": None if run is None else run.adapter_digest,
        "pairs": pairs and pairs.name,
    }
    record = record_of(out)
    written = [out, *([] if pairs is None else [pairs])]
    there = [file for file in (*written, record) if file.exists()]
    if len(there) == len(written) + 1 and _made(record) == {"how": how, "sha256": _sha256(written)}:
        return out
    if there and not overwrite:
        raise RequestError(
            f"{there[0]} exists, and these files were not all made with these settings; add --overwrite, or "
            "name others"
        )
    name = recipe.model.name
    refuse_long_answers(longest, config.max_new_tokens, load_model_config(recipe.model), name)
    model, _ = load_base(recipe.model, for_answers=True)
    check_head(model)
    adapter = None if run is None else "run"
    if run is not None:
        model = load_adapters(model, {"run": run.adapter})
    answers = sample_answers(
        model, renderer, judge, problems, config, seed=recipe.train.seed, adapter=adapter, title="answers"
    )
    refuse_all_truncated(answers, config, recipe.model.name)
    asked = sum(map(len, answers))
    kept = _lines(
        {"problem": _asked(answer.problem), "solution": answer.text, ANSWER: answer.problem.answer}
        for some in answers
        for answer in correct_ones(some)
    )
    if not kept:
        raise RunError(f"{recipe.model.name}: none of {asked} answers was correct; nothing to train on")
    paired = _lines(
        {"problem": _asked(a.problem), CHOSEN: a.text, REJECTED: b.text, ANSWER: a.problem.answer}
        for some in answers
        for a, b in pairs_of(some)
    )
    if pairs is not None and not paired:
        raise RunError(f"{recipe.model.name}: no problem has both a correct and a wrong answer")
    for file, lines in zip(written, (kept, paired), strict=False):
        write_text(file, "".join(f"{line}\n" for line in lines))
    counts = {
        "answers": asked,
        "correct": sum(answer.verdict.correct for some in answers for answer in some),
        "truncated": sum(answer.truncated for some in answers for answer in some),
        "kept": len(kept),
        "pairs": len(paired),
    }
    made = {"how": how, "sha256": _sha256(written), "counts": counts, "provenance": certificate()}
    write_json(record, made)
    return out


def _fitting(problems: list[Problem], renderer: Renderer, limit: int) -> tuple[list[Problem], int]:
    """The problems whose prompts have at most `limit` tokens, and the tokens of the longest of these."""
    lengths = {problem.id: len(renderer.prompt_ids(problem.messages)) for problem in problems}
    fitting = [problem for problem in problems if lengths[problem.id] <= limit]
    if not fitting:
        raise DataError(f"data.max_length {limit}: all prompts are longer; set a larger one")
    if over := len(problems) - len(fitting):
        log.warning(
            "%d of %d prompts are longer than data.max_length %d: left out", over, len(lengths), limit
        )
    return fitting, max(lengths[problem.id] for problem in fitting)


def _sha256(files: Iterable[Path]) -> list[str]:
    return [sha256(file.read_bytes()).hexdigest() for file in files]


def record_of(out: Path) -> Path:
    """The file beside `out` that records how it was made."""
    return out.with_suffix(".made.json")


def _made(record: Path) -> Any:
    """How the files beside a record were made, and their hashes; None without a record."""
    with suppress(DataError):
        known = read_json(record)
        return {key: known.get(key) for key in ("how", "sha256")} if isinstance(known, dict) else None
    return None


def _lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows as JSON, each once, without those that could not be read back."""
    return list(
        dict.fromkeys(
            json.dumps(row, ensure_ascii=False)
            for row in rows
            if all(readable(text) for text in row.values() if isinstance(text, str))
        )
    )


def _asked(problem: Problem) -> str | list[dict[str, str]]:
    """The problem as written to a row: the question, or the list of all turns if there are several."""
    turns = [dict(turn) for turn in problem.messages]
    return problem.question if len(turns) == 1 else turns
