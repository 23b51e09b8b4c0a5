"""Rebuild the embedded base: `python -m dft_lora.model.tiny.build [--out DIR]` (6 minutes of one core).

A Llama-shaped model of 1.1 million parameters, trained from nothing on the arithmetic task's own generator
(not Qwen2-shaped: AutoTokenizer gives any such folder Qwen's own pre-tokenizer, whatever it holds).
Its teachers use five styles and get 8 % of the steps wrong, and training stops early, so the base is good but
noisy: what it believes (greedy) is much better than what it says (temperature 1). SFT and DFT had been
compared on an earlier base when it was made: docs/demo.md has the story.

Written: model.safetensors (fp32), config.json, the tokenizer's files, and PROVENANCE.json with the command,
versions, loss and the measured accuracy in fp32 and in nf4. No file is a pickle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from dft_lora.config import ModelConfig
from dft_lora.data.templates import Renderer
from dft_lora.model.load import load_base
from dft_lora.model.tiny import TINY_DIR
from dft_lora.tasks.arithmetic import TASKS, base_training
from dft_lora.tasks.base import Problem

BOS, END, PAD, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # near 1 / sqrt(128); with the usual 0.02 the first 400 steps are lost
}  # nf4 works in blocks of 64: every width is a multiple of 64
EXAMPLES, BATCH, LEARNING_RATE, SEED = 48_000, 32, 3e-3, 0
IGNORE = -100


def corpus() -> Iterator[str]:
    """What the tokenizer's merges are learned on."""
    return (f"{problem.question}\n{problem.solution}" for problem in base_training(10_000, SEED).problems())


def build_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: the corpus' words become tokens, any other text is spelled in bytes.

    Digits are split off first, so no merge crosses one; a number is read and written digit by digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=20,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(renderer: Renderer, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of prompt, solution and end token [T], and labels [T] that are IGNORE on the prompt."""
    example = renderer.render(problem)
    ids = torch.tensor(example.ids)
    return ids, ids.masked_fill(torch.arange(len(ids)) < example.prompt_length, IGNORE)


def batches(rows: list, size: int, rng: Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded batches of rows of like length, in random order: every row once."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(groups)
    for group in groups:
        ids, labels = zip(*group, strict=True)
        yield (
            pad_sequence(list(ids), True, 0),
            pad_sequence(list(labels), True, IGNORE),
        )  # causal: padding is never read


def train(tokenizer, examples: int, seed: int) -> tuple[LlamaForCausalLM, list[float]]:
    """One pass over `examples` fresh problems; returns the model and each step's loss (nats per token)."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # how sums are split among threads decides the last bits
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config).train()
    renderer = Renderer(tokenizer)
    rows = [encode(renderer, problem) for problem in base_training(examples, seed).problems()]
    steps = -(-examples // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    losses = []
    for ids, labels in batches(rows, BATCH, Random(seed)):
        hidden = model.model(ids).last_hidden_state[:, :-1]
        target = labels[:, 1:]
        loss = cross_entropy(model.lm_head(hidden[target != IGNORE]), target[target != IGNORE])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(
                f"step {len(losses)}/{steps}  loss {sum(losses[-50:]) / 50:.4f}", file=sys.stderr, flush=True
            )
    return model.eval(), losses


@torch.inference_mode()
def accuracy(model, tokenizer, problems: list[Problem], temperature: float, max_new_tokens: int) -> dict:
    """Share of problems whose last `#### x` is the reference, per number of steps and over all."""
    renderer = Renderer(tokenizer)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(problems), 100):
        group = problems[start : start + 100]
        prompts = {"input_ids": [renderer.prompt_ids(problem.messages) for problem in group]}
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids = model.generate(
            **batch, max_new_tokens=max_new_tokens, **(sampling if temperature else {"do_sample": False})
        )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for problem, text in zip(group, texts, strict=True):
            found = re.findall(r"#### (\d+)", text)
            for key in ("all", str(problem.tags["steps"])):
                right[key].append(bool(found) and found[-1] == problem.answer)
    return {key: round(sum(hits) / len(hits), 4) for key, hits in sorted(right.items())}


def measure(model, tokenizer, samples: int) -> dict:
    """Accuracy of both test sets at temperature 1 (over `samples` answers a problem) and greedy."""
    torch.manual_seed(SEED)
    return {
        task.name: {
            "temperature_1": accuracy(model, tokenizer, task.problems() * samples, 1.0, task.max_new_tokens),
            "greedy": accuracy(model, tokenizer, task.problems(), 0.0, task.max_new_tokens),
        }
        for task in TASKS
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rebuild the embedded base.")
    parser.add_argument("--out", type=Path, default=TINY_DIR)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--samples", type=int, default=4, help="answers a problem when accuracy is measured")
    options = parser.parse_args(argv)
    started = time.process_time()

    tokenizer = build_tokenizer(corpus())
    model, losses = train(tokenizer, options.examples, SEED)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    seconds = time.process_time() - started

    in_nf4 = ModelConfig(name=str(options.out), quantization="nf4", dtype="float32")
    provenance = {
        "command": "python -m dft_lora.model.tiny.build",
        "date": date.today().isoformat(),
        "seed": SEED,
        "examples": options.examples,
        "wrong_steps": base_training(1).wrong,
        "steps": len(losses),
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "parameters": model.num_parameters(),
        "cpu_seconds": round(seconds),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "bitsandbytes")},
        "samples_per_problem": options.samples,
        "accuracy": {
            "fp32": measure(model, tokenizer, options.samples),
            "nf4": measure(load_base(in_nf4)[0], tokenizer, options.samples),
        },
        "sha256": {
            name: hashlib.sha256((options.out / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "tokenizer.json")
        },
    }
    (options.out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(json.dumps(provenance, indent=2))


if __name__ == "__main__":
    main()
