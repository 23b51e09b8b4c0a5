"""Sample, judge and keep: `evaluation/TASK.jsonl` in each run folder.

Runs of one base are answered in the same batches, each with its own adapter. Every sample is
drawn from a random stream of its own, named by (seed, problem, sample): all runs see the same
streams, and a killed evaluation goes on where it stopped. Under `accelerate launch` each process takes
every n-th problem; nothing in the answers depends on how many there were.

    evaluation/TASK.jsonl                 one line a sample
    evaluation/TASK.json                  the protocol, the problems, a birth certificate
    evaluation/TASK.tokens.safetensors    probabilities of the reference solutions' tokens (tokens.py)
    evaluation/other-text.tokens.safetensors    and of a text that has nothing to do with the task
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import EvaluateConfig, ModelConfig, Recipe, digest
from ..data.templates import Renderer
from ..errors import Interrupted, RequestError
from ..model.fingerprint import base_fingerprint
from ..model.generate import Completion, Request, generate
from ..model.head import check_head
from ..model.load import load_adapters, load_base, load_tokenizer, weights_of
from ..runs.folder import (
    RunFolder,
    open_runs,
    parsing,
    read_json,
    read_lines,
    write_json,
    write_text,
    writing,
)
from ..runs.provenance import certificate
from ..tasks import get_task
from ..tasks.base import Attempt, Problem, Verdict
from ..tasks.judge import judge_many
from .tokens import TokenTable, score, text_examples

GREEDY = -1
CHUNK = 256  # answers judged and written at a time
SCORED = 128  # problems whose reference solutions are scored token by token
OTHER_TEXT = Path(__file__).with_name("other_text.txt")
FORGETTING = "other-text"
THEN = "evaluate again: it goes on where it stopped"


@dataclass(frozen=True)
class Protocol:
    """All that must be equal for answers to be added to those on disk.

    All but the weights (`adapter`, `base`) must be equal for two runs to be comparable, too.
    """

    task: str
    problems: int
    problems_hash: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    template: str
    template_hash: str
    seed: int
    engine: str
    adapter: str | None
    """The digest of the adapter; None: the bare base."""
    base: str
    """The fingerprint of the base's weights."""

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from a recorded protocol, in words."""
        said = [
            f"{k}: {other.get(k)!r} -> {v!r}"
            for k, v in asdict(self).items()
            if k not in (*WEIGHTS, "engine") and other.get(k) != v
        ]
        if (engine := other.get("engine", self.engine)) != self.engine:
            said.append(f"engine: {engine!r} -> {self.engine!r}")
        if why := other_weights(other, self.adapter, self.base):
            said.append(why)
        return said


WEIGHTS = ("adapter", "base")
"""The fields of a protocol that name the weights; each run has its own."""


def other_weights(recorded: Mapping[str, Any], adapter: str | None, base: str) -> str | None:
    """Why answers with the `recorded` protocol are not of these weights, in words; None where they are."""
    if not set(WEIGHTS) <= set(recorded):
        return "an earlier version of dft-lora made them and did not record the weights"
    if recorded["adapter"] != adapter:
        return "the run's adapter has changed since"
    if recorded["base"] != base:
        return "the base's weights have changed since"
    return None


def evaluate(
    run_dirs: Sequence[str | Path],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    changes: Sequence[str] = (),
    overwrite: bool = False,
) -> list[RunFolder]:
    """Answer and judge `tasks` with every run, over one base loaded once.

    A path RUN_DIR/checkpoints/step-N stands for that checkpoint. `tasks` default to the recipes' own;
    `limit` takes the first problems of each; `changes` are `evaluate.field=value` (or `field=value`) and
    apply to all runs. An interrupted evaluation with the same protocol is completed; answers under another
    protocol, or of other weights, are refused unless `overwrite`.

    Raises RequestError before a model is loaded when runs, tasks, settings or templates do not fit together,
    or a run has not finished; Interrupted after Ctrl-C, with all answers kept.
    """
    folders = open_runs(run_dirs)
    if not folders:
        raise RequestError("name at least one run folder")
    recipes = recipes_of(folders, changes)
    settings, names = recipes[0].evaluate, unique_names(folders)
    same_base(folders, recipes)
    same_settings(folders, recipes, free={"tasks"} if tasks else ())
    problems = {name: _problems(name, limit) for name in asked_tasks(recipes, tasks)}

    renderer = renderer_of(folders, recipes)
    base = unchanged_base(folders, recipes[0].model)
    shard = Shard.of_this_process()
    work = {}
    for task, its_problems in problems.items():
        for name, folder in zip(names, folders, strict=True):
            protocol = _protocol(task, its_problems, settings, renderer, folder.adapter_digest, base)
            work[task, name] = Answers(folder, protocol, its_problems, overwrite, shard)
    complete = all(answers.missing() == [] for answers in work.values())
    scored = settings.engine != "plain" or all(_scored(folder, problems, base) for folder in folders)
    shard.wait()  # all have read before one writes
    if not (complete and scored):
        try:
            _complete(dict(zip(names, folders, strict=True)), recipes[0], renderer, problems, work, base)
        except KeyboardInterrupt:
            if any(answers.overwrite for answers in work.values()):
                raise  # while the model was loaded: nothing is replaced yet
            raise Interrupted(_kept(work.values()), signal.SIGINT) from None
    return folders


def _complete(
    folders: Mapping[str, RunFolder],
    recipe: Recipe,
    renderer: Renderer,
    problems: Mapping[str, list[Problem]],
    work: Mapping[tuple[str, str], Answers],
    base: str,
) -> None:
    """Load the model, answer what is missing, and score the reference solutions token by token."""
    shard = next(iter(work.values())).shard
    adapters = {name: folder.adapter for name, folder in folders.items() if folder.has_adapter}
    answer = ENGINES[recipe.evaluate.engine](recipe, adapters, renderer)
    for answers in work.values():
        answers.begin(certificate(**answer.facts))
    shard.wait()  # what is replaced is gone before one adds
    for task in problems:
        mine = {name: answers for (t, name), answers in work.items() if t == task}
        _answer(answer, renderer, mine, recipe.evaluate, task)
    if shard.is_main and isinstance(answer, Plain):
        _score(answer.model, renderer, folders, problems, base)
    shard.wait()
    for answers in work.values() if shard.is_main else ():
        answers.gather()
    shard.wait()


def _kept(work: Collection[Answers]) -> str:
    """What an interrupted evaluation leaves behind, in words."""
    kept, asked = sum(len(a.on_disk()) for a in work), sum(a.asked for a in work)
    return f"evaluation stopped: {kept} of {asked} answers are kept"


def recipes_of(folders: Sequence[RunFolder], changes: Sequence[str]) -> list[Recipe]:
    """The runs' recipes with `evaluate.field=value` (or `field=value`) changes."""
    changes = [change if change.startswith("evaluate.") else f"evaluate.{change}" for change in changes]
    return [folder.recipe().override(changes) for folder in folders]


def asked_tasks(recipes: Sequence[Recipe], tasks: Sequence[str]) -> tuple[str, ...]:
    """`tasks`, or the recipes' own. Raises RequestError when there are none."""
    if not (tasks or recipes[0].evaluate.tasks):
        raise RequestError("no task: give --task NAME, or evaluate.tasks in the recipe")
    return tuple(tasks) or recipes[0].evaluate.tasks


def _problems(task: str, limit: int | None) -> list[Problem]:
    if limit is not None and limit < 1:
        raise RequestError(f"--limit: {limit}; give at least 1")
    problems = list(get_task(task).problems()[:limit])
    if not problems:
        raise RequestError(f"--task {task}: it has no problems")
    return problems


@dataclass(frozen=True)
class Shard:
    """This process among those of an `accelerate launch`: it takes every `world`-th problem."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_this_process(cls) -> Shard:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


class Plain:
    """Answers by the package's own decoding loop (model/generate.py)."""

    def __init__(self, recipe: Recipe, adapters: Mapping[str, Path], renderer: Renderer):
        base, hardware = load_base(recipe.model, for_answers=True)
        check_head(base)
        self.model, self.renderer = load_adapters(base, adapters), renderer
        self.facts = {"device": hardware.name, "dtype": str(hardware.dtype).removeprefix("torch.")}

    def generate(self, requests: Sequence[Request], on_progress: Callable[[int, Completion], None]) -> None:
        generate(
            self.model,
            requests,
            stop_ids=self.renderer.stop_ids,
            pad_id=self.renderer.pad_id,
            on_progress=on_progress,
        )


def _vllm(recipe: Recipe, adapters: Mapping[str, Path], renderer: Renderer) -> Any:
    from ..model.vllm import Vllm

    return Vllm(recipe, adapters, renderer)


ENGINES: Mapping[str, Callable[..., Any]] = {"plain": Plain, "vllm": _vllm}
"""What generates: (recipe, adapters by name, renderer) -> an object with `facts` and `generate`."""


class Answers:
    """One run's answers to one task: what is on disk, what is missing, and the way to add."""

    def __init__(
        self,
        folder: RunFolder,
        protocol: Protocol,
        problems: Sequence[Problem],
        overwrite: bool = False,
        shard: Shard = Shard(),
    ):
        self.folder, self.protocol, self.problems, self.shard = folder, protocol, problems, shard
        self.file = folder.evaluation(protocol.task)
        self.facts_file = self.file.with_suffix(".json")
        self.overwrite = overwrite
        if not overwrite and self.facts_file.is_file():
            differences = protocol.differences(read_json(self.facts_file)["protocol"])
            if differences:
                raise RequestError(
                    f"{self.file}: answered under another protocol ({'; '.join(differences)}); "
                    "--overwrite replaces these answers"
                )
        self.done = set() if overwrite else set(self.on_disk())

    @property
    def asked(self) -> int:
        """How many answers there are to be, the greedy ones included."""
        return len(self.problems) * (self.protocol.samples + 1)

    def missing(self) -> list[tuple[Problem, int]]:
        """(problem, sample) pairs still to be answered by this process; sample -1 is the greedy answer."""
        samples = (GREEDY, *range(self.protocol.samples))
        mine = self.problems[self.shard.rank :: self.shard.world]
        return [(p, s) for p in mine for s in samples if (p.id, s) not in self.done]

    def begin(self, birth: dict[str, Any]) -> None:
        """Record the protocol, before the first answer; what is to be overwritten goes now."""
        with writing(self.file, THEN):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.overwrite and self.shard.is_main:
                tables = tokens_file(self.folder, self.protocol.task)
                for old in (self.file, self.facts_file, tables, *self._parts()):
                    old.unlink(missing_ok=True)
        self.overwrite = False
        if self.shard.is_main and not self.facts_file.is_file():
            problems = {
                p.id: {"question": p.question, "answer": p.answer, "tags": dict(p.tags)}
                for p in self.problems
            }
            facts = {"protocol": asdict(self.protocol), "provenance": birth, "problems": problems}
            write_json(self.facts_file, facts)

    def add(self, attempts: Iterable[Attempt]) -> None:
        part = self.file if self.shard.world == 1 else self._part(self.shard.rank)
        with writing(part, THEN), part.open("a", encoding="utf-8") as file:
            file.writelines(attempt_line(attempt) for attempt in attempts)

    def gather(self) -> None:
        """Bring the parts of several processes together, also those that a kill has left."""
        if parts := self._parts():
            write_text(self.file, "".join(map(attempt_line, self.on_disk().values())))
            for part in parts:
                part.unlink()

    def on_disk(self) -> dict[tuple[str, int], Attempt]:
        """By problem and sample; also in the parts that several processes have written."""
        files = (self.file, *self._parts())
        return {(a.problem, a.sample): a for file in files for a in read_attempts(file)}

    def _part(self, rank: int) -> Path:
        return self.file.with_name(f"{self.protocol.task}.rank-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob(f"{self.protocol.task}.rank-*.jsonl"))


def _answer(
    engine: Any, renderer: Renderer, work: dict[str, Answers], settings: EvaluateConfig, title: str
) -> None:
    """Generate and judge all that is missing, run by run in the same batches, and write it in chunks."""
    from tqdm import tqdm

    prompts: dict[str, tuple[int, ...]] = {}
    jobs: list[tuple[str, Problem, int]] = []
    for name, answers in work.items():
        jobs += [(name, problem, sample) for problem, sample in answers.missing()]
    for _, problem, _ in jobs:
        if problem.id not in prompts:
            prompts[problem.id] = tuple(renderer.prompt_ids(problem.messages))
    limit = next(iter(work.values())).protocol.max_new_tokens
    requests = [
        Request(
            prompt_ids=prompts[problem.id],
            adapter=name if work[name].folder.has_adapter else None,
            seed=settings.seed * 1_000_003 + sample + 1,
            temperature=0.0 if sample == GREEDY else settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=limit,
        )
        for name, problem, sample in jobs
    ]
    pending: list[tuple[int, Completion]] = []

    def flush() -> None:
        texts = [renderer.decode(completion.ids) for _, completion in pending]
        verdicts = judge_many(
            [(text, jobs[i][1].answer) for (i, _), text in zip(pending, texts, strict=True)]
        )
        for (i, completion), text, verdict in zip(list(pending), texts, verdicts, strict=True):
            name, problem, sample = jobs[i]
            made = len(completion.ids)
            work[name].add([Attempt(problem.id, sample, text, made, not completion.finished, verdict)])
            pending.pop(0)

    with tqdm(total=len(requests), desc=title, unit="answer") as bar:

        def on_progress(i: int, completion: Completion) -> None:
            pending.append((i, completion))
            bar.update()
            if len(pending) >= CHUNK:
                flush()

        try:
            engine.generate(requests, on_progress)
        finally:  # Ctrl-C, or an error, loses no answer that is complete
            flush()


def _score(
    model: Any,
    renderer: Renderer,
    folders: Mapping[str, RunFolder],
    problems: Mapping[str, list[Problem]],
    base: str,
) -> None:
    """Token tables of the reference solutions, and of the text that has nothing to do with them."""
    texts = {
        task: [renderer.render(p) for p in its_problems if p.solution is not None][:SCORED]
        for task, its_problems in problems.items()
    } | {FORGETTING: text_examples(renderer, OTHER_TEXT.read_text(encoding="utf-8").split("\n\n"))}
    for name, folder in folders.items():
        adapter = name if folder.has_adapter else None
        for title, examples in texts.items():
            file = tokens_file(folder, title)
            if examples and not _table_stands(folder, title, base):
                table = score(model, examples, pad_id=renderer.pad_id, adapter=adapter)
                table.save(file, {"adapter": folder.adapter_digest or "", "base": base})


def _scored(folder: RunFolder, problems: Mapping[str, list[Problem]], base: str) -> bool:
    """Whether `_score` has been here, with these weights."""
    wanted = [task for task, its_problems in problems.items() if any(p.solution for p in its_problems)]
    return all(_table_stands(folder, title, base) for title in (*wanted, FORGETTING))


def _table_stands(folder: RunFolder, title: str, base: str) -> bool:
    file = tokens_file(folder, title)
    weights = {"adapter": folder.adapter_digest or "", "base": base}
    return file.is_file() and TokenTable.weights(file) == weights


def tokens_file(folder: RunFolder, title: str) -> Path:
    return folder.evaluation(title).with_suffix(".tokens.safetensors")


def checkpoint_runs(folder: RunFolder) -> list[RunFolder]:
    """A run folder `steps/step-N` for every checkpoint that was kept: it is evaluated like any run."""
    return [folder.checkpoint_run(path.name) for path in sorted(folder.checkpoints.glob("step-*"))]


def attempt_line(attempt: Attempt) -> str:
    values = asdict(attempt) | {"verdict": attempt.verdict.status, "extracted": attempt.verdict.extracted}
    return json.dumps(values, ensure_ascii=False) + "\n"


def read_attempts(file: Path) -> list[Attempt]:
    """The attempts of a file, none when it does not exist. A line cut off by a kill is dropped."""
    if not file.is_file():
        return []
    text = file.read_bytes()
    if not text.endswith(b"\n"):
        file.write_bytes(text[: text.rfind(b"\n") + 1])
    with parsing(file):
        return [
            Attempt(
                line["problem"],
                line["sample"],
                line["text"],
                line["tokens"],
                line["truncated"],
                Verdict(line["verdict"], line["extracted"]),
            )
            for line in read_lines(file)
        ]


def base_run(recipe: Recipe, path: str | Path) -> RunFolder:
    """A run folder for the untouched base of a recipe: no adapter, so that it is evaluated like any run."""
    folder = RunFolder.create(path)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    folder.write_run(
        recipe=recipe.model_copy(update={"name": folder.name, "output": str(path)}).as_dict(),
        template=renderer.template.name,
        template_hash=renderer.fingerprint,
        base=base_fingerprint(recipe.model),
        provenance=certificate(weights=weights_of(recipe.model)),
    )
    return folder


def _protocol(
    task: str,
    problems: Sequence[Problem],
    settings: EvaluateConfig,
    renderer: Renderer,
    adapter: str | None,
    base: str,
) -> Protocol:
    return Protocol(
        task=task,
        problems=len(problems),
        problems_hash=digest([[p.id, [dict(m) for m in p.messages], p.answer] for p in problems]),
        samples=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=answer_limit(task, settings),
        template=renderer.template.name,
        template_hash=renderer.fingerprint,
        seed=settings.seed,
        engine=settings.engine,
        adapter=adapter,
        base=base,
    )


def answer_limit(task: str, settings: EvaluateConfig) -> int:
    """Tokens of the longest answer: evaluate.max_new_tokens where it was set, else the task's own limit."""
    longest = settings.max_new_tokens
    if "max_new_tokens" in settings.model_fields_set:
        return longest
    return min(longest, get_task(task).max_new_tokens)


def renderer_of(folders: Sequence[RunFolder], recipes: Sequence[Recipe]) -> Renderer:
    """The renderer of all runs: the training template, unless evaluate.template names another.

    Raises RequestError when the template now renders other ids than it did in training.
    """
    wanted = recipes[0].evaluate.template
    tokenizer = load_tokenizer(recipes[0].model)
    for folder in folders:
        trained = folder.run()
        renderer = Renderer(tokenizer, trained["template"] if wanted == "same" else wanted)
        if wanted == "same" and renderer.fingerprint != trained["template_hash"]:
            raise RequestError(
                f"{folder.path}: template {trained['template']!r} renders other ids today than in training "
                "(tokenizer or template changed); name one with --set template=NAME to evaluate all the same"
            )
    return renderer


def same_base(folders: Sequence[RunFolder], recipes: Sequence[Recipe]) -> None:
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        if _weights(recipe) != _weights(recipes[0]):
            raise RequestError(
                f"{folder.path} has the base {recipe.model.name!r}, "
                f"{folders[0].path} has {recipes[0].model.name!r}: evaluate them apart"
            )
        if (
            recipe.evaluate.template == "same"
            and folder.run()["template_hash"] != folders[0].run()["template_hash"]
        ):
            raise RequestError(
                f"{folder.path} was trained with template {folder.run()['template']!r}, "
                f"{folders[0].path} with {folders[0].run()['template']!r}: name one with --set template=NAME"
            )


def same_settings(
    folders: Sequence[RunFolder], recipes: Sequence[Recipe], free: Collection[str] = ()
) -> None:
    """Raises RequestError when the runs' settings of evaluation differ; fields in `free` may."""
    first = dict(recipes[0].evaluate)
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        differing = {k: v for k, v in dict(recipe.evaluate).items() if v != first[k] and k not in free}
        if differing:
            said = "; ".join(f"evaluate.{k} {first[k]!r} and {v!r}" for k, v in differing.items())
            raise RequestError(
                f"{folders[0].path} and {folder.path} have different settings: {said}; evaluate them apart, "
                f"or name one for all with --set {next(iter(differing))}=VALUE"
            )


def unchanged_base(folders: Sequence[RunFolder], config: ModelConfig) -> str:
    """The base's fingerprint. Raises RequestError when a run was made over other weights of that name."""
    now = base_fingerprint(config)
    for folder in folders:
        if folder.base_fingerprint not in (None, now):
            raise RequestError(
                f"{folder.path}: the weights of its base {config.name!r} have changed since the run was "
                "made; put them back, or make the run again in another folder"
            )
    return now


def _weights(recipe: Recipe) -> dict[str, Any]:
    """What names a base; how its layers are held while it answers does not."""
    return recipe.model.model_dump(exclude={"unpack"})


def unique_names(folders: Sequence[RunFolder]) -> list[str]:
    """The folder names, made unique; they name adapters, so dots (module paths to peft) are replaced."""
    names: list[str] = []
    for folder in folders:
        name = candidate = folder.name.replace(".", "_")
        while candidate in names:
            candidate = f"{name}-{sum(n.startswith(name) for n in names) + 1}"
        names.append(candidate)
    return names
