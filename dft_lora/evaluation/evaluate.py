"""Evaluate runs: sample answers, judge them, and write them to `evaluation/` in each run folder.

Runs of one base are sampled in the same batches, each with its own adapter. Every sample has its own random
stream, determined by (seed, prompt, sample), so all runs draw from the same streams and a killed evaluation
continues where it stopped. Under `accelerate launch` each process takes every n-th problem; the answers do
not depend on the number of processes.

    protocol.py      what must be equal for answers to be comparable
    run_set.py       which runs can be evaluated together
    attempts.py      the answers on disk
    engines.py       what generates them
    choices.py       answers to multiple choice, chosen by log-likelihood instead
    references.py    token-by-token scores of the reference solutions
"""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..config import EvaluateConfig, Recipe
from ..data.templates import Renderer
from ..errors import Interrupted, RequestError
from ..model.generate import Completion, Request
from ..model.limits import UNLIMITED, positions
from ..model.load import load_model_config
from ..runs.folder import RunFolder, open_runs
from ..runs.provenance import certificate
from ..tasks.base import Attempt, Problem
from .attempts import Answers
from .choices import choice_texts, choose
from .engines import ENGINES, Engine
from .protocol import GREEDY, Protocol
from .references import references_scored, score_references
from .run_set import (
    Asked,
    asked_problems,
    asked_tasks,
    recipes_of,
    renderer_of,
    same_base,
    same_settings,
    unchanged_base,
    unique_names,
)
from .shard import Shard

CHUNK = 256  # answers that are judged together


def evaluate(
    run_dirs: Sequence[str | Path],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    changes: Sequence[str] = (),
    overwrite: bool = False,
) -> list[RunFolder]:
    """Evaluate every run on `tasks`; the base that they share is loaded once. Returns the run folders.

    RUN_DIR/checkpoints/step-N evaluates that checkpoint. `tasks` default to the recipe's own; `limit` takes
    only the first problems of each. `changes` (`evaluate.field=value` or `field=value`) apply to all runs.
    An interrupted evaluation is completed. Existing answers with another protocol or by other weights are an
    error unless `overwrite` is set.

    Raises RequestError before a model is loaded when runs, tasks, settings or templates do not fit together,
    or when a run has not finished. Raises Interrupted after Ctrl-C; answers given so far are kept.
    """
    folders = open_runs(run_dirs)
    if not folders:
        raise RequestError("name at least one run folder")
    with ExitStack() as held:
        for folder in {folder.path.resolve(): folder for folder in folders}.values():
            held.enter_context(folder.held())
        _evaluate(folders, tasks, limit, changes, overwrite)
    return folders


def _evaluate(
    folders: Sequence[RunFolder],
    tasks: Sequence[str],
    limit: int | None,
    changes: Sequence[str],
    overwrite: bool,
) -> None:
    recipes = recipes_of(folders, changes)
    settings, names = recipes[0].evaluate, unique_names(folders)
    same_base(folders, recipes)
    same_settings(folders, recipes, free={"tasks"} if tasks else ())
    renderer = renderer_of(folders, recipes)
    asked = asked_problems(asked_tasks(recipes, tasks), recipes[0], renderer, limit)
    base = unchanged_base(folders, recipes[0].model)
    shard = Shard.of_this_process()
    work = {}
    for title, its in asked.items():
        for name, folder in zip(names, folders, strict=True):
            protocol = Protocol.of(
                its.task, its.problems, settings, its.renderer, folder.adapter_digest, base
            )
            work[title, name] = Answers(folder, protocol, its.task, its.problems, overwrite, shard)
    complete = all(answers.complete for answers in work.values())
    if ENGINES[settings.engine].scores_tokens:
        complete &= all(references_scored(folder, asked, base) for folder in folders)
    shard.wait()  # no process writes before all have read
    if not complete:
        try:
            _complete(dict(zip(names, folders, strict=True)), recipes[0], renderer, asked, work, base)
        except KeyboardInterrupt:
            if any(answers.overwrite for answers in work.values()):
                raise  # interrupted while the model was loading: nothing has been replaced yet
            raise Interrupted(_kept(work.values()), signal.SIGINT) from None
    shard.wait()  # until all processes have answered
    for answers in work.values() if shard.is_main else ():
        answers.gather()
    shard.wait()


def _complete(
    folders: Mapping[str, RunFolder],
    recipe: Recipe,
    renderer: Renderer,
    asked: Mapping[str, Asked],
    work: Mapping[tuple[str, str], Answers],
    base: str,
) -> None:
    """Load the model, give the missing answers, and score the reference solutions token by token."""
    shard = next(iter(work.values())).shard
    room = positions(load_model_config(recipe.model)) or UNLIMITED
    prompts, texts = {}, {}
    for title, its in asked.items():
        if its.task.by_likelihood:
            texts[title] = choice_texts(its, room)
        else:
            prompts[title] = _prompts(its, room)
    adapters = {name: folder.adapter for name, folder in folders.items() if folder.has_adapter}
    engine = ENGINES[recipe.evaluate.engine](recipe, adapters, renderer)
    for answers in work.values():
        answers.begin(certificate(**engine.provenance))
    shard.wait()  # no process adds answers before the old ones are deleted
    for title, its in asked.items():
        mine = {name: answers for (t, name), answers in work.items() if t == title}
        if its.task.by_likelihood:
            choose(engine.model, its, mine, texts[title])
        else:
            _answer(engine, its, mine, recipe.evaluate, prompts[title], room)
    if shard.is_main and engine.scores_tokens:
        score_references(engine.model, renderer, folders, asked, base, room)
    for answers in work.values() if shard.is_main else ():
        answers.add(())  # a file, even if nothing was sampled


def _kept(work: Collection[Answers]) -> str:
    """The message of an interrupted evaluation: how many answers are kept."""
    kept, asked = sum(len(a.on_disk()) for a in work), sum(a.asked for a in work)
    return f"evaluation stopped: {kept} of {asked} answers are kept"


def before(text: str, stop: Collection[str]) -> str:
    """A text up to the first of the stop texts in it."""
    return text[: min((place for stop_ in stop if (place := text.find(stop_)) >= 0), default=len(text))]


def _prompts(asked: Asked, room: int) -> dict[str, tuple[int, ...]]:
    """Problem -> its prompt's ids. Raises RequestError for a prompt that fills all `room` positions."""
    judged = [problem for problem in asked.problems if asked.task.judges(problem)]
    prompts = {problem.id: tuple(asked.renderer.prompt_ids(problem.messages)) for problem in judged}
    for name, prompt in prompts.items():
        if len(prompt) >= room:
            where = f"{asked.task.name}, {name}"
            raise RequestError(
                f"{where}: its prompt has {len(prompt)} tokens, but the model has only {room} positions; "
                "leave the problem out, or lower evaluate.shots"
            )
    return prompts


def _answer(
    engine: Engine,
    asked: Asked,
    work: Mapping[str, Answers],
    settings: EvaluateConfig,
    prompts: Mapping[str, tuple[int, ...]],
    room: int,
) -> None:
    """Generate, judge and write the missing answers of all runs to one task, in batches across runs.

    A prompt and its answer take at most `room` tokens, the positions of the model.
    """
    from tqdm import tqdm

    task, renderer = asked.task, asked.renderer
    jobs: list[tuple[str, Problem, int]] = []
    for name, answers in work.items():
        jobs += [(name, problem, sample) for problem, sample in answers.missing()]
    if not jobs:
        return
    limit = next(iter(work.values())).protocol.max_new_tokens
    requests = [
        Request(
            prompt_ids=prompts[problem.id],
            adapter=name if work[name].folder.has_adapter else None,
            seed=settings.seed * 1_000_003 + sample + 1,
            temperature=0.0 if sample == GREEDY else settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=min(limit, room - len(prompts[problem.id])),
        )
        for name, problem, sample in jobs
    ]
    pending: list[tuple[int, Completion]] = []

    def flush() -> None:
        whole = [renderer.decode(completion.ids) for _, completion in pending]
        texts = [task.cut(before(text, settings.stop)) for text in whole]
        pairs = [(text, jobs[i][1]) for (i, _), text in zip(pending, texts, strict=True)]
        verdicts = task.judge_many(pairs)
        for (i, completion), text, all_, verdict in zip(list(pending), texts, whole, verdicts, strict=True):
            name, problem, sample = jobs[i]
            truncated = not completion.finished and text == all_
            work[name].add([Attempt(problem.id, sample, text, len(completion.ids), truncated, verdict)])
            pending.pop(0)

    with tqdm(total=len(requests), desc=task.name, unit="answer") as bar:

        def on_progress(i: int, completion: Completion) -> None:
            pending.append((i, completion))
            bar.update()
            if len(pending) >= CHUNK:
                flush()

        try:
            engine.generate(requests, on_progress)
        finally:  # neither Ctrl-C nor an error loses a complete answer
            flush()
