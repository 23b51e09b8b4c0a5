"""Tokens per second and memory of answering: `python -m dft_lora.bench generation --model PATH`.

Our loop and transformers' `model.generate`, each on the nf4 base and on it unpacked; and the floor:
the bare matrix products of a decoding step. Prompts are random ids and nothing ends early, so each side does
the same work; all sides of a case run in turn, so that a slow minute of the machine falls on all of them.

`model.generate` hands its head a slice with a stride, for which a CPU copies the head once per row. Here its
head takes a dense copy, which flatters it; `as_is=True` measures it untouched besides.
Several adapters are one batch for us and as many runs for `model.generate`, each with its part of the rows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ..config import ModelConfig
from ..errors import RequestError
from ..model.accelerator import accelerator, default_device
from ..model.attention import PACKED_HEADS
from ..model.generate import Request, stream
from ..model.generation_memory import Bound
from ..model.head import bare, check_head
from ..model.load import load_base
from ..model.memory import MIB, memory_of
from ..runs.provenance import certificate
from .train import Shape, write_qwen2

RANKS = {"first": 8, "second": 16, "third": 8}
RANDOM = "random-qwen2"
QWEN2_5_0_5B = Shape(D=896, layers=24, intermediate=4864)


def random_adapters(base: Any, ranks: dict[str, int]) -> Any:
    """`base` with untrained adapters of these ranks that do change its answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = base
    for name, rank in ranks.items():
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        if model is base:
            model = get_peft_model(base, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """One batch: `temperature` 0 is greedy."""

    rows: int
    prompt: int
    adapters: int
    temperature: float

    def requests(self, tokens: int, vocabulary: int) -> list[Request]:
        """Different prompts, each asked of one of the adapters."""
        generator = torch.Generator().manual_seed(0)
        ids_RT = torch.randint(min(vocabulary, 1000), (self.rows, self.prompt), generator=generator)
        names = list(RANKS)[: self.adapters]
        return [
            Request(tuple(ids), names[i % len(names)], i, self.temperature, max_new_tokens=tokens)
            for i, ids in enumerate(ids_RT.tolist())
        ]


Ticks = list[tuple[float, float]]
"""(wall, processor) seconds at the start, after the prefill's token and after each further token."""


def tick() -> tuple[float, float]:
    accelerator(default_device()).synchronize()
    return time.perf_counter(), time.process_time()


def ours(model: Any, requests: Sequence[Request]) -> list[Ticks]:
    return [[tick(), *(tick() for _ in stream(model, requests, stop_ids=(), pad_id=0))]]


def theirs(model: Any, requests: Sequence[Request]) -> list[Ticks]:
    """A run of `model.generate` for each adapter, with transformers' own attention."""
    core = bare(model)
    ours = core.config._attn_implementation
    core.set_attn_implementation("sdpa" if ours == PACKED_HEADS else ours)
    try:
        return [
            _generated(model, [r for r in requests if r.adapter == name], name)
            for name in dict.fromkeys(r.adapter for r in requests)
        ]
    finally:
        core.set_attn_implementation(ours)


def theirs_mended(model: Any, requests: Sequence[Request]) -> list[Ticks]:
    with dense_head(model):
        return theirs(model, requests)


def _generated(model: Any, requests: list[Request], adapter: str | None) -> Ticks:
    model.set_adapter(adapter)
    ids_RT = torch.tensor([r.prompt_ids for r in requests], device=model.device)
    hot = requests[0].temperature > 0
    sampling = {"temperature": requests[0].temperature, "top_k": 0, "top_p": 1.0} if hot else {}
    ticks = [tick()]

    def after_token(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        ticks.append(tick())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    model.generate(
        input_ids=ids_RT,
        attention_mask=torch.ones_like(ids_RT),
        do_sample=hot,
        max_new_tokens=requests[0].max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[after_token],
        **sampling,
    )
    return ticks


@contextmanager
def dense_head(model: Any) -> Iterator[None]:
    """Hand the head a dense copy of its input, while it lasts."""

    def dense(_head: Any, arguments: tuple) -> tuple:
        return (arguments[0].contiguous(),)

    hook = bare(model).get_output_embeddings().register_forward_pre_hook(dense)
    try:
        yield
    finally:
        hook.remove()


def weights_of_a_step(model: Any) -> list[torch.Tensor]:
    """The matrices of a decoding step; `model` is unpacked and has no adapters yet."""
    layers = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    return [layer.weight for layer in layers] + [model.get_output_embeddings().weight]


def floor_seconds(weights: Sequence[torch.Tensor], rows: int, repeats: int = 5) -> tuple[float, float]:
    """(wall, processor) seconds of the bare products of a decoding step's `weights`."""
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
    ticks = [tick()]
    with torch.no_grad():
        for _ in range(repeats + 1):
            for w in weights:
                linear(inputs[w.shape[1]], w)
            ticks.append(tick())
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ticks[1:])]
    return statistics.median(s for s, _ in steps), statistics.median(c for _, c in steps)


def attention_seconds(model: Any, rows: int, columns: int, repeats: int = 5) -> float:
    """Wall seconds of a decoding step's attention over `columns` of the cache; the floor leaves it out."""
    config = model.get_decoder().config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = torch.randn(rows, kv_heads, heads // kv_heads, size, dtype=model.dtype, device=model.device)
    past = torch.randn(2, rows, kv_heads, columns, size, dtype=model.dtype, device=model.device)
    ticks = [tick()]
    with torch.no_grad():
        for _ in range(repeats + 1):
            for _ in range(config.num_hidden_layers):
                scaled_dot_product_attention(query, *past)
            ticks.append(tick())
    return statistics.median(b[0] - a[0] for a, b in pairwise(ticks[1:]))


def figures(runs: list[Ticks], case: Case) -> dict[str, float]:
    """Tokens per second of the prefill (its prompts) and of the decoding; runs in sequence add up."""

    def total(part: Callable[[Ticks], float]) -> float:
        return sum(part(ticks) for ticks in runs)

    def step(clock: int) -> float:
        return total(lambda ticks: statistics.median(b[clock] - a[clock] for a, b in pairwise(ticks[1:])))

    prefill = total(lambda ticks: ticks[1][0] - ticks[0][0])
    return {
        "prefill_tokens_per_second": case.rows * case.prompt / prefill,
        "decode_tokens_per_second": case.rows / step(0),
        "step_seconds": step(0),
        "step_cpu_seconds": step(1),
    }


def measure(
    model: str,
    *,
    rows: Sequence[int] = (1, 8, 64, 256),
    prompts: Sequence[int] = (32, 1000),
    adapters: Sequence[int] = (1, 3),
    tokens: int = 16,
    rounds: int = 3,
    most_prompt_tokens: int = 8192,
    as_is: bool = False,
) -> Iterator[dict[str, Any]]:
    """All cases on one base; a case of more than `most_prompt_tokens` in all is left out, and named.

    Yields the result so far after each case. `rounds`: each side of a case runs so often, in turn; the
    figures are medians over the rounds.
    """
    wanted = [Case(r, p, a, t) for p in prompts for r in rows for a in adapters for t in (0.0, 1.0)]
    measured = [c for c in wanted if c.rows * c.prompt <= most_prompt_tokens and c.rows >= c.adapters]
    if not measured:
        raise RequestError(f"--rows, --prompt: every case has more than {most_prompt_tokens:,} prompt tokens")
    with tempfile.TemporaryDirectory() if model == RANDOM else nullcontext(model) as folder:
        name = folder
        if model == RANDOM:
            write_qwen2(Path(folder), QWEN2_5_0_5B)
        packed, hardware = load_base(ModelConfig(name=name))
        plain, _ = load_base(ModelConfig(name=name, unpack=True), for_answers=True)
    vocabulary = check_head(plain).weight_VD.shape[0]
    weights = weights_of_a_step(plain)
    nf4, unpacked = (random_adapters(base, RANKS) for base in (packed, plain))
    sides: dict[str, Callable[[list[Request]], list[Ticks]]] = {
        "ours, unpacked": lambda requests: ours(unpacked, requests),
        "ours, nf4": lambda requests: ours(nf4, requests),
        "transformers, unpacked": lambda requests: theirs_mended(unpacked, requests),
        "transformers, nf4": lambda requests: theirs_mended(nf4, requests),
    }
    if as_is:
        sides["transformers as it is, nf4"] = lambda requests: theirs(nf4, requests)
    memory = memory_of(hardware.device)
    cases: list[dict[str, Any]] = []
    left_out = [asdict(case) for case in wanted if case not in measured]
    for case in measured:
        requests = case.requests(tokens, vocabulary)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, run in sides.items():
                before = memory.now()
                memory.reset()
                result = figures(run(requests), case)
                found[side].append(result | {"peak_mb": (memory.peak() - before) / MIB})
        medians = {side: _median(results) for side, results in found.items()}
        stated = Bound(unpacked)(case.rows, case.prompt + tokens) / MIB
        wall, busy = floor_seconds(weights, case.rows)  # beside the case: a busy machine slows both
        cases.append(
            asdict(case)
            | {
                "sides": medians,
                "stated_mb": stated,
                "floor_seconds": wall,
                "floor_cpu_seconds": busy,
                "attention_seconds": attention_seconds(plain, case.rows, case.prompt + tokens // 2),
            }
        )
        yield {
            "kind": "generation",
            "model": model if model in ("tiny", RANDOM) else Path(model).name,
            "tokens": tokens,
            "rounds": rounds,
            "cases": cases,
            "left_out": left_out,
            "device": hardware.name,
            "dtype": str(hardware.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "provenance": certificate(),
        }


def _median(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}
