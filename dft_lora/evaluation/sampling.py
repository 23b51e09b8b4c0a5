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
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import EvaluateConfig, Recipe, digest
from ..data.templates import Renderer
from ..errors import RequestError
from ..model.generate import Completion, Request, generate, rows_that_fit
from ..model.load import load_adapters, load_base, load_tokenizer
from ..provenance import certificate
from ..run_folder import RunFolder, parsing, read_json, read_lines, write_json, write_text
from ..tasks import get_task
from ..tasks.base import Attempt, Problem, Verdict
from ..tasks.judge import judge_many
from .tokens import score, text_examples

GREEDY = -1
CHUNK = 256  # answers judged and written at a time
SCORED = 128  # problems whose reference solutions are scored token by token
OTHER_TEXT = Path(__file__).with_name("other_text.txt")
FORGETTING = "other-text"


@dataclass(frozen=True)
class Protocol:
    """All that must be equal for two evaluations to be comparable."""

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

    def differences(self, other: dict[str, Any]) -> list[str]:
        return [f"{k}: {other.get(k)!r} -> {v!r}" for k, v in asdict(self).items() if other.get(k) != v]


def evaluate(
    run_dirs: Sequence[str | Path],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    changes: Sequence[str] = (),
    overwrite: bool = False,
) -> list[RunFolder]:
    """Answer and judge `tasks` with every run, over one base loaded once.

    `tasks` default to the recipes' own; `limit` takes the first problems of each; `changes` are
    `evaluate.field=value` (or `field=value`) and apply to all runs. An interrupted evaluation
    with the same protocol is completed; another protocol is refused unless `overwrite`.

    Raises RequestError before a model is loaded when runs, tasks or templates do not fit together.
    """
    folders = [RunFolder.open(path) for path in run_dirs]
    if not folders:
        raise RequestError("name at least one run folder")
    changes = [change if change.startswith("evaluate.") else f"evaluate.{change}" for change in changes]
    recipes = [folder.recipe().override(changes) for folder in folders]
    settings, names = recipes[0].evaluate, unique_names(folders)
    same_base(folders, recipes)
    task_list = tasks or settings.tasks
    if not task_list:
        raise RequestError("no task: give --task NAME, or evaluate.tasks in the recipe")
    problems = {name: get_task(name).problems()[:limit] for name in task_list}

    renderer = renderer_of(folders, recipes)
    shard = Shard.of_this_process()
    work = {}
    for task, its_problems in problems.items():
        protocol = _protocol(task, its_problems, settings, renderer)
        for name, folder in zip(names, folders, strict=True):
            work[task, name] = Answers(folder, protocol, its_problems, overwrite, shard)
    engine = ENGINES[settings.engine]
    complete = all(answers.missing() == [] for answers in work.values())
    shard.wait()  # all have read before one writes
    if complete and (settings.engine != "plain" or all(_scored(folder, problems) for folder in folders)):
        return folders

    adapters = {n: f.adapter for n, f in zip(names, folders, strict=True) if f.has_adapter}
    answer = engine(recipes[0], adapters, renderer)
    for task in problems:
        mine = {name: answers for (t, name), answers in work.items() if t == task}
        for answers in mine.values():
            answers.begin(certificate(**answer.facts))
        _answer(answer, renderer, mine, settings, task)
    if shard.is_main and isinstance(answer, Plain):
        _score(answer.model, renderer, dict(zip(names, folders, strict=True)), problems)
    shard.wait()
    for answers in work.values() if shard.is_main else ():
        answers.gather()
    shard.wait()
    return folders


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
        base, hardware = load_base(recipe.model)
        self.model, self.renderer = load_adapters(base, adapters), renderer
        self.facts = {"device": hardware.name, "dtype": str(hardware.dtype).removeprefix("torch.")}

    def generate(self, requests: Sequence[Request], on_progress: Callable[[int, Completion], None]) -> None:
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=1)
        generate(
            self.model,
            requests,
            stop_ids=self.renderer.stop_ids,
            pad_id=self.renderer.pad_id,
            batch_rows=rows_that_fit(self.model, longest),
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
        if overwrite and shard.is_main:
            for old in (self.file, self.facts_file, tokens_file(folder, protocol.task), *self._parts()):
                old.unlink(missing_ok=True)
        elif not overwrite and self.facts_file.is_file():
            differences = protocol.differences(read_json(self.facts_file)["protocol"])
            if differences:
                raise RequestError(
                    f"{self.file}: made under another protocol ({'; '.join(differences)}); "
                    "use the same, or --overwrite to replace it"
                )
        self.done = set() if overwrite else set(self._attempts())

    def missing(self) -> list[tuple[Problem, int]]:
        """(problem, sample) pairs still to be answered by this process; sample -1 is the greedy answer."""
        samples = (GREEDY, *range(self.protocol.samples))
        mine = self.problems[self.shard.rank :: self.shard.world]
        return [(p, s) for p in mine for s in samples if (p.id, s) not in self.done]

    def begin(self, birth: dict[str, Any]) -> None:
        """Record the protocol, before the first answer."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.shard.is_main and not self.facts_file.is_file():
            problems = {
                p.id: {"question": p.question, "answer": p.answer, "tags": dict(p.tags)}
                for p in self.problems
            }
            facts = {"protocol": asdict(self.protocol), "provenance": birth, "problems": problems}
            write_json(self.facts_file, facts)

    def add(self, attempts: Iterable[Attempt]) -> None:
        part = self.file if self.shard.world == 1 else self._part(self.shard.rank)
        with part.open("a", encoding="utf-8") as file:
            file.writelines(attempt_line(attempt) for attempt in attempts)

    def gather(self) -> None:
        """Bring the parts of several processes together, also those that a kill has left."""
        if parts := self._parts():
            write_text(self.file, "".join(map(attempt_line, self._attempts().values())))
            for part in parts:
                part.unlink()

    def _attempts(self) -> dict[tuple[str, int], Attempt]:
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
        for (i, completion), text, verdict in zip(pending, texts, verdicts, strict=True):
            name, problem, sample = jobs[i]
            made = len(completion.ids)
            work[name].add([Attempt(problem.id, sample, text, made, not completion.finished, verdict)])
        pending.clear()

    with tqdm(total=len(requests), desc=title, unit="answer") as bar:

        def on_progress(i: int, completion: Completion) -> None:
            pending.append((i, completion))
            bar.update()
            if len(pending) >= CHUNK:
                flush()

        engine.generate(requests, on_progress)
    flush()


def _score(
    model: Any, renderer: Renderer, folders: Mapping[str, RunFolder], problems: Mapping[str, list[Problem]]
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
            if examples and not file.is_file():
                score(model, examples, pad_id=renderer.pad_id, adapter=adapter).save(file)


def _scored(folder: RunFolder, problems: Mapping[str, list[Problem]]) -> bool:
    """Whether `_score` has been here."""
    wanted = [task for task, its_problems in problems.items() if any(p.solution for p in its_problems)]
    return all(tokens_file(folder, title).is_file() for title in (*wanted, FORGETTING))


def tokens_file(folder: RunFolder, title: str) -> Path:
    return folder.evaluation(title).with_suffix(".tokens.safetensors")


def checkpoint_runs(folder: RunFolder) -> list[RunFolder]:
    """A run folder `steps/step-N` for every checkpoint that was kept: it is evaluated like any run."""
    found = []
    for checkpoint in sorted(folder.checkpoints.glob("step-*")):
        step = RunFolder(folder.path / "steps" / checkpoint.name)
        if not step.begun:
            shutil.copytree(checkpoint / "adapter", step.adapter, dirs_exist_ok=True)
            facts = folder.run()
            recipe = facts["recipe"] | {"name": step.name, "output": str(step.path)}
            step.write_run(**facts | {"recipe": recipe, "step": int(step.name.removeprefix("step-"))})
        found.append(step)
    return found


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
        provenance=certificate(),
    )
    return folder


def _protocol(
    task: str, problems: Sequence[Problem], settings: EvaluateConfig, renderer: Renderer
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
        if recipe.model != recipes[0].model:
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


def unique_names(folders: Sequence[RunFolder]) -> list[str]:
    """The folder names, made unique; they name adapters, so dots (module paths to peft) are replaced."""
    names: list[str] = []
    for folder in folders:
        name = candidate = folder.name.replace(".", "_")
        while candidate in names:
            candidate = f"{name}-{sum(n.startswith(name) for n in names) + 1}"
        names.append(candidate)
    return names
