"""How an adapter starts: at zero, or from the base's own weights (`adapter.init`).

PiSSA and OLoRA start with a low-rank part B0 A0 of each weight W, and take it out of the base: in training
the base is W - s B0 A0. On disk the base stays W for all adapters, since evaluation, merging and the page put
several of them over one base. So what is saved is a plain LoRA of twice the rank over W:

    s (B A - B0 A0) = s [B, -B0] [A; A0]

LoftQ starts with a low-rank part of W - Q(W), what quantization lost, and leaves the base as it is. EVA
starts at zero like the default, with A along the main directions of each layer's inputs.

Shapes (docs/shapes.md): R rank, O and I outputs and inputs of a layer, K = min(O, I); N = B * L positions
of a batch, M of them not padding.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from ..config import AdapterConfig
from ..data.batches import Batch
from ..errors import ModelError
from .head import bare, hidden_states

CHANGES_BASE = ("pissa", "olora")
OVERSAMPLED, ITERATIONS = 32, 8
"""Directions beyond the rank, and power iterations, with which a truncated SVD finds the first ones."""
Weights = dict[str, torch.Tensor]


@torch.no_grad()
def correct_quantization(model: Any, plain: Any) -> None:
    """LoftQ, arXiv 2310.08659, one step: s B A is the best approximation of rank R to W - Q(W).

    model: a peft model over a 4-bit base; plain: the same base, not quantized, on the CPU. peft has this as
    `replace_lora_weights_loftq`, but on CUDA only, and without dividing by the scaling s.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in bare(model).named_modules():
        if "default" not in getattr(layer, "lora_A", ()):
            continue
        packed = layer.get_base_layer().weight
        W_OI = plain.get_submodule(name).weight.to(packed.device, torch.float32)
        lost_OI = W_OI - dequantize_4bit(packed.data, packed.quant_state).float()
        left_OK, S_K, right_KI = torch.linalg.svd(lost_OI, full_matrices=False)
        R = layer.r["default"]
        root_R = (S_K[:R] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_(root_R[:, None] * right_KI[:R])
        layer.lora_B["default"].weight.copy_(left_OK[:, :R] * root_R)


@torch.no_grad()
def follow_inputs(model: Any, batch: Batch) -> None:
    """EVA, arXiv 2410.07170: A_RI becomes the top R right-singular vectors of a layer's inputs x_MI.

    B stays 0. No other R directions keep more of the inputs (its Theorem 3.1). model: a new peft model, whose
    outputs are the base's; batch: the rows to look at, in one forward pass, prompts included.

    Ranks are not redistributed: every layer keeps R, the paper's rho = 1. The paper adds batches until the
    vectors converge; here one batch decides. peft's `initialize_lora_eva_weights` takes out the inputs' mean
    first and skips prompts, and its result depends on how rows are batched.

    Raises ModelError for a rank above M or I, for inputs that are not finite, and for a layer that does not
    read every token.
    """
    real_N = batch.attention_mask_BL.flatten().bool().to(model.device)
    layers = {n: m for n, m in bare(model).named_modules() if "default" in getattr(m, "lora_A", ())}
    latest: list[Any] = [None, None]  # q, k and v read the same tensor

    def follow(name: str, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        A_RI = layer.lora_A["default"].weight
        x_BLI = inputs[0]
        if x_BLI.shape[:-1].numel() != len(real_N):
            return
        if x_BLI is not latest[0]:
            latest[:] = x_BLI, _main_directions(x_BLI.flatten(0, -2)[real_N], len(A_RI), name)
        A_RI.copy_(latest[1])
        layers.pop(name, None)

    hooks = [layer.register_forward_pre_hook(partial(follow, name)) for name, layer in layers.items()]
    try:
        hidden_states(model, **batch.inputs(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    if layers:
        raise ModelError(
            f"adapter.init: eva needs layers that read every token, which {min(layers)} does not; leave it "
            "out of adapter.target_modules, or use default"
        )


def _main_directions(x_MI: torch.Tensor, R: int, name: str) -> torch.Tensor:
    """The top R right-singular vectors [R, I] of a layer's inputs, on the CPU: MPS cannot compute them."""
    most = min(x_MI.shape)
    if most < R:
        tokens, width = x_MI.shape
        raise ModelError(
            f"adapter.r: {R} is more than eva finds in the inputs of {name} ({tokens} tokens, {width} wide); "
            f"use at most {most}, or adapter.init: default"
        )
    if not x_MI.isfinite().all():
        raise ModelError(f"adapter.init: eva: the inputs of {name} are not finite; use another model.dtype")
    _, _, v_IK = torch.svd_lowrank(x_MI.cpu().float(), min(R + OVERSAMPLED, most), ITERATIONS)
    return v_IK[:, :R].T


def start_of(model: Any, config: AdapterConfig) -> Weights | None:
    """What the start took out of the base: the adapter's first weights; None if the base is unchanged.

    Raises ModelError if a layer is too small for the rank.
    """
    if config.init not in CHANGES_BASE:
        return None
    from peft import get_peft_model_state_dict

    first = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, weight in first.items():
        rank = weight.shape[0 if "lora_A" in name else 1]
        if rank != config.r:
            layer = name.rsplit(".lora_", 1)[0].removeprefix("base_model.model.")
            raise ModelError(
                f"adapter.r {config.r}: {config.init} allows at most {rank} for {layer}; lower it"
            )
    return {name: weight.detach().float().clone() for name, weight in first.items()}


def over_base(weights: Weights, start: Weights | None) -> Weights:
    """The adapter's weights as a LoRA over the unchanged base."""
    if start is None:
        return weights
    return {
        name: torch.cat([weight, start[name]]) if "lora_A" in name else torch.cat([weight, -start[name]], 1)
        for name, weight in weights.items()
    }


def from_base(saved: Weights, start: Weights | None) -> Weights:
    """The reverse of `over_base`."""
    if start is None:
        return saved
    return {
        name: (weight[: len(start[name])] if "lora_A" in name else weight[:, : start[name].shape[1]])
        for name, weight in saved.items()
    }


def config_over_base(config: Any, start: Weights | None) -> Any:
    """The peft config of `over_base`: twice the rank, the same scaling, and nothing to do at the start."""
    if start is None and config.init_lora_weights is True:
        return config
    made = copy.copy(config)
    made.init_lora_weights = True
    if start is not None:
        made.r = 2 * config.r
        made.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    return made
