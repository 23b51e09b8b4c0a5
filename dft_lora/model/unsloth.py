"""The unsloth backend. Only this file imports unsloth, which patches transformers when it is imported.

unsloth requires an older transformers than ours, so it needs an environment of its own:

    pip install -c constraints-unsloth.txt 'dft-lora[unsloth]'

Requested together with the newest transformers, pip does not fail but silently installs a year-old unsloth.
Hence the lower bound, which is also checked here. On a GPU hidden states come from unsloth's documented
switch. On a CPU (since 2026.10.9) its models are the stock ones, and our hook catches the hidden states.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from ..config import Recipe
from ..data.batches import rounded
from ..errors import MissingPart, ModelError, one_line
from .built import Built
from .head import bare, check_head, head_of, hidden_states
from .load import (
    CHECKPOINTING_FROM,
    count_parameters,
    hardware_of,
    keep_differentiable,
    load_model_config,
    resolve,
)
from .lora_inputs import keep_inputs_narrow

LEAST = (2026, 10, 9)
REMEDY = "pip install -c constraints-unsloth.txt 'dft-lora[unsloth]' in an environment of its own"
SWITCH = "UNSLOTH_RETURN_HIDDEN_STATES"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What unsloth adapts for `all-linear`."""


def import_unsloth() -> Any:
    """The package. Call this before anything imports transformers.

    Raises MissingPart, with the command that installs it, if it is absent, too old, or does not start.
    """
    try:
        version = metadata.version("unsloth")
    except metadata.PackageNotFoundError:
        raise MissingPart(f"model.backend: unsloth is not installed; {REMEDY}") from None
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < LEAST:
        needed = ".".join(map(str, LEAST))
        raise MissingPart(f"model.backend: unsloth {version} is too old ({needed} is needed); {REMEDY}")
    try:
        import unsloth
    except (ImportError, NotImplementedError, RuntimeError) as error:
        reason = f"model.backend: unsloth {version} does not start ({one_line(error)}); {REMEDY}"
        raise MissingPart(reason) from None
    return unsloth


def build_with_unsloth(recipe: Recipe, device: torch.device) -> Built:
    """The base and adapter of a recipe, built by unsloth. Raises MissingPart or ModelError."""
    language_model = import_unsloth().FastLanguageModel
    config, adapter = recipe.model, recipe.adapter
    parameters = count_parameters(load_model_config(config))
    hardware = hardware_of(config, device)
    wanted = recipe.train.gradient_checkpointing
    checkpointing = (
        device.type == "cuda" and parameters >= CHECKPOINTING_FROM if wanted == "auto" else bool(wanted)
    )
    base, _ = language_model.from_pretrained(
        resolve(config),
        max_seq_length=rounded(recipe.data.max_length),  # a padded row is not longer
        dtype=hardware.dtype,
        load_in_4bit=config.quantization == "nf4",
        use_exact_model_name=True,  # the weights of the recipe, not unsloth's own 4-bit copy of them
        revision=config.revision,
    )
    keep_differentiable(base)
    on_gpu = device.type == "cuda"
    head = head_of(base) if on_gpu else check_head(base)
    targets = LINEAR if adapter.target_modules == "all-linear" else adapter.target_modules
    model = language_model.get_peft_model(
        base,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_gradient_checkpointing="unsloth" if checkpointing and on_gpu else checkpointing,
        random_state=recipe.train.seed,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not on_gpu and hardware.dtype != torch.float32:
        keep_inputs_narrow(model)
    return Built(model.eval(), head, hardware, checkpointing, by_switch if on_gpu else hidden_states)


def by_switch(model: Any, **inputs: Any) -> torch.Tensor:
    """h_BLD by unsloth's documented switch, which makes a forward pass return hidden states as its logits.

    Raises ModelError if the model ignores the switch.
    """
    with _environment(SWITCH, "1"):
        h_BLD = model(**inputs, use_cache=False).logits
    D = bare(model).get_output_embeddings().weight.shape[1]
    if h_BLD.shape[-1] != D:
        name = type(bare(model)).__name__
        raise ModelError(f"{name}: unsloth returns no hidden states for it; set model.backend: plain")
    return h_BLD


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
