"""How much the decoding loop saves: `python -m dft_lora.bench.generation [NAME=ADAPTER_DIR ...]`.

The work: `samples` answers at temperature 1 to each problem of the embedded task, from the embedded base in
nf4 and from two LoRA adapters over it. Ours is one call of `model.generate.generate`. The peer is what one
would write with transformers: for each of the three a run of `model.generate` with the prompt repeated, in
length-sorted batches of as many rows, each run with its adapter set as the active one (no mixed batch, which
is the faster way for it). Both sides get every batch size, and the best of each is compared.

Without adapters on the command line, two untrained ones of rank 8 and 16 with small random weights stand in:
they cost what trained ones cost, and answers keep the base's lengths, which decide when a row may leave.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..data.templates import Renderer
from ..model.generate import Completion, Request, generate
from ..model.load import load_adapters, load_base, load_tokenizer
from ..runs.provenance import certificate

RESULT = Path(__file__).parent / "results" / "generation.json"


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


def repeated(
    model: Any, requests: Sequence[Request], *, stop_ids, pad_id: int, batch_rows: int
) -> list[Completion]:
    """The peer: requests of one adapter through `model.generate`, every prompt as often as it is asked."""
    device = next(model.parameters()).device
    done: list[Any] = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    adapter = requests[0].adapter
    if adapter is not None:
        model.set_adapter(adapter)
    with model.disable_adapter() if adapter is None else nullcontext():
        for start in range(0, len(order), batch_rows):
            places = order[start : start + batch_rows]
            prompts = [requests[i].prompt_ids for i in places]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
            answers = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=requests[0].max_new_tokens,
                eos_token_id=sorted(stop_ids),
                pad_token_id=pad_id,
            )
            for i, row in zip(places, answers[:, width:].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in stop_ids), None)
                done[i] = Completion(row[:end], finished=end is not None)
    return done


def compare(
    model: Any, requests: Sequence[Request], batch_rows: Sequence[int], **ends: Any
) -> dict[str, Any]:
    """Seconds and mean answer length of both sides for each batch size, and the ratio of the best of each.

    Processor seconds stand beside: on a machine that others use they are the steadier clock.
    """
    runs = [[r for r in requests if r.adapter == a] for a in dict.fromkeys(r.adapter for r in requests)]

    def ours(rows):
        return generate(model, requests, batch_rows=rows, **ends)

    def peer(rows):
        return [answer for run in runs for answer in repeated(model, run, batch_rows=rows, **ends)]

    sides: dict[str, Any] = {}
    for name, side in (("ours", ours), ("transformers", peer)):
        sides[name] = {}
        for rows in batch_rows:
            torch.manual_seed(0)
            started, busy = time.perf_counter(), time.process_time()
            answers = side(rows)
            seconds, busy = time.perf_counter() - started, time.process_time() - busy
            tokens = sum(len(answer.ids) for answer in answers) / len(answers)
            sides[name][rows] = {
                "seconds": round(seconds, 2),
                "cpu_seconds": round(busy, 2),
                "mean_tokens": round(tokens, 2),
            }
            print(
                f"{name:12} {rows:5} rows  {seconds:7.1f} s  {tokens:5.1f} tokens an answer", file=sys.stderr
            )
    return {**sides, "ratio": _ratio(sides, "seconds"), "cpu_ratio": _ratio(sides, "cpu_seconds")}


def _ratio(sides: dict[str, Any], clock: str) -> float:
    best = {name: min(entry[clock] for entry in side.values()) for name, side in sides.items()}
    return round(best["transformers"] / best["ours"], 2)


def same_alone(model: Any, requests: Sequence[Request], batch_rows: int, **ends: Any) -> float:
    """The share of `requests` whose answer in a batch is, token for token, the answer alone."""
    together = generate(model, requests, batch_rows=batch_rows, **ends)
    alone = [generate(model, [request], **ends)[0] for request in requests]
    return sum(a == b for a, b in zip(together, alone, strict=True)) / len(requests)


def measure(
    adapters: dict[str, Path], problems: int, samples: int, batch_rows: Sequence[int], alone: int
) -> dict[str, Any]:
    """The whole comparison on the embedded base and task; the result with its provenance."""
    from ..tasks import get_task

    base, hardware = load_base(ModelConfig())
    model = load_adapters(base, adapters) if adapters else random_adapters(base, {"sft": 8, "dft": 16})
    renderer = Renderer(load_tokenizer(ModelConfig()))
    task = get_task("arithmetic")
    prompts = [tuple(renderer.prompt_ids(problem.messages)) for problem in task.problems()[:problems]]
    requests = [
        Request(prompt, adapter, seed=sample, max_new_tokens=task.max_new_tokens)
        for adapter in (None, *model.peft_config)
        for prompt in prompts
        for sample in range(samples)
    ]
    ends = {"stop_ids": renderer.stop_ids, "pad_id": renderer.pad_id}
    generate(model, requests[:16], **ends)  # warm-up
    figures = compare(model, requests, batch_rows, **ends)
    some = requests[:: max(1, len(requests) // alone)][:alone]
    return {
        "task": task.name,
        "problems": problems,
        "samples": samples,
        "adapters": {n: str(d) for n, d in adapters.items()} or "untrained, rank 8 and 16",
        **figures,
        "alone": {"requests": len(some), "same": same_alone(model, some, max(batch_rows), **ends)},
        "device": hardware.name,
        "dtype": str(hardware.dtype),
        "threads": torch.get_num_threads(),
        "provenance": certificate(),
    }


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Time the decoding loop against transformers' generate, and record both."""
    parser = argparse.ArgumentParser(prog="python -m dft_lora.bench.generation", description=main.__doc__)
    parser.add_argument(
        "adapters", nargs="*", metavar="NAME=DIR", help="trained adapters instead of random ones"
    )
    parser.add_argument("--problems", type=positive, default=100)
    parser.add_argument("--samples", type=positive, default=16)
    parser.add_argument("--batch-rows", type=positive, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--alone", type=positive, default=1000, help="requests answered once more, one at a time"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    adapters = {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in options.adapters)}
    for name, folder in adapters.items():
        if not (folder / "adapter_config.json").is_file():
            parser.error(
                f"{name}={folder}: no adapter there; write NAME=DIR, with adapter_config.json in DIR"
            )
    result = measure(adapters, options.problems, options.samples, options.batch_rows, options.alone)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['ratio']} times as fast; {result['alone']['same']:.2%} the same alone; {options.out}")


if __name__ == "__main__":
    main()
