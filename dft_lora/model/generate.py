"""Batched generation for evaluation and the page: several adapters, one base, one loop.

A decoding loop of our own rather than `model.generate`, because

- n samples of a prompt cost one prefill: its cache rows are repeated;
- what all prompts begin with (a system text, worked examples) is prefilled once;
- a row that has ended leaves the batch, and waiting requests take its place;
- every row has its own random stream, so a draw depends on its request and, but for rounding, never on its
  neighbours;
- rows of different adapters, greedy and sampled, share a batch;
- closing the generator is the stop button; no hook lives between two forwards.

Shapes: R rows, T columns of the cache (cache.py draws it), D hidden width, V vocabulary; a row of V numbers
is N blocks of B; H sampled rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RequestError, RunError
from ..loss import Head
from .accelerator import accelerator
from .adapters import adapter_layers, mixed
from .generation_memory import LOGITS_BYTES, PREFILL_TOKENS, Bound, rows_that_fit, sampler_rows
from .head import bare, head_of

if TYPE_CHECKING:
    from transformers import Cache

SHARED_FROM = 64
"""Tokens that all prompts must begin with; fewer do not repay a forward of their own."""
BLOCK = 512  # numbers of a row that are reduced at a time: the largest, or the sum, of each block comes first


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
    """An answer: its tokens without the end token; `finished` is False where max_new_tokens cut it.

    The tokens of a stop text are part of it.
    """

    ids: list[int]
    finished: bool
    end: int | None = None
    """The end token that was drawn, where the engine says which."""


def generate(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    batch_rows: int | None = None,
    ends: Callable[[Sequence[int]], bool] | None = None,
    on_progress: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """The completions of `requests`, in their order; at most `batch_rows` are decoded at a time.

    None: as many as fit in half of the free memory (generation_memory.py).

    `ends(ids)` is asked after each token of an answer, which is over once it says so: a stop text.
    `on_progress(i, completion)` is called as soon as request i is done: a bar, or a file to resume from.
    Raises ModelError for an unknown adapter, RunError when the model returns logits that are not finite.
    """
    ids: list[list[int]] = [[] for _ in requests]
    done: dict[int, Completion] = {}
    for step in _decode(model, requests, stop_ids, pad_id, batch_rows, ends):
        for index, token in step.tokens:
            ids[index].append(token)
        for index, finished, end in step.ended:
            done[index] = Completion(ids[index], finished, end)
            if on_progress:
                on_progress(index, done[index])
    return [done[index] for index in range(len(requests))]


def stream(
    model: nn.Module, requests: Sequence[Request], *, stop_ids: Collection[int], pad_id: int
) -> Iterator[list[tuple[int, int]]]:
    """Decode `requests` as one batch; each step gives [(request index, token id)] of the rows alive,
    in no fixed order. A row that ends before its max_new_tokens gives the end token last.

    Closing the generator stops the work at once; the model is untouched between two steps.
    """
    with closing(_decode(model, requests, stop_ids, pad_id, batch_rows=len(requests))) as steps:
        for step in steps:
            yield step.tokens + [(index, end) for index, _, end in step.ended if end is not None]


def draw(logits_RV: Tensor, uniform_R: Tensor, temperature_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Token ids [R]: row i by inversion, the first id whose cumulative probability exceeds uniform_R[i].

    One number in [0, 1) decides a row, so it can come from the row's own stream whatever the batch.
    Temperature 0 takes the arg max. top_p keeps the smallest set of most probable tokens whose mass
    reaches top_p (Holtzman et al. 2020, arXiv 1904.09751) and draws from it, renormalised.
    Raises RunError where the logits are not finite.
    """
    peak_R, ids_R = _largest(logits_RV)
    if not peak_R.isfinite().all():
        raise RunError("the model returned logits that are not finite: compute in bfloat16 or float32")
    hot_H = (temperature_R > 0).nonzero()[:, 0]
    rows = min(len(hot_H), sampler_rows(logits_RV.device, logits_RV.shape[1]))
    # Made once and reused: fresh pages for every few rows cost more than the arithmetic.
    z_HV, p_HV, sum_HV = (
        logits_RV.new_empty(rows, logits_RV.shape[1], dtype=dtype)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    for some_H in hot_H.split(rows) if rows else ():
        n = len(some_H)
        z_HV[:n] = logits_RV[some_H]
        p = _probabilities(z_HV[:n], temperature_R[some_H], top_p_R[some_H], p_HV[:n])
        ids_R[some_H] = _invert(p, uniform_R[some_H], sum_HV[:n])
    return ids_R


def _blocks(x_RV: Tensor) -> Tensor:
    """[R, J, W]; W is 512 or the largest power of two below that divides V (Qwen's 151,936 = 1,187 * 128)."""
    return x_RV.unflatten(-1, (-1, math.gcd(x_RV.shape[-1], BLOCK)))


def _largest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`x_RV.max(-1)`, the first of equals included: 3 times as fast, because only `amax` is vectorised."""
    x_RJW = _blocks(x_RV)
    peak_R, block_R = x_RJW.amax(-1).max(-1)
    inside_RW = x_RJW[torch.arange(len(x_RJW), device=x_RV.device), block_R]
    return peak_R, block_R * x_RJW.shape[-1] + inside_RW.max(-1).indices


def _probabilities(z_HV: Tensor, temperature_H: Tensor, top_p_H: Tensor, out_HV: Tensor) -> Tensor:
    """softmax(z / temperature) in `out_HV`, 0 outside the nucleus and not renormalised; `z_HV` is spoilt."""
    if (temperature_H != 1).any():
        z_HV.div_(temperature_H[:, None].float())
    torch.softmax(z_HV, -1, out=out_HV)
    cut = (top_p_H < 1).nonzero()[:, 0]
    if len(cut):
        out_HV[cut] = _nucleus(out_HV[cut], top_p_H[cut])
    return out_HV


def _invert(p_HV: Tensor, uniform_H: Tensor, work_HV: Tensor) -> Tensor:
    """searchsorted(p.cumsum(-1), uniform * p.sum(-1), right=True), all in float64; overwrites `work_HV`.

    In float32 a vocabulary of 152k would lose its tail to rounding of the cumulative sum. The block comes
    first, by the sums of the blocks, then the place inside it: no cumulative sum over a whole row.
    """
    p_HJW = _blocks(work_HV.copy_(p_HV))
    upto_HJ = p_HJW.sum(-1).cumsum(-1)
    point_H1 = uniform_H[:, None] * upto_HJ[:, -1:]
    block_H1 = torch.searchsorted(upto_HJ, point_H1, right=True)
    before_H1 = torch.where(block_H1 > 0, upto_HJ.gather(1, (block_H1 - 1).clamp(min=0)), 0)
    inside_HW = p_HJW[torch.arange(len(p_HJW), device=p_HV.device), block_H1[:, 0]]
    passed_HW = before_H1 + inside_HW.cumsum(-1) <= point_H1
    # A block's sum and its last cumulative sum may differ in the last bit: stay at its last possible token.
    possible_HW = torch.arange(inside_HW.shape[1], device=p_HV.device) * (inside_HW > 0)
    place_H = passed_HW.sum(-1).minimum(possible_HW.amax(-1))
    return block_H1[:, 0] * p_HJW.shape[-1] + place_H


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
    ids: list[int] = field(default_factory=list)


@dataclass
class _Step:
    tokens: list[tuple[int, int]] = field(default_factory=list)
    ended: list[tuple[int, bool, int | None]] = field(default_factory=list)
    """Requests that are done: whether they ended before max_new_tokens cut them, and their end token."""


def _decode(
    model: nn.Module,
    requests: Sequence[Request],
    stop_ids: Collection[int],
    pad_id: int,
    batch_rows: int | None,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> Generator[_Step, None, None]:
    """Fill free places from the waiting groups, else feed every row its last token; draw; let rows go."""
    batch = _Batch(model, requests, pad_id)
    if batch_rows is None:
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=1)
        adapters = {r.adapter for r in requests}
        batch_rows = rows_that_fit(model, longest, kept=len(batch.prefix) * len(adapters))
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
            h_RD = batch.admit(rows)
        else:
            h_RD = batch.advance()
        step = _Step()
        for row, token in zip(rows, _choose(batch.head, h_RD, rows), strict=True):
            row.last = token
            if token in stops:
                step.ended.append((row.index, True, token))
                continue
            row.ids.append(token)
            step.tokens.append((row.index, token))
            if ends is not None and ends(row.ids):
                step.ended.append((row.index, True, None))
            elif len(row.ids) == row.request.max_new_tokens:
                step.ended.append((row.index, False, None))
        step.ended.sort()
        if step.ended:
            batch.release({index for index, _, _ in step.ended})
        yield step


def _groups(requests: Sequence[Request], batch_rows: int) -> deque[list[int]]:
    """Indices of requests that share (prompt, adapter), hence a prefill; longest prompts first.

    Neighbours in length waste little padding, and a batch that does not fit in memory fails at once.
    A group never exceeds `batch_rows`.
    """

    def key(i: int) -> tuple[int, tuple[int, ...], bool, str]:
        prompt, adapter = requests[i].prompt_ids, requests[i].adapter
        return -len(prompt), prompt, adapter is not None, adapter or ""

    groups = [list(group) for _, group in groupby(sorted(range(len(requests)), key=key), key)]
    return deque(g[i : i + batch_rows] for g in groups for i in range(0, len(g), batch_rows))


def random_stream(request: Request) -> np.random.Generator:
    """The random stream of a request: the same on every device and in every company."""
    return np.random.default_rng((request.seed, *request.prompt_ids))


def _choose(head: Head, h_RD: Tensor, rows: list[_Row]) -> list[int]:
    """A token for each row; the logits of a block of rows exist at a time.

    Tokens are drawn in float64: on the CPU, where the device has none.
    """
    exact = accelerator(h_RD.device).widest_float == torch.float64
    where = h_RD.device if exact else torch.device("cpu")
    block = max(1, LOGITS_BYTES // head.row_bytes)
    ids: list[int] = []
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        uniform_R, temperature_R, top_p_R = torch.tensor(
            [(row.uniform.random(), row.request.temperature, row.request.top_p) for row in some],
            dtype=torch.float64,
            device=where,
        ).unbind(1)
        logits_RV = head.raw_logits(h_RD[start : start + block]).to(where)
        ids += draw(logits_RV, uniform_R, temperature_R, top_p_R).tolist()
    return ids


def shared_prefix(requests: Iterable[Request]) -> tuple[int, ...]:
    """What all prompts begin with, if that is worth a prefill of its own; every prompt keeps a token."""
    asked = {(request.adapter, request.prompt_ids) for request in requests}
    prompts = {prompt for _, prompt in asked}
    if len(asked) == len({adapter for adapter, _ in asked}):  # each adapter answers one prompt
        return ()
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    least = min(map(len, prompts)) - 1
    length = next((i for i in range(least) if first[i] != last[i]), least)
    return first[:length] if length >= SHARED_FROM else ()


_Key = tuple[tuple[int, ...], str | None]
"""(prompt, adapter): what a prefill depends on."""


class _Batch:
    """The rows alive and their ragged, right-aligned cache."""

    def __init__(self, model: nn.Module, requests: Sequence[Request], pad_id: int):
        from .cache import RaggedCache

        self.decoder, self.head, self.pad_id = bare(model).get_decoder(), head_of(model), pad_id
        self.device = next(model.parameters()).device
        self.layers = adapter_layers(model, (r.adapter for r in requests))
        self.rows: list[_Row] = []
        self.cache = RaggedCache()
        self.prefix = shared_prefix(requests)
        longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=1)
        self.prefix_tokens = len(self.prefix) * Bound(model).share_of_a_copy(longest)
        self.prefixes: dict[str | None, Cache] = {}

    def admit(self, rows: list[_Row]) -> Tensor:
        """Add rows, prefilling each distinct (prompt, adapter) once; their last hidden states [R, D].

        Rows of one (prompt, adapter) are neighbours. The prefill goes in chunks of a bounded size.
        """
        keys = [(row.request.prompt_ids, row.request.adapter) for row in rows]
        for row in rows:
            row.length = len(row.request.prompt_ids)
        all_rows = len(self.rows) + len(rows)
        h_ND = [self._prefill(some, keys, all_rows) for some in self._chunks(list(dict.fromkeys(keys)))]
        self.rows = self.rows + rows
        return torch.cat(h_ND)

    def _prefill(self, distinct: list[_Key], keys: list[_Key], all_rows: int) -> Tensor:
        """Prefill `distinct` and add a row to the cache for each time that one is among `keys`."""
        place = {key: i for i, key in enumerate(distinct)}
        lengths = [len(prompt) for prompt, _ in distinct]
        width = max(lengths) - len(self.prefix)
        ids_RT = torch.tensor([[self.pad_id] * (width - len(p)) + list(p[-width:]) for p, _ in distinct])
        adapters = [adapter for _, adapter in distinct]
        cache = self._after_prefix(adapters, lengths)
        h_RD = self._forward(ids_RT, lengths, adapters, cache)
        repeat_N = torch.tensor([place[key] for key in keys if key in place], device=self.device)
        self.cache.add(cache, repeat_N, all_rows)
        return h_RD[repeat_N]

    def _after_prefix(self, adapters: list[str | None], lengths: list[int]) -> Cache:
        """A cache of as many columns as the shared prefix has, a row for each prompt; empty without one.

        The forward that follows takes the same number of last tokens of every prompt, so a prompt that is
        shorter than the longest by n has the first n tokens less of the prefix here, right-aligned.
        """
        from transformers import DynamicCache

        from .cache import filled

        cache = DynamicCache()  # no config: no layer cuts its past to a sliding window, see cache.py
        if not self.prefix:
            return cache
        for adapter in dict.fromkeys(adapters):
            if adapter not in self.prefixes:
                self.prefixes[adapter] = DynamicCache()
                ids_1T = torch.tensor([self.prefix])
                self._forward(ids_1T, [len(self.prefix)], [adapter], self.prefixes[adapter])
        known = list(self.prefixes)
        row_N1 = torch.tensor([[known.index(adapter)] for adapter in adapters], device=self.device)
        short_N1 = torch.tensor([[max(lengths) - length] for length in lengths], device=self.device)
        column_NT = (torch.arange(len(self.prefix), device=self.device) - short_N1).clamp(min=0)
        for i, layers in enumerate(zip(*(prefix.layers for prefix in self.prefixes.values()), strict=True)):
            states = (torch.cat(state) for state in zip(*map(filled, layers), strict=True))
            keys, values = (state[row_N1, :, column_NT].transpose(1, 2) for state in states)
            cache.update(keys, values, i)
        return cache

    def _chunks(self, distinct: list[_Key]) -> Iterator[list[_Key]]:
        """`distinct` in parts of at most PREFILL_TOKENS, padding included, or of one prompt.

        Each prompt has a copy of the prefix, which takes the memory of `prefix_tokens` prefilled ones.
        """
        while distinct:
            width, count = 0, 0
            for prompt, _ in distinct:
                width = max(width, len(prompt) - len(self.prefix))
                if count and (count + 1) * (width + self.prefix_tokens) > PREFILL_TOKENS:
                    break
                count += 1
            yield distinct[:count]
            distinct = distinct[count:]

    def advance(self) -> Tensor:
        """Feed every row its last token; their last hidden states [R, D]."""
        for row in self.rows:
            row.length += 1
        ids_R1 = torch.tensor([[row.last] for row in self.rows])
        adapters = [row.request.adapter for row in self.rows]
        return self._forward(ids_R1, [row.length for row in self.rows], adapters, self.cache)

    def release(self, indices: Collection[int]) -> None:
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

    def _forward(
        self, ids_RT: Tensor, lengths: list[int], adapters: list[str | None], cache: Cache
    ) -> Tensor:
        """Hidden states [R, D] at the last column. `lengths`: columns in use by each row, `ids_RT` included.

        The model's own forward would hand its head the strided slice h[:, -1:], for which oneDNN copies the
        head's weight once per row (V = 151,936, 300 rows: 100 GB). So the decoder runs alone, and h is dense.
        """
        columns = cache.get_seq_length() + ids_RT.shape[1]
        length_R1 = torch.tensor(lengths, device=self.device)[:, None]
        position_RT = torch.arange(columns, device=self.device) - (columns - length_R1)
        # no_grad, not inference_mode: a buffer made under inference_mode would spoil a later training step
        with torch.no_grad(), mixed(self.layers, adapters):
            out = self.decoder(
                input_ids=ids_RT.to(self.device),
                attention_mask=(position_RT >= 0).long(),
                position_ids=position_RT[:, -ids_RT.shape[1] :].clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )
        return out.last_hidden_state[:, -1].contiguous()
