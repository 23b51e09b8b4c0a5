"""Runs the page's models: streams answers in step, and computes the probability of every token.

The base is loaded once, with the adapters of all runs on it; the answers of all columns are one batch. The
lock is held for one forward pass and never across a `yield`, so a generator that a closed page leaves behind
holds nothing. No hook outlives a forward pass, so two generators may alternate.

Legend: R rows, L positions, M scored tokens, D hidden width, V vocabulary, K alternatives.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.templates import Renderer
from ..errors import RequestError, did_you_mean
from ..evaluation.choices import Texts, choice_examples, score_texts
from ..evaluation.run_set import renderer_of, same_base, unchanged_base, unique_names
from ..model.adapters import adapter_layers, mixed
from ..model.generate import Request, stream
from ..model.head import check_head, hidden_states
from ..model.limits import UNLIMITED, positions
from ..model.load import load_adapters, load_base
from ..runs.folder import RunFolder
from ..tasks import get_task
from ..tasks.base import Judge, Problem, Task
from ..tasks.choice import LETTERS
from ..tasks.judge import Verdict
from .views import MAX_COLUMNS

MAX_CHARACTERS = 8_000
MAX_REFERENCE = 2_000  # characters of a reference that answers are compared with
MAX_LINES = 400
MAX_SAMPLES = 64
TORCH_RANDOM = threading.Lock()
"""Held while torch's one random state is in use: an adapter draws its first weights from it, even one that is
then loaded from a file, and a training step draws its dropout."""
MAX_ADDED = 16  # runs trained on the page, which stay in memory
ALTERNATIVES = 5
SCORED_AT_ONCE = 64  # positions whose logits [M, V] exist at the same time: 39 MB at V = 152k


@dataclass(frozen=True)
class Picked:
    """A problem that was picked on the page, and the name of its task."""

    task: str
    problem: Problem


@dataclass(frozen=True)
class Question:
    """A question from the page or an endpoint. Every field is checked, since it comes from outside.

    `samples` is the number of answers per run; they are judged against `reference` unless it is blank. The
    task of `picked` judges them, as long as `problem` is the text that was picked.
    """

    problem: str
    reference: str = ""
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    samples: int = 1
    picked: Picked | None = None

    def __post_init__(self):
        check_text("problem", self.problem)
        if not self.problem.strip():
            raise RequestError("problem is empty: enter one, or pick one")
        check_text("reference", self.reference, MAX_REFERENCE if self.judge else MAX_CHARACTERS)
        check_number("temperature", self.temperature, 0, 2)
        check_number("max_new_tokens", self.max_new_tokens, 1, 4096, whole=True)
        check_number("seed", self.seed, 0, 2**31 - 1, whole=True)
        check_number("samples", self.samples, 1, MAX_SAMPLES, whole=True)
        problem = self.as_problem()
        letters = LETTERS[: len(problem.choices)]
        if letters and problem.answer is not None and problem.answer not in tuple(letters):
            raise RequestError(f"reference: the answer to this problem is a letter from {', '.join(letters)}")

    @property
    def task(self) -> Task | None:
        """The task of the picked problem, unless the problem was edited."""
        picked = self.picked
        return get_task(picked.task) if picked and picked.problem.question == self.problem else None

    @property
    def judge(self) -> Judge | None:
        """What judges the answers. None: they are programs, which the page never runs."""
        try:
            return (self.task or Judge()).allowed(False)
        except RequestError:
            return None

    def as_problem(self) -> Problem:
        """The question as a task's problem; it has no answer when there is no reference."""
        answer = self.reference if self.reference.strip() else None
        if self.picked and self.task:
            return replace(self.picked.problem, answer=answer)
        return Problem.ask("page", self.problem, answer=answer)


def check_text(name: str, value: Any, most: int = MAX_CHARACTERS) -> None:
    """Raises RequestError unless `value` is text of at most `most` characters and MAX_LINES."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is {type(value).__name__}, not text")
    if len(value) > most:
        raise RequestError(f"{name} has {len(value):,} characters; at most {most:,}")
    if value.count("\n") >= MAX_LINES:
        raise RequestError(f"{name} has {value.count(chr(10)) + 1:,} lines; at most {MAX_LINES}")


def check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raises RequestError unless `value` is a number in [least, most]; NaN is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or (whole and value != int(value)):
        raise RequestError(f"{name}: give a{' whole' if whole else ''} number from {least} to {most}")


@dataclass
class Answer:
    """One row of the batch, complete or still being generated.

    `state`: writing; done (the model ended it); truncated (at max_new_tokens); stopped (by the visitor).
    """

    run: str
    sample: int
    ids: list[int] = field(default_factory=list)
    end: int | None = None
    """The end token that the model drew."""
    text: str = ""
    state: Literal["writing", "done", "truncated", "stopped"] = "writing"
    verdict: Verdict | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """One column of the `/compare` endpoint; `verdict` is null while writing and without a reference."""
        return {
            "run": self.run,
            "text": self.text,
            "verdict": self.verdict and self.verdict.status,
            "tokens": len(self.ids),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Token:
    """A token of a text under one run: the text it adds, its probability, the most likely alternatives."""

    text: str
    probability: float
    top: tuple[tuple[str, float], ...]

    @property
    def weight(self) -> float:
        """The weight of the token's loss in DFT: sg(p) (arXiv 2508.05629, eq. 9). In plain SFT it is 1."""
        return self.probability

    @property
    def sft_gradient(self) -> float:
        """L1 norm of the gradient with respect to the token's logits in SFT: 2 (1 - p), at most 2."""
        return 2 * (1 - self.probability)

    @property
    def dft_gradient(self) -> float:
        """The same in DFT: 2 p (1 - p), at most 1/2, and near 0 for a very unlikely token."""
        return self.weight * self.sft_gradient

    def as_dict(self) -> dict[str, Any]:
        """One entry of the `/tokens` endpoint."""
        return {
            "token": self.text,
            "probability": self.probability,
            "weight": self.weight,
            "top": [list(pair) for pair in self.top],
        }


class Session:
    """The runs of a page over one base. Raises RequestError when one page cannot show them together."""

    def __init__(self, folders: Sequence[RunFolder]):
        if not 1 <= len(folders) <= MAX_COLUMNS:
            raise RequestError(f"RUN_DIR: {len(folders)} runs; a page shows 1 to {MAX_COLUMNS}")
        recipes = [folder.recipe() for folder in folders]
        same_base(folders, recipes)
        unchanged_base(folders, recipes[0].model)
        self.renderer = renderer_of(folders, recipes)
        names = unique_names(folders)
        adapters = {n: f.adapter for n, f in zip(names, folders, strict=True) if f.has_adapter}
        base, self.hardware = load_base(recipes[0].model, for_answers=True)
        self.head = check_head(base)
        self.model = load_adapters(base, adapters)
        self.adapters: dict[str, str | None] = {n: n if n in adapters else None for n in names}
        self.identities = {n: run_digest(f) for n, f in zip(names, folders, strict=True)}
        if None not in self.adapters.values() and len(names) < MAX_COLUMNS:
            self.adapters = {"base": None, **self.adapters}
            self.identities = {"base": recipes[0].model.name, **self.identities}
        self.base = recipes[0].model.name
        self.folders = dict(zip(names, folders, strict=True))
        self.added: dict[str, RunFolder] = {}
        self.held: dict[str, str | None] = {}
        self.positions = positions(base.config) or UNLIMITED
        self.lock = threading.Lock()

    @property
    def runs(self) -> list[str]:
        """The names of the page's own columns, in order."""
        return [name for name in self.adapters if name not in self.added]

    @property
    def every(self) -> list[str]:
        """The names of all columns that a visitor may choose."""
        return list(self.adapters)

    def add(self, folder: RunFolder) -> str:
        """Load the adapter of another run over the same base; returns the name of its column.

        Raises RequestError for a run over another base, and when MAX_ADDED runs were added before.
        """
        for name, known in self.added.items():
            if known.path == folder.path:
                return name
        folders = [next(iter(self.folders.values())), folder]
        same_base(folders, [one.recipe() for one in folders])
        if len(self.added) == MAX_ADDED:
            raise RequestError(
                f"{MAX_ADDED} runs were added to this page already; open this one with dft-lora app "
                f"{folder.path}"
            )
        run = folder.whole.path.resolve()
        wanted = f"{run.name}-{run.parent.name}".replace(".", "_")
        names = (wanted, *(f"{wanted}-{i}" for i in range(2, 2 + MAX_ADDED)))
        name = next(name for name in names if name not in self.adapters)
        self._load(name, folder.adapter)
        self.adapters[name], self.added[name] = name, folder
        return name

    def hold(self, name: str, adapter: Path | None) -> None:
        """Load an adapter that is no column, until `drop`; None stands for the base."""
        if adapter is not None:
            self._load(name, adapter)
        self.held[name] = name if adapter else None

    def drop(self, name: str) -> None:
        """Forget an adapter that is held and not in use."""
        if self.held.pop(name):
            with self.lock:
                self.model.delete_adapter(name)

    def _load(self, name: str, adapter: Path) -> None:
        with TORCH_RANDOM, self.lock:
            self.model = load_adapters(self.model, {name: adapter})

    def answers(self, question: Question, runs: Sequence[str] | None = None) -> Iterator[list[Answer]]:
        """The answers of `runs` (default: all). The same list is yielded after every token, one token longer.

        Closing the generator stops the work within one token. Raises RequestError for an unknown run,
        or for a problem that is too long for the model's positions.
        """
        runs = self.runs if runs is None else runs
        prompt = self._prompt(question.problem, question.max_new_tokens)
        answers = [Answer(run, i) for run in runs for i in range(question.samples)]
        requests = [
            Request(
                prompt_ids=prompt,
                adapter=self._adapter(answer.run),
                seed=question.seed * MAX_SAMPLES + answer.sample,
                temperature=question.temperature,
                max_new_tokens=int(question.max_new_tokens),
            )
            for answer in answers
        ]
        problem, judge = question.as_problem(), question.judge
        started = time.perf_counter()
        renderer = self.renderer
        with closing(
            stream(self.model, requests, stop_ids=renderer.stop_ids, pad_id=renderer.pad_id)
        ) as steps:
            while (step := self._next(steps)) is not None:
                written = dict(step)
                growing = {i: answer for i, answer in enumerate(answers) if answer.state == "writing"}
                for i, answer in growing.items():
                    answer.seconds = time.perf_counter() - started
                    self._extend(answer, written.get(i), question.max_new_tokens)
                if problem.answer is not None and judge is not None:
                    finished = [answer for answer in growing.values() if answer.state != "writing"]
                    _judge(finished, problem, judge)
                yield answers

    def tokens(self, problem: str, rows: Sequence[tuple[str, Sequence[int]]]) -> list[list[Token]]:
        """Score each (run, ids) row, an answer to `problem`, token by token under its run; one forward pass.

        Probabilities are at temperature 1, computed in float32 from the last hidden states. Logits exist
        for SCORED_AT_ONCE positions at a time.
        """
        prompt = self._prompt(problem, max(len(ids) for _, ids in rows))
        longest = len(prompt) + max(len(ids) for _, ids in rows)
        pad = self.renderer.pad_id
        sequences = [[*prompt, *ids] for _, ids in rows]
        ids_RL = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences])
        mask_RL = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        adapters = [self._adapter(run) for run, _ in rows]
        device = self.head.weight_VD.device
        with self.lock, torch.no_grad(), mixed(adapter_layers(self.model, adapters), adapters):
            h_RLD = hidden_states(self.model, input_ids=ids_RL.to(device), attention_mask=mask_RL.to(device))
        scored = []
        for (_, ids), h_LD in zip(rows, h_RLD, strict=True):
            first = len(prompt) - 1
            scored.append(self._score(list(ids), h_LD[first : first + len(ids)]))
        return scored

    def choices(self, question: Question, runs: Sequence[str] | None = None) -> dict[str, list[float]]:
        """Run -> the log-probability of each choice of a picked problem, asked with its task's template.

        `runs`: by default the page's own columns.

        Raises RequestError for a problem that is too long for the model's positions.
        """
        task = question.task
        own = task.template if task else None
        renderer = Renderer(self.renderer.tokenizer, own) if own else self.renderer
        examples = choice_examples(renderer, question.as_problem())
        runs = self.runs if runs is None else runs
        sets = [Texts(examples, self._adapter(run)) for run in runs]
        if sets[0].longest > self.positions:
            raise RequestError(
                f"problem: its {sets[0].longest} tokens exceed the model's {self.positions} positions"
            )
        found: dict[str, list[float]] = {}
        with self.lock:
            for places, logps in score_texts(self.model, sets, pad_id=renderer.pad_id):
                found |= {runs[i]: scores for i, scores in zip(places, logps, strict=True)}
        return {run: found[run] for run in runs}

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text as an answer, end token included."""
        return self.renderer.completion_ids(text)

    def answer_ids(self, answer: Answer) -> list[int]:
        """The ids of an answer as it was sampled, with its end token if the model ended it."""
        return list(answer.ids) if answer.end is None else [*answer.ids, answer.end]

    def _extend(self, answer: Answer, token: int | None, max_new_tokens: int) -> None:
        """Add one token to an answer, which is over with an end token, or where there is none."""
        if token is None or token in self.renderer.stop_ids:
            answer.state, answer.end = "done", token
            return
        answer.ids.append(token)
        answer.text = self.renderer.decode(answer.ids)
        if len(answer.ids) == max_new_tokens:
            answer.state = "truncated"

    def _next(self, steps: Iterator[list[tuple[int, int]]]) -> list[tuple[int, int]] | None:
        with self.lock:
            return next(steps, None)

    def _adapter(self, run: str) -> str | None:
        if run in self.held:
            return self.held[run]
        if run not in self.adapters:
            near = did_you_mean(str(run), self.adapters)
            raise RequestError(f"run {run!r} is not on this page ({', '.join(self.runs)}){near}")
        return self.adapters[run]

    def _prompt(self, problem: str, further: int) -> tuple[int, ...]:
        prompt = tuple(self.renderer.prompt_ids([{"role": "user", "content": problem}]))
        if len(prompt) + further > self.positions:
            raise RequestError(
                f"problem: its {len(prompt)} tokens and {int(further)} for the answer exceed the model's "
                f"{self.positions} positions; shorten it, or lower max_new_tokens"
            )
        return prompt

    def _score(self, ids: list[int], h_MD: torch.Tensor) -> list[Token]:
        names: dict[int, str] = {}

        def name(token: int) -> str:
            if token not in names:
                names[token] = self.renderer.tokenizer.decode([token])
            return names[token]

        scored = []
        pieces = self.renderer.pieces(ids)
        for start in range(0, len(ids), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            logp_MV = self.head.logits(h_MD[part]).log_softmax(-1)
            target_M1 = torch.tensor(ids[part], device=logp_MV.device)[:, None]
            p_M = logp_MV.gather(1, target_M1)[:, 0].exp().tolist()
            top_MK = logp_MV.topk(min(ALTERNATIVES, logp_MV.shape[1]))
            for text, p, values, indices in zip(
                pieces[part], p_M, top_MK.values.exp().tolist(), top_MK.indices.tolist(), strict=True
            ):
                top = tuple((name(i), value) for i, value in zip(indices, values, strict=True))
                scored.append(Token(text, p, top))
        return scored


def _judge(answers: Sequence[Answer], problem: Problem, judge: Judge) -> None:
    """Give each of the `answers` to one problem its verdict."""
    pairs = [(answer.text, problem) for answer in answers]
    for answer, verdict in zip(answers, judge.judge_many(pairs), strict=True):
        answer.verdict = verdict


def run_digest(folder: RunFolder) -> str:
    """What identifies a run in a vote, and in files of votes: a hash of its weights, or the base's name."""
    if not folder.has_adapter:
        return folder.recipe().model.name
    digest = hashlib.sha256()
    for file in sorted(Path(folder.adapter).glob("adapter_model*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
