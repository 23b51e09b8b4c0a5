"""Answers to multiple choice: each run chooses the text that it finds most probable. Nothing is generated.

The texts of one problem share a prefix, mostly the whole prompt. It is computed once per run, and its keys
and values are repeated for the problem's texts, whose ends then take a second, short forward pass:

    prefix   . . Q u e s t i o n         rows: (run, problem), padded on the left
    ends     a b c . | d e . . | f g h i     rows: their choices, padded on the right

Log-probabilities come from the loss engine, so no [tokens, vocabulary] tensor exists. Rows of several runs
share a batch, each with its own adapter. Without sharing, a problem of C choices would compute its prompt C
times.

Legend: R rows of prefixes, N rows of ends, T columns of prefixes, L columns of ends, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..data.batches import IGNORE
from ..data.templates import Example, Renderer, spaced
from ..errors import RequestError
from ..loss import Head, token_logps
from ..model.adapters import AdaptedLayer, adapter_layers, mixed
from ..model.generation_memory import PREFILL_TOKENS
from ..model.head import bare, head_of
from ..tasks.base import Attempt, Problem
from .attempts import Answers
from .protocol import GREEDY
from .run_set import Asked


def choose(
    model: Any, asked: Asked, work: Mapping[str, Answers], texts: Mapping[str, Sequence[Example]]
) -> None:
    """Score, judge and write the missing answers of all runs to one task, in batches across runs.

    `texts` are those of `choice_texts`.
    """
    from tqdm import tqdm

    jobs = [(name, problem) for name, answers in work.items() for problem, _ in answers.missing()]
    sets = [
        Texts(texts[problem.id], name if work[name].folder.has_adapter else None) for name, problem in jobs
    ]
    with tqdm(total=len(jobs), desc=asked.task.name, unit="problem") as bar:
        for places, logps in score_texts(model, sets, pad_id=asked.renderer.pad_id):
            for place, scores in zip(places, logps, strict=True):
                name, problem = jobs[place]
                text = asked.task.choose(scores, problem)
                (verdict,) = asked.task.judge_many([(text, problem)])
                example = texts[problem.id][problem.choices.index(text)]
                attempt = Attempt(problem.id, GREEDY, text, example.supervised, False, verdict, tuple(scores))
                work[name].add([attempt])
            bar.update(len(places))


def choice_texts(asked: Asked, room: int) -> dict[str, list[Example]]:
    """Problem -> its choices (see `choice_examples`).

    Raises RequestError for a choice that does not fit in `room` tokens, the positions of the model.
    """
    texts = {problem.id: choice_examples(asked.renderer, problem) for problem in asked.problems}
    for name, examples in texts.items():
        if (longest := max(len(example.ids) for example in examples)) > room:
            raise RequestError(
                f"{asked.task.name}, {name}: prompt and choice have {longest} tokens, but the model has only "
                f"{room} positions; leave the problem out, or lower evaluate.shots"
            )
    return texts


def choice_examples(renderer: Renderer, problem: Problem) -> list[Example]:
    """The text of each choice after the prompt; the tokens of the choice, or of the ending, are supervised.

    Prompt and choice are tokenized together and split where the prompt alone would end, as
    lm-evaluation-harness does. A space stands between them, unless the prompt ends in white space. Texts
    without a common first token (a sentence that begins with its gap) follow an end token.
    """
    prompt = renderer.prompt_text(problem.messages)
    found = []
    for choice in problem.choices:
        given, scored = (spaced(prompt, choice), problem.ending) if problem.ending else (prompt, choice)
        ids = renderer.text_ids(spaced(given, scored))
        length = min(len(renderer.text_ids(given.rstrip())), len(ids) - 1)
        found.append(Example(problem.id, tuple(ids), length))
    if len({example.ids[0] for example in found}) == 1:
        return found
    return [replace(e, ids=(renderer.eos_id, *e.ids), prompt_length=e.prompt_length + 1) for e in found]


@dataclass(frozen=True)
class Texts:
    """Texts that one run is asked about together; they share their first token at least."""

    examples: Sequence[Example]
    adapter: str | None

    @property
    def shared(self) -> int:
        """Length of the common prefix, ending before the first scored token of each text."""
        columns = zip(*(example.ids for example in self.examples), strict=False)
        alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        return min(alike, *(max(1, example.prompt_length) for example in self.examples))

    @property
    def longest(self) -> int:
        return max(len(example.ids) for example in self.examples)


def score_texts(
    model: Any, sets: Sequence[Texts], *, pad_id: int
) -> Iterator[tuple[list[int], list[list[float]]]]:
    """(places in `sets`, summed log-probability of each of their texts) for one batch after another.

    The longest come first, so a batch that does not fit in memory fails at once.
    """
    layers, head = adapter_layers(model, (texts.adapter for texts in sets)), head_of(model)
    for places in _batches(sets):
        some = [sets[i] for i in places]
        logp_N = _score(model, layers, head, some, pad_id).split([len(texts.examples) for texts in some])
        yield places, [part.tolist() for part in logp_N]


def _batches(sets: Sequence[Texts]) -> Iterator[list[int]]:
    """Places in `sets`, similar lengths together; at most PREFILL_TOKENS with padding, or one set alone."""
    batch: list[int] = []
    for place in sorted(range(len(sets)), key=lambda i: -sets[i].longest):
        rows = sum(len(sets[i].examples) for i in [*batch, place])
        if batch and rows * sets[batch[0]].longest > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.no_grad()
def _score(
    model: Any, layers: Sequence[AdaptedLayer], head: Head, sets: Sequence[Texts], pad_id: int
) -> Tensor:
    """Summed log-probabilities [N] of the supervised tokens of all texts."""
    from transformers import DynamicCache

    decoder, device = bare(model).get_decoder(), head.weight_VD.device
    cache = DynamicCache()  # no config: no layer cuts its past to a sliding window

    def forward(ids: Tensor, mask: Tensor, positions: Tensor, adapters: Sequence[str | None]) -> Tensor:
        with mixed(layers, adapters):
            return decoder(
                input_ids=ids.to(device),
                attention_mask=mask.long().to(device),
                position_ids=positions.clamp(min=0).to(device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    shared_R = torch.tensor([texts.shared for texts in sets])
    T = int(shared_R.max())
    position_RT = torch.arange(T) - (T - shared_R[:, None])
    prefixes = [texts.examples[0].ids[: texts.shared] for texts in sets]
    prefix_RT = torch.tensor([[pad_id] * (T - len(ids)) + list(ids) for ids in prefixes])
    h_RTD = forward(prefix_RT, position_RT >= 0, position_RT, [texts.adapter for texts in sets])

    owner_N = torch.tensor([r for r, texts in enumerate(sets) for _ in texts.examples])
    ends = [(e.ids[t.shared :], e.prompt_length - t.shared) for t in sets for e in t.examples]
    length_N1 = torch.tensor([len(ids) for ids, _ in ends])[:, None]
    L = int(length_N1.max())
    end_NL = torch.tensor([list(ids) + [pad_id] * (L - len(ids)) for ids, _ in ends])
    unscored_N1 = torch.tensor([unscored for _, unscored in ends])[:, None]
    column_L = torch.arange(L)
    scored_NL = (column_L >= unscored_N1) & (column_L < length_N1)
    h_N1D = h_RTD[:, -1:][owner_N.to(device)]
    h_NLD = h_N1D
    if L > 1:  # the last token of a text predicts nothing
        cache.batch_select_indices(owner_N.to(device))
        mask = torch.cat([position_RT[owner_N] >= 0, column_L[:-1] < length_N1 - 1], 1)
        positions = shared_R[owner_N][:, None] + column_L[:-1]
        adapters = [sets[r].adapter for r in owner_N.tolist()]
        h_NLD = torch.cat([h_N1D, forward(end_NL[:, :-1], mask, positions, adapters)], 1)
    targets_N = torch.where(scored_NL, end_NL, IGNORE).flatten().to(device)
    scores = token_logps(h_NLD.flatten(0, 1).to(head.weight_VD.dtype), targets=targets_N, **head.arguments())
    sum_N = torch.zeros(len(ends), dtype=scores.logp.dtype, device=device)
    return sum_N.index_add(0, scores.index // L, scores.logp).cpu()
