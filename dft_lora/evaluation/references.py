"""Token-by-token scores, under each run, of the reference solutions and of an unrelated text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.templates import Example, Renderer
from ..runs.folder import RunFolder
from .protocol import FORGETTING
from .run_set import Asked
from .token_table import TokenTable, tokens_file
from .tokens import score, text_examples

log = logging.getLogger(__name__)

SCORED = 128  # problems of a task that are scored, if all its problems are judged; else all
OTHER_TEXT = Path(__file__).with_name("other_text.txt")


def score_references(
    model: Any,
    renderer: Renderer,
    folders: Mapping[str, RunFolder],
    asked: Mapping[str, Asked],
    base: str,
    room: int,
) -> None:
    """Write every run's token table for the reference solutions of each task and for the unrelated text.

    Solutions that do not fit in `room` tokens, the positions of the model, are left out with a warning.
    """
    texts = {task: _solutions(its, renderer, room) for task, its in asked.items()} | {
        FORGETTING: text_examples(renderer, OTHER_TEXT.read_text(encoding="utf-8").split("\n\n"))
    }
    for name, folder in folders.items():
        adapter = name if folder.has_adapter else None
        for title, examples in texts.items():
            file = tokens_file(folder, title)
            if examples and not _is_current(folder, title, base):
                table = score(model, examples, pad_id=renderer.pad_id, adapter=adapter)
                table.save(file, {"adapter": folder.adapter_digest or "", "base": base})


def _solutions(asked: Asked, renderer: Renderer, room: int) -> list[Example]:
    if asked.task.file is not None:
        renderer = asked.renderer
    solved = [problem for problem in asked.problems if problem.solution is not None]
    most = SCORED if all(map(asked.task.judges, asked.problems)) else None
    examples = renderer.render_all(solved[:most])
    fitting = [example for example in examples if len(example.ids) <= room]
    if over := len(examples) - len(fitting):
        log.warning(
            "%s: %d of %d reference solutions are longer than the model's %d positions; they are not scored",
            asked.task.name,
            over,
            len(examples),
            room,
        )
    return fitting


def references_scored(folder: RunFolder, asked: Mapping[str, Asked], base: str) -> bool:
    """Whether the run has all token tables that `score_references` writes, made with its present weights."""
    wanted = [task for task, its in asked.items() if any(p.solution for p in its.problems)]
    return all(_is_current(folder, title, base) for title in (*wanted, FORGETTING))


def _is_current(folder: RunFolder, title: str, base: str) -> bool:
    file = tokens_file(folder, title)
    weights = {"adapter": folder.adapter_digest or "", "base": base}
    return file.is_file() and TokenTable.weights(file) == weights
