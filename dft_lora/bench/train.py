"""One optimizer step of ours against TRL's `SFTTrainer(loss_type="dft")`, other trainers with and without
`patch`, and the memory ladder.

All variants train the same LoRA over the same 4-bit base on the same ids in the same order. Each runs in a
process of its own, the rounds in turn, so that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..config import ModelConfig, Recipe, load_recipe, parse_recipe
from ..data.batches import Batch, collate, step_indices
from ..data.templates import Example
from ..loss import TokenScores
from ..model import memory
from ..model.accelerator import accelerator
from ..model.hardware import choose, dtype_name
from ..model.load import load_base, load_model_config
from ..model.memory import MIB, LiveTensors, memory_of
from ..runs.provenance import certificate, versions
from ..training.patch import patch
from ..training.plan import Plan, make_plan
from ..training.ranks import Ranks
from ..training.trainer import Trainer
from .products import products_of

PEERS = ("trl", "datasets")
HUB = ({"source": "openai/gsm8k", "subset": "main"}, "Qwen/Qwen2.5-0.5B")


@dataclass(frozen=True)
class Shape:
    """A Qwen2 of random weights, and the batch it is trained on."""

    D: int = 512
    layers: int = 8
    V: int = 151_936
    intermediate: int = 2816
    batch: int = 4
    max_length: int = 512


class Watch:
    """Memory when the model is ready, at most afterwards, and the time of each step but the first.

    `tensors`: bytes of the tensors that a step makes, at most, where the variant counts them.
    `products`: processor seconds of a step's matrix products alone, likewise.
    """

    def __init__(self) -> None:
        self.device = choose().device
        self.memory = memory_of(self.device)
        self.empty = self.memory.now()
        self.ticks: list[tuple[float, float]] = []
        self.tensors: int | None = None
        self.products: float | None = None

    def ready(self) -> None:
        self.loaded = self.memory.now()
        self.memory.reset()

    def tick(self) -> None:
        accelerator(self.device).synchronize()
        self.ticks.append((time.perf_counter(), time.process_time()))
        self.peak = self.memory.peak()

    def figures(self) -> dict[str, Any]:
        walls, works = zip(*self.ticks, strict=True)
        return {
            "loaded_mb": (self.loaded - self.empty) / MIB,
            "above_loaded_mb": (self.peak - self.loaded) / MIB,
            "tensors_mb": self.tensors and self.tensors / MIB,
            "products_cpu_seconds": self.products,
            "seconds": [b - a for a, b in pairwise(walls)],
            "cpu_seconds": [b - a for a, b in pairwise(works)],
        }


Run = Callable[[Plan, int, Watch], float]
"""Train so many steps, calling the watch when ready and after each step; returns the first step's loss."""


def run_ours(plan: Plan, steps: int, watch: Watch, kind: type[Trainer] = Trainer) -> float:
    trainer = kind(plan, Ranks(plan.recipe))
    watch.ready()
    losses = []
    for step in range(steps):
        losses.append(trainer.step(step)["loss"])
        watch.tick()
    if watch.device.type == "cpu":
        with LiveTensors() as alive:
            trainer.step(steps)
        watch.tensors = alive.peak()
        watch.products = products_of(lambda: trainer.step(steps + 1)).cpu_seconds()
    return losses[0]


class FullLogits(Trainer):
    """Our step with the loss as transformers computes it: all logits, and a float32 copy of them."""

    def __init__(self, plan: Plan, ranks: Ranks):
        super().__init__(plan, ranks)
        self.learner.score = self.score  # type: ignore[method-assign]

    def score(self, batch: Batch, sums: Any) -> torch.Tensor:
        learner = self.learner
        inputs = batch.inputs(learner.ranks.device)
        z_NV = learner.model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        y_N = batch.labels_BL[:, 1:].flatten().to(z_NV.device)
        logp_N = -cross_entropy(z_NV.float(), y_N, reduction="none")
        index = (y_N != -100).nonzero()[:, 0]
        none = torch.zeros(len(index), device=z_NV.device)
        sequence_M = batch.examples_BL[:, 1:].flatten().to(z_NV.device)[index]
        scores = TokenScores(logp_N[index], none, none, none.bool(), index, sequence=sequence_M)
        loss = learner.objective(scores)
        sums.add(loss, scores, batch)
        return loss


def run_full_logits(plan: Plan, steps: int, watch: Watch) -> float:
    return run_ours(plan, steps, watch, FullLogits)


def where_memory_is_short(run: Run) -> Run:
    """`run` as on a machine with little free memory; what it changes holds for the process."""

    def short(plan: Plan, steps: int, watch: Watch) -> float:
        memory.SHORT = 2**62
        return run(plan, steps, watch)

    return short


def run_trl(plan: Plan, steps: int, watch: Watch, objective: str | None = None, **settings: Any) -> float:
    """TRL with its own defaults, but for what `plan.recipe` states, over a base loaded by us.

    `objective`: that of `patch`, instead of TRL's own DFT.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, hardware = load_base(plan.recipe.model)
    loss = {"loss_type": "dft"} if objective is None else {}
    with tempfile.TemporaryDirectory() as folder:
        settings |= trainer_settings(plan, steps, hardware.device) | loss
        settings["bf16"] = hardware.dtype is torch.bfloat16  # TRL's default crawls on a CPU without it
        arguments = SFTConfig(folder, max_length=plan.recipe.data.max_length, **settings)
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows_of(plan, steps)),
            peft_config=lora_config(plan),
            processing_class=plan.renderer.tokenizer,
            callbacks=[clock(watch)],
        )
        return first_loss(trainer, objective)


def run_hf(plan: Plan, steps: int, watch: Watch, objective: str | None = None) -> float:
    """transformers' Trainer with its own loss, or patched."""
    from peft import get_peft_model
    from transformers import Trainer as HfTrainer
    from transformers import TrainingArguments

    base, hardware = load_base(plan.recipe.model)
    model = get_peft_model(base, lora_config(plan))
    pad_id = plan.renderer.pad_id

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([row["example"] for row in rows], pad_id)
        return batch.inputs(torch.device("cpu")) | {"labels": batch.labels_BL}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, remove_unused_columns=False, **trainer_settings(plan, steps, hardware.device)
        )
        trainer = HfTrainer(
            model,
            arguments,
            train_dataset=[{"example": example} for example in examples_of(plan, steps)],
            data_collator=padded,
            callbacks=[clock(watch)],
        )
        return first_loss(trainer, objective)


def first_loss(trainer: Any, objective: str | None) -> float:
    """Train; the loss of the first step."""
    with nullcontext() if objective is None else patch(trainer.model, objective):
        trainer.train()
    return trainer.state.log_history[0]["loss"]


def trainer_settings(plan: Plan, steps: int, device: torch.device) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": plan.recipe.train.batch_size,
        "max_steps": steps,
        "learning_rate": plan.recipe.train.learning_rate,
        "train_sampling_strategy": "sequential",
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora_config(plan: Plan) -> Any:
    from peft import LoraConfig

    adapter = plan.recipe.adapter
    alpha: Any = adapter.alpha
    return LoraConfig(r=adapter.r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def clock(watch: Watch) -> Any:
    """A trainer's callback that reads the watch."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.ready()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

    return Clock()


def rows_of(plan: Plan, steps: int) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": list(e.ids),
            "labels": [-100] * e.prompt_length + list(e.ids[e.prompt_length :]),
        }
        for e in examples_of(plan, steps)
    ]


run_trl_plain = partial(run_trl, gradient_checkpointing=False)


def examples_of(plan: Plan, steps: int) -> Iterator[Example]:
    """The examples of the first steps, in our order."""
    size, seed = plan.recipe.train.batch_size, plan.recipe.train.seed
    for step in range(steps):
        yield from (plan.examples[i] for i in step_indices(len(plan.examples), size, seed, step))


@dataclass(frozen=True)
class StepVariant:
    """A way to train; `changes` are recipe fields."""

    name: str
    run: Run
    changes: tuple[str, ...] = ()
    package: str | None = None

    @property
    def missing(self) -> str:
        absent = self.package and find_spec(self.package) is None
        return f"{self.package} is not installed" if absent else ""


OURS = StepVariant("ours", run_ours)
TRL = StepVariant("TRL SFTTrainer, dft, its defaults (checkpointing)", run_trl, package="trl")
COMPARISON = (
    OURS,
    StepVariant("ours, where memory is short", where_memory_is_short(run_ours)),
    TRL,
    StepVariant("TRL SFTTrainer, dft, without checkpointing", run_trl_plain, package="trl"),
)

OWN_LOSS = StepVariant("transformers Trainer, its own loss (NLL)", run_hf)
TRAINERS = (
    OWN_LOSS,
    StepVariant("transformers Trainer, patched, sft", partial(run_hf, objective="sft")),
    StepVariant("transformers Trainer, patched, dft", partial(run_hf, objective="dft")),
    StepVariant("TRL SFTTrainer, its own dft", run_trl_plain, package="trl"),
    StepVariant("TRL SFTTrainer, patched, dft", partial(run_trl_plain, objective="dft"), package="trl"),
)

FRUGAL, FRUGAL_FULL_LOGITS = where_memory_is_short(run_ours), where_memory_is_short(run_full_logits)
FULL_16BIT, FULL = ("model.quantization=none", "data.packing=false"), ("data.packing=false",)
CHECKPOINTED = ("train.gradient_checkpointing=true",)
ONE_BY_ONE = (*CHECKPOINTED, "train.micro_batch_size=1")
LADDER = (
    StepVariant("LoRA over a 16-bit base, full logits", FRUGAL_FULL_LOGITS, FULL_16BIT),
    StepVariant("+ 4-bit base (nf4)", FRUGAL_FULL_LOGITS, FULL),
    StepVariant("+ loss in chunks (this engine)", FRUGAL, FULL),
    StepVariant("+ rows packed where it costs less", FRUGAL),
    StepVariant("+ gradient checkpointing", FRUGAL, CHECKPOINTED),
    StepVariant("+ micro-batches of one example", FRUGAL, ONE_BY_ONE),
    StepVariant("+ 8-bit AdamW", FRUGAL, (*ONE_BY_ONE, "train.optimizer=adamw8bit")),
)
VARIANTS = {variant.name: variant for variant in (*COMPARISON, *TRAINERS, *LADDER)}


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how often. `model`: a base to train on word problems, instead of a random one."""

    shape: Shape = field(default_factory=Shape)
    dtype: str = "auto"
    steps: int = 3
    rounds: int = 3
    threads: int = 2
    model: str | None = None


def measure(chosen: tuple[StepVariant, ...], m: Measurement) -> dict[str, Any]:
    """Every chosen variant as a JSON value with its provenance; missing ones by name."""
    rows: dict[str, dict[str, Any]] = {v.name: {"missing": v.missing, "runs": []} for v in chosen}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_inputs(Path(folder), m)
        for round_ in range(m.rounds):
            for variant in (v for v in chosen if not v.missing):
                figures = _in_fresh_process(variant, Path(folder), m)
                rows[variant.name]["runs"].append(figures)
                text = f"{statistics.median(figures['seconds']):7.2f} s  {figures['above_loaded_mb']:7.0f} MB"
                print(f"round {round_}  {variant.name:50} {text}", file=sys.stderr, flush=True)
        plan = make_plan(recipe)
    batches = [len(e.ids) for e in examples_of(plan, m.steps + 1)][m.shape.batch :]
    for row in rows.values():
        if row["runs"]:
            row |= summary(row["runs"], sum(batches) / m.steps)
    hardware = choose(m.dtype, parameters=10**9)
    return {
        "kind": "train",
        "shape": asdict(m.shape),
        "model": m.model,
        "data": Path(recipe.data.source).name,
        "dtype": dtype_name(hardware.dtype),
        "device": hardware.name,
        "threads": m.threads,
        "tokens_a_step": sum(batches) / m.steps,
        "variants": rows,
        "provenance": certificate(peers=versions(PEERS)),
    }


def summary(runs: list[dict[str, Any]], tokens: float) -> dict[str, float]:
    """Medians over all steps of all rounds; the loaded size and the peak as medians over rounds."""
    seconds = statistics.median(s for run in runs for s in run["seconds"])
    return {
        "seconds": seconds,
        "cpu_seconds": statistics.median(s for run in runs for s in run["cpu_seconds"]),
        "tokens_per_second": tokens / seconds,
        "loaded_mb": statistics.median(run["loaded_mb"] for run in runs),
        "above_loaded_mb": statistics.median(run["above_loaded_mb"] for run in runs),
        "tensors_mb": runs[0]["tensors_mb"],
        "products_cpu_seconds": runs[0].get("products_cpu_seconds"),
        "first_loss": runs[0]["first_loss"],
    }


def write_inputs(folder: Path, m: Measurement) -> Recipe:
    """`recipe.json` in `folder`: a named base on word problems, or a random one on GSM8K.

    Rows have up to `max_length` tokens. The random base is written beside the recipe.
    """
    if m.model is None:
        text, tokenizer = gsm8k()
        write_qwen2(folder / "base", m.shape, tokenizer)
        base, text = str(folder / "base"), text | {"template": "qwen-boxed", "sample": 512}
    else:
        load_model_config(ModelConfig(name=m.model))  # an unknown base is refused before any child starts
        base, text = m.model, {"source": "word-problems", "template": "plain"}
    recipe = parse_recipe(
        {
            "name": "bench",
            "model": {"name": base, "dtype": m.dtype},
            "data": text | {"max_length": m.shape.max_length},
            "train": {
                "batch_size": m.shape.batch,
                "micro_batch_size": m.shape.batch,
                "max_steps": m.steps + 1,
                "gradient_checkpointing": False,
            },
            "output": str(folder / "run"),
        }
    )
    (folder / "recipe.json").write_text(json.dumps(recipe.as_dict()))
    return recipe


def write_qwen2(folder: Path, shape: Shape, tokenizer: str | None = None) -> None:
    """A Qwen2 of random weights, with this tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    if tokenizer is not None:  # not `load_tokenizer`, which refuses a folder without a model
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=shape.V,
        hidden_size=shape.D,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.D // 64,
        num_key_value_heads=gcd(shape.D // 64, 2),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=151_643,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def gsm8k() -> tuple[dict[str, Any], str]:
    """The data part of a recipe, and a tokenizer: files below DFT_LORA_DATA, else the Hub's."""
    data = Path(os.environ.get("DFT_LORA_DATA", "../shared/data"))
    text, tokenizer = data / "train/gsm8k_train.jsonl", data / "tokenizers/qwen2.5"
    source, name = ({"source": str(text)}, str(tokenizer)) if text.exists() and tokenizer.exists() else HUB
    return source | {"prompt": "question", "completion": "answer"}, name


def _in_fresh_process(variant: StepVariant, folder: Path, m: Measurement) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, variant.name, str(folder), str(m.steps), str(m.threads)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def _child(name: str, folder: str, steps: str, threads: str) -> dict[str, Any]:
    """One step more than is measured: the first one pays for what is set up once."""
    torch.set_num_threads(int(threads))
    variant = VARIANTS[name]
    plan = make_plan(load_recipe(Path(folder) / "recipe.json", variant.changes))
    watch = Watch()
    loss = variant.run(plan, int(steps) + 1, watch)
    return watch.figures() | {"first_loss": loss}


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
