"""Decoding beside transformers' `generate`, and a GRPO step on the embedded base."""

from __future__ import annotations

from collections.abc import Iterator

from ...config import load_recipe
from ...training.loop import train
from ..decode import measure
from .lab import Lab, Result


def decoding(lab: Lab) -> Iterator[tuple[str, Result]]:
    """Tokens per second in a batch of one adapter and of three, greedy and sampled."""
    rows, prompt, tokens = ((3,), 8, 3) if lab.small else ((1, 32), 256, 32)
    for found in measure(str(lab.base("1.5B")), rows=rows, prompts=(prompt,), tokens=tokens, rounds=1):
        case = found["cases"][-1]
        name = f"{case['rows']} rows, {case['adapters']} adapters, T = {case['temperature']:g}"
        speeds = {side: figures["decode_tokens_per_second"] for side, figures in case["sides"].items()}
        ours = case["sides"]["ours, nf4"]
        yield (
            name,
            {
                "tokens_per_second": speeds["ours, nf4"],
                "transformers_tokens_per_second": speeds["transformers, nf4"],
                "unpacked_tokens_per_second": speeds["ours, unpacked"],
                "step_over_products": ours["step_seconds"] / case["floor_seconds"],
                "peak_mb": ours["peak_mb"],
            },
        )


def grpo(lab: Lab) -> Iterator[tuple[str, Result]]:
    """A step of GRPO: 8 answers to each of 32 problems are sampled, judged and learned from."""
    fewer = (
        ["train.batch_size=16", "train.micro_batch_size=8", "rollouts.max_new_tokens=32"] if lab.small else []
    )
    changes = ["train.max_steps=2", f"output={lab.folder / 'grpo'}", *fewer]
    lines = train(load_recipe("tiny_grpo", changes)).metrics()
    keys = ("seconds", "reward", "answers", "generated_tokens", "loss", "peak_memory_mb")
    yield "second step", {key: lines[-1][key] for key in keys}
