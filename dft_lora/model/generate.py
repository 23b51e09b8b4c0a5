"""Batched generation for evaluation and the page: several adapters, one base, one loop.

A decoding loop of our own rather than `model.generate`, because

- n samples of a prompt cost one prefill: its cache rows are repeated;
- a row that has ended leaves the batch, and waiting requests take its place;
- every row has its own random stream, so a draw depends on its request and never on its neighbours;
- rows of different adapters, greedy and sampled, share a batch;
- closing the generator is the stop button; no hook lives between two forwards.

Shapes: R rows, T columns of the cache (cache.py draws it), V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RequestError, RunError
from .adapters import adapter_layers, mixed


@dataclass(frozen=True)
class Request:
    """One answer wanted. `adapter` None is the bare base, `temperature` 0 is greedy.

    The random stream belongs to (seed, prompt): samples of one prompt need different seeds, different
    prompts may share one, and two adapters asked with the same seed draw the same uniform numbers.
    """

    prompt_ids: tuple[int, ...]
    adapter: str | None
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self):
        if not self.prompt_ids:
            raise RequestError("prompt_ids is empty: a prompt has at least one token")
        if self.seed < 0:
            raise RequestError(f"seed {self.seed}: give 0 or more")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p}: give a number above 0, at most 1")
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens {self.max_new_tokens}: give 1 or more")


@dataclass
class Completion:
    """An answer: its tokens without the end token; `finished` is False where max_new_tokens cut it."""

    ids: list[int]
    finished: bool


def generate(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    batch_rows: int = 64,
    on_progress: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """The completions of `requests`, in their order; at most `batch_rows` are decoded at a time.

    `on_progress(i, completion)` is called as soon as request i is done: a bar, or a file to resume from.
    Raises ModelError for an unknown adapter, RunError when the model returns logits that are not finite.
    """
    ids: list[list[int]] = [[] for _ in requests]
    done: list[Completion | None] = [None] * len(requests)
    for step in _decode(model, requests, stop_ids, pad_id, batch_rows):
        for index, token in step.tokens:
            ids[index].append(token)
        for index in step.ended:
            done[index] = Completion(ids[index], finished=len(ids[index]) < requests[index].max_new_tokens)
            if on_progress:
                on_progress(index, done[index])
    return done


def rows_that_fit(model: nn.Module, tokens: int) -> int:
    """Rows of `tokens` tokens whose cache fits in half of the free memory (4 GB on a CPU), 1 to 1024."""
    config, weight = (
        model.config.get_text_config(),
        next(p for p in model.parameters() if p.is_floating_point()),
    )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = tokens * config.num_hidden_layers * 2 * heads * width * weight.element_size()
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else 2**33
    return int(min(1024, max(1, free / 2 // row_bytes)))


def stream(
    model: nn.Module, requests: Sequence[Request], *, stop_ids: Collection[int], pad_id: int
) -> Iterator[list[tuple[int, int]]]:
    """Decode `requests` as one batch; each step gives [(request index, token id)] of the rows alive,
    in no fixed order.

    End tokens are not given: a row that stops before its max_new_tokens has ended by itself.
    Closing the generator stops the work at once; the model is untouched between two steps.
    """
    with closing(_decode(model, requests, stop_ids, pad_id, batch_rows=len(requests))) as steps:
        for step in steps:
            yield step.tokens


def draw(logits_RV: Tensor, uniform_R: Tensor, temperature_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Token ids [R]: row i by inversion, the first id whose cumulative probability exceeds uniform_R[i].

    One number in [0, 1) decides a row, so it can come from the row's own stream whatever the batch.
    Temperature 0 takes the arg max. top_p keeps the smallest set of most probable tokens whose mass
    reaches top_p (Holtzman et al. 2020, arXiv 1904.09751) and draws from it, renormalised.
    Raises RunError where the logits are not finite.
    """
    logits_RV = logits_RV.float()
    peak_R, ids_R = logits_RV.max(-1)
    if not peak_R.isfinite().all():
        raise RunError("the model returned logits that are not finite: compute in bfloat16 or float32")
    hot = (temperature_R > 0).nonzero()[:, 0]
    if len(hot):
        p_HV = torch.softmax(logits_RV[hot] / temperature_R[hot, None].float(), -1)
        cut = (top_p_R[hot] < 1).nonzero()[:, 0]
        if len(cut):
            p_HV[cut] = _nucleus(p_HV[cut], top_p_R[hot][cut])
        # float64: in float32 a vocabulary of 152k loses its tail to rounding of the cumulative sum
        cumulative_HV = p_HV.cumsum(-1, dtype=torch.float64)
        point_H1 = uniform_R[hot, None] * cumulative_HV[:, -1:]
        ids_R[hot] = torch.searchsorted(cumulative_HV, point_H1, right=True)[:, 0]
    return ids_R


def _nucleus(p_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """`p_RV` with the tokens outside the nucleus at 0, not renormalised."""
    sorted_RV, order_RV = p_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    inside_RV = before_RV < top_p_R[:, None]
    inside_RV[:, 0] = True
    return torch.zeros_like(p_RV).scatter(-1, order_RV, sorted_RV * inside_RV)


@dataclass
class _Row:
    """A request being decoded: `length` columns of the cache are its own, `last` is fed next."""

    index: int
    request: Request
    uniform: np.random.Generator
    length: int = 0
    last: int = -1
    made: int = 0


@dataclass
class _Step:
    tokens: list[tuple[int, int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


def _decode(model, requests, stop_ids, pad_id, batch_rows) -> Iterator[_Step]:
    """Fill free places from the waiting groups, else feed every row its last token; draw; let rows go."""
    batch = _Batch(model, requests, pad_id)
    waiting = _groups(requests, batch_rows)
    stops = frozenset(stop_ids)
    while waiting or batch.rows:
        rows = batch.rows
        free = batch_rows - len(rows)
        # A prefill costs a forward of its own: it waits until a quarter of the places are free.
        if waiting and (not rows or 4 * free >= batch_rows) and len(waiting[0]) <= free:
            rows = []
            while waiting and len(rows) + len(waiting[0]) <= free:
                rows += [_Row(i, requests[i], random_stream(requests[i])) for i in waiting.popleft()]
            logits_RV = batch.admit(rows)
        else:
            logits_RV = batch.advance()
        step, gone = _Step(), set()
        for row, token in zip(rows, _choose(logits_RV, rows), strict=True):
            row.last, row.made = token, row.made + 1
            if token not in stops:
                step.tokens.append((row.index, token))
            if token in stops or row.made == row.request.max_new_tokens:
                gone.add(row.index)
        step.ended = sorted(gone)
        if gone:
            batch.release(gone)
        yield step


def _groups(requests, batch_rows) -> deque[list[int]]:
    """Indices of requests that share (prompt, adapter), hence a prefill; longest prompts first.

    Neighbours in length waste little padding, and a batch that does not fit in memory fails at once.
    A group never exceeds `batch_rows`.
    """

    def key(i):
        prompt, adapter = requests[i].prompt_ids, requests[i].adapter
        return -len(prompt), prompt, adapter is not None, adapter or ""

    groups = [list(group) for _, group in groupby(sorted(range(len(requests)), key=key), key)]
    return deque(g[i : i + batch_rows] for g in groups for i in range(0, len(g), batch_rows))


def random_stream(request: Request) -> np.random.Generator:
    """The random stream of a request: the same on every device and in every company."""
    return np.random.default_rng((request.seed, *request.prompt_ids))


def _choose(logits_RV: Tensor, rows: list[_Row]) -> list[int]:
    def column(values):
        return torch.tensor(values, dtype=torch.float64).to(logits_RV.device)

    uniform_R = column([row.uniform.random() for row in rows])
    temperature_R = column([row.request.temperature for row in rows])
    top_p_R = column([row.request.top_p for row in rows])
    return draw(logits_RV, uniform_R, temperature_R, top_p_R).tolist()


class _Batch:
    """The rows alive and their ragged, right-aligned cache."""

    def __init__(self, model, requests, pad_id):
        from .cache import RaggedCache

        self.model, self.pad_id = model, pad_id
        self.device = next(model.parameters()).device
        self.layers = adapter_layers(model, (r.adapter for r in requests))
        self.rows: list[_Row] = []
        self.cache = RaggedCache()

    def admit(self, rows: list[_Row]) -> Tensor:
        """Prefill each distinct (prompt, adapter) of `rows` once and add the rows; their logits [R, V]."""
        from transformers import DynamicCache

        keys = [(row.request.prompt_ids, row.request.adapter) for row in rows]
        place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        width = max(len(prompt) for prompt, _ in place)
        ids_RT = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p, _ in place])
        cache = DynamicCache()  # no config: no layer cuts its past to a sliding window, see cache.py
        lengths = [len(prompt) for prompt, _ in place]
        logits_RV = self._forward(ids_RT, lengths, [adapter for _, adapter in place], cache)
        for row in rows:
            row.length = len(row.request.prompt_ids)
        repeat_R = torch.tensor([place[key] for key in keys], device=self.device)
        self.cache.add(cache, repeat_R)
        self.rows = self.rows + rows
        return logits_RV[repeat_R]

    def advance(self) -> Tensor:
        """Feed every row its last token; the logits of the next one [R, V]."""
        for row in self.rows:
            row.length += 1
        ids_R1 = torch.tensor([[row.last] for row in self.rows])
        adapters = [row.request.adapter for row in self.rows]
        return self._forward(ids_R1, [row.length for row in self.rows], adapters, self.cache)

    def release(self, indices: set[int]) -> None:
        """Let the rows of these requests go; rows from the end take their places."""
        stay = len(self.rows) - len(indices)
        holes = [i for i, row in enumerate(self.rows[:stay]) if row.index in indices]
        movers = [i for i, row in enumerate(self.rows[stay:], stay) if row.index not in indices]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        self.rows = self.rows[:stay]
        columns = max((row.length for row in self.rows), default=0)
        holes_N, movers_N = (
            torch.tensor(places, dtype=torch.long, device=self.device) for places in (holes, movers)
        )
        self.cache.drop(holes_N, movers_N, stay, columns)

    def _forward(self, ids_RT: Tensor, lengths: list[int], adapters: list[str | None], cache) -> Tensor:
        """Logits [R, V] at the last column. `lengths`: columns in use by each row, `ids_RT` included."""
        columns = cache.get_seq_length() + ids_RT.shape[1]
        length_R1 = torch.tensor(lengths, device=self.device)[:, None]
        position_RT = torch.arange(columns, device=self.device) - (columns - length_R1)
        # no_grad, not inference_mode: a buffer made under inference_mode would spoil a later training step
        with torch.no_grad(), mixed(self.layers, adapters):
            out = self.model(
                input_ids=ids_RT.to(self.device),
                attention_mask=(position_RT >= 0).long(),
                position_ids=position_RT[:, -ids_RT.shape[1] :].clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1]
