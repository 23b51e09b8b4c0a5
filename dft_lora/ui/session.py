"""What the page asks of the models: answers streamed in step, and the probability of every token.

One base is loaded once, with the adapters of all runs over it; answers of all columns are one batch.
The lock is held for one forward pass and never across a `yield`: a generator that a closed page
leaves behind holds nothing, and two of them may alternate, since no hook outlives a forward.

Legend: R rows, L positions, T scored tokens, D hidden width, V vocabulary, K alternatives.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import RequestError, did_you_mean
from ..evaluation.sampling import renderer_of, same_base, unique_names
from ..model.adapters import adapter_layers, mixed
from ..model.generate import Request, stream
from ..model.head import check_head, hidden_states
from ..model.load import load_adapters, load_base
from ..run_folder import RunFolder
from ..tasks.base import Verdict
from ..tasks.judge import judge

MAX_COLUMNS = 4
MAX_CHARACTERS = 8_000
MAX_LINES = 400
MAX_SAMPLES = 64
ALTERNATIVES = 5
SCORED_AT_ONCE = 64  # positions whose logits [T, V] exist at a time: 39 MB at V = 152k


@dataclass(frozen=True)
class Question:
    """What a person, or a client of the endpoints, asks. Every field is checked: it comes from outside.

    `samples` answers a column; `reference` is the short answer that they are judged by, if any.
    """

    problem: str
    reference: str = ""
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    samples: int = 1

    def __post_init__(self):
        check_text("problem", self.problem)
        if not self.problem.strip():
            raise RequestError("problem is empty: write one, or pick one")
        check_text("reference", self.reference)
        check_number("temperature", self.temperature, 0, 2)
        check_number("max_new_tokens", self.max_new_tokens, 1, 4096, whole=True)
        check_number("seed", self.seed, 0, 2**31 - 1, whole=True)
        check_number("samples", self.samples, 1, MAX_SAMPLES, whole=True)


def check_text(name: str, value: Any) -> None:
    """Raises RequestError for what is not text, or is longer than a page of problems can be."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is {type(value).__name__}, not text")
    if len(value) > MAX_CHARACTERS:
        raise RequestError(f"{name} has {len(value):,} characters; at most {MAX_CHARACTERS:,}")
    if value.count("\n") >= MAX_LINES:
        raise RequestError(f"{name} has {value.count(chr(10)) + 1:,} lines; at most {MAX_LINES}")


def check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raises RequestError outside [least, most]; NaN lies outside."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or (whole and value != int(value)):
        raise RequestError(f"{name}: give a{' whole' if whole else ''} number from {least} to {most}")


@dataclass
class Answer:
    """One row of the batch while it is written.

    `state`: writing; done (it ended by itself); cut (at max_new_tokens); stopped (by the person).
    """

    run: str
    sample: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    state: Literal["writing", "done", "cut", "stopped"] = "writing"
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
    """A token of a text under one run: the text it adds, its probability, the likeliest alternatives."""

    text: str
    probability: float
    top: tuple[tuple[str, float], ...]

    @property
    def weight(self) -> float:
        """DFT's weight on the token's loss: sg(p) (arXiv 2508.05629, eq. 9); plain SFT's is 1."""
        return self.probability

    @property
    def sft_pull(self) -> float:
        """L1 norm of the token's logit gradient under SFT, 2 (1 - p): at most 2."""
        return 2 * (1 - self.probability)

    @property
    def dft_pull(self) -> float:
        """The same under DFT, 2 p (1 - p): at most 1/2, and near 0 where the token is a surprise."""
        return self.weight * self.sft_pull

    def as_dict(self) -> dict[str, Any]:
        """One entry of the `/tokens` endpoint."""
        return {
            "token": self.text,
            "probability": self.probability,
            "weight": self.weight,
            "top": [list(pair) for pair in self.top],
        }


class Session:
    """The runs of a page over one base. Raises RequestError when they do not fit on one page."""

    def __init__(self, folders: Sequence[RunFolder]):
        if not 1 <= len(folders) <= MAX_COLUMNS:
            raise RequestError(f"RUN_DIR: {len(folders)} runs; a page shows 1 to {MAX_COLUMNS}")
        recipes = [folder.recipe() for folder in folders]
        same_base(folders, recipes)
        self.renderer = renderer_of(folders, recipes)
        names = unique_names(folders)
        adapters = {n: f.adapter for n, f in zip(names, folders, strict=True) if f.has_adapter}
        base, self.hardware = load_base(recipes[0].model, for_answers=True)
        self.head = check_head(base)
        self.model = load_adapters(base, adapters)
        self.adapters: dict[str, str | None] = {n: n if n in adapters else None for n in names}
        self.identities = {n: identity(f) for n, f in zip(names, folders, strict=True)}
        if None not in self.adapters.values() and len(names) < MAX_COLUMNS:
            self.adapters = {"base": None, **self.adapters}
            self.identities = {"base": recipes[0].model.name, **self.identities}
        self.positions: int = base.config.get_text_config().max_position_embeddings
        self._lock = threading.Lock()

    @property
    def runs(self) -> list[str]:
        """The columns' names, in order."""
        return list(self.adapters)

    def answers(self, question: Question, runs: Sequence[str] | None = None) -> Iterator[list[Answer]]:
        """The answers of `runs` (default: all), yielded after every token: the same list, further on.

        Closing the generator stops the work within one token. Raises RequestError for an unknown run
        or a problem that does not fit the model's positions.
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
        started = time.perf_counter()
        renderer = self.renderer
        with closing(
            stream(self.model, requests, stop_ids=renderer.stop_ids, pad_id=renderer.pad_id)
        ) as steps:
            while (step := self._next(steps)) is not None:
                written = dict(step)
                for i, answer in enumerate(answers):
                    if answer.state != "writing":
                        continue
                    answer.seconds = time.perf_counter() - started
                    if i in written:
                        answer.ids.append(written[i])
                        answer.text = renderer.decode(answer.ids)
                        full = len(answer.ids) == question.max_new_tokens
                        answer.state = "cut" if full else "writing"
                    else:
                        answer.state = "done"
                    if answer.state != "writing" and question.reference.strip():
                        answer.verdict = judge(answer.text, question.reference)
                yield answers

    def tokens(self, problem: str, rows: Sequence[tuple[str, Sequence[int]]]) -> list[list[Token]]:
        """Each (run, ids) row of an answer to `problem`, token by token under that run, in one forward.

        The probabilities are those of the model at temperature 1, computed in float32 from its last
        hidden states; logits exist for SCORED_AT_ONCE positions at a time.
        """
        prompt = self._prompt(problem, max(len(ids) for _, ids in rows))
        longest = len(prompt) + max(len(ids) for _, ids in rows)
        pad = self.renderer.pad_id
        sequences = [[*prompt, *ids] for _, ids in rows]
        ids_RL = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences])
        mask_RL = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        adapters = [self._adapter(run) for run, _ in rows]
        device = self.head.weight_VD.device
        with self._lock, torch.no_grad(), mixed(adapter_layers(self.model, adapters), adapters):
            h_RLD = hidden_states(self.model, input_ids=ids_RL.to(device), attention_mask=mask_RL.to(device))
        scored = []
        for (_, ids), h_LD in zip(rows, h_RLD, strict=True):
            first = len(prompt) - 1
            scored.append(self._score(list(ids), h_LD[first : first + len(ids)]))
        return scored

    def text_ids(self, text: str) -> list[int]:
        """A text as an answer's ids, its end token included."""
        return self.renderer.completion_ids(text)

    def answer_ids(self, answer: Answer) -> list[int]:
        """The ids of an answer as it was sampled, its end token included unless it was cut."""
        return [*answer.ids, self.renderer.eos_id] if answer.state == "done" else list(answer.ids)

    def _next(self, steps: Iterator[list[tuple[int, int]]]) -> list[tuple[int, int]] | None:
        with self._lock:
            return next(steps, None)

    def _adapter(self, run: str) -> str | None:
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

    def _score(self, ids: list[int], h_TD: torch.Tensor) -> list[Token]:
        names: dict[int, str] = {}

        def name(token: int) -> str:
            if token not in names:
                names[token] = self.renderer.tokenizer.decode([token])
            return names[token]

        scored = []
        pieces = self._pieces(ids)
        for start in range(0, len(ids), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            logp_TV = self.head.logits(h_TD[part]).log_softmax(-1)
            target_T1 = torch.tensor(ids[part], device=logp_TV.device)[:, None]
            p_T = logp_TV.gather(1, target_T1)[:, 0].exp().tolist()
            top_TK = logp_TV.topk(min(ALTERNATIVES, logp_TV.shape[1]))
            for text, p, values, indices in zip(
                pieces[part], p_T, top_TK.values.exp().tolist(), top_TK.indices.tolist(), strict=True
            ):
                top = tuple((name(i), value) for i, value in zip(indices, values, strict=True))
                scored.append(Token(text, p, top))
        return scored

    def _pieces(self, ids: list[int], window: int = 8) -> list[str]:
        """The text that each token adds, special tokens by name.

        A character may be spread over several tokens: it comes with the last of them. Each piece is
        a difference of two decodings that begin at the same token, so that tokenizers which drop a
        leading space do so in both.
        """
        decode, special = self.renderer.tokenizer.decode, set(self.renderer.tokenizer.all_special_ids)
        pieces = []
        for end in range(1, len(ids) + 1):
            if ids[end - 1] in special:
                pieces.append(decode([ids[end - 1]]))
                continue
            start = max(0, end - window)
            before, after = (decode(ids[start:stop]).rstrip("\ufffd") for stop in (end - 1, end))
            pieces.append(after[len(before) :])
        return pieces


def identity(folder: RunFolder) -> str:
    """What names a run in a vote for good: its adapter's digest, or its base where it has none."""
    if not folder.has_adapter:
        return folder.recipe().model.name
    digest = hashlib.sha256()
    for file in sorted(Path(folder.adapter).glob("adapter_model*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
