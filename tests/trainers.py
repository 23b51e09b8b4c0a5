"""The same batches for our loop and for the trainers of others, over the embedded base."""

from __future__ import annotations

import torch
from transformers import Trainer as HfTrainer
from transformers import TrainingArguments

from dft_lora.config import parse_recipe
from dft_lora.data.batches import step_indices
from dft_lora.model.backends import build
from dft_lora.training.plan import make_plan

STEPS, BATCH, RATE = 10, 4, 2e-3


def plan_of(tmp_path, objective="dft", **model):
    """Ten steps of four short examples; a constant rate, since schedules differ between trainers."""
    return make_plan(
        parse_recipe(
            {
                "model": {"name": "tiny", "dtype": "float32"} | model,
                "data": {"source": "arithmetic", "sample": 60, "packing": False},
                "objective": {"name": objective},
                "train": {
                    "learning_rate": RATE,
                    "batch_size": BATCH,
                    "micro_batch_size": BATCH,
                    "max_steps": STEPS,
                    "warmup": 0,
                    "schedule": "constant",
                },
                "output": str(tmp_path / "own"),
            }
        )
    )


def rows_of(plan, steps=STEPS):
    """The examples of the first steps, in the order of our loop, as a trainer's rows."""
    chosen = [i for step in range(steps) for i in step_indices(len(plan.examples), BATCH, 0, step)]
    return [
        {
            "input_ids": list(e.ids),
            "labels": [-100] * e.prompt_length + list(e.ids[e.prompt_length :]),
        }
        for e in (plan.examples[i] for i in chosen)
    ]


def padded(rows, pad_id=0):
    """A batch of rows, padded on the right."""
    L = max(len(row["input_ids"]) for row in rows)
    made = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        n = len(row["input_ids"])
        made["input_ids"].append(row["input_ids"] + [pad_id] * (L - n))
        made["attention_mask"].append([1] * n + [0] * (L - n))
        made["labels"].append(row["labels"] + [-100] * (L - n))
    return {name: torch.tensor(values) for name, values in made.items()}


def built(plan):
    """The recipe's base and its new adapter, equal at every call."""
    return build(plan.recipe, torch.device("cpu")).model


def arguments(tmp_path, kind=TrainingArguments, **more):
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(str(tmp_path / "theirs"), **settings | more)


def trained(model, rows, tmp_path, **more):
    """transformers' Trainer over the rows; (losses by step, adapter by name)."""
    trainer = HfTrainer(model, arguments(tmp_path, **more), train_dataset=rows, data_collator=padded)
    trainer.train()
    return losses_of(trainer), adapter_of(model)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
