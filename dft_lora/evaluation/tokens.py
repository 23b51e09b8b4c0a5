"""Score given texts token by token under a model: probability, entropy, gradient norm. Nothing is sampled.

Objectives may be compared by these metrics, never by their own losses. Each batch takes one forward pass
through the chunked loss, so the logits of all positions never exist at the same time.

Legend: B rows, L positions, M scored tokens, E examples, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..data.batches import collate
from ..data.templates import Example, Renderer
from ..loss import Head, token_logps
from ..model.adapters import adapter_layers, mixed
from ..model.head import check_head, hidden_states
from .token_table import TokenTable

ROWS = 16
ENTROPY_ROWS = 64  # positions whose logits [., V] exist at the same time: 39 MB at V = 152k


def score(
    model: Any,
    examples: Sequence[Example],
    *,
    pad_id: int,
    adapter: str | None = None,
    head: Head | None = None,
) -> TokenTable:
    """Score the supervised tokens of `examples` in float32 under one adapter; None is the bare base.

    Raises ModelError when the model has a head that cannot be scored exactly.
    """
    head = head or check_head(model)
    columns: list[tuple[np.ndarray, ...]] = []
    for example_M, h_MD, y_M in states(model, examples, pad_id=pad_id, adapter=adapter):
        scores = token_logps(
            h_MD.to(head.weight_VD.dtype), targets=y_M, **head.arguments(), keep_jacobian=True
        )
        pull_M = scores.need("jacobian").float().norm(dim=-1)
        parts = (example_M, y_M, scores.logp, scores.entropy, pull_M, scores.is_top1)
        columns.append(tuple(part.detach().cpu().numpy() for part in parts))
    of_M, ids_M, logp_M, entropy_M, pulls_M, top1_M = (np.concatenate(c) for c in zip(*columns, strict=True))
    order_M = np.argsort(of_M, kind="stable")
    return TokenTable(
        ids_M[order_M].astype(np.int32),
        of_M[order_M].astype(np.int32),
        logp_M[order_M].astype(np.float32),
        entropy_M[order_M].astype(np.float32),
        pulls_M[order_M].astype(np.float32),
        top1_M[order_M].astype(np.uint8),
    )


def states(
    model: Any, examples: Sequence[Example], *, pad_id: int, adapter: str | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of (example [M], hidden state [M, D], target [M]) of the supervised tokens."""
    order_E = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    device = next(model.parameters()).device
    for start in range(0, len(order_E), ROWS):
        rows = order_E[start : start + ROWS]
        batch = collate([examples[i] for i in rows], pad_id)
        names = [adapter] * len(rows)
        with torch.no_grad(), mixed(adapter_layers(model, names), names):
            h_BLD = hidden_states(model, **batch.inputs(device))[:, :-1]
        labels_BL = batch.labels_BL[:, 1:].to(device)
        row_M, position_M = (labels_BL >= 0).nonzero(as_tuple=True)
        example_M = torch.tensor(rows, device=device)[row_M]
        yield example_M, h_BLD[row_M, position_M], labels_BL[row_M, position_M]


def text_examples(renderer: Renderer, texts: Sequence[str]) -> list[Example]:
    """Plain texts as examples without a prompt: every token but the first is supervised."""
    found = [renderer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [Example(f"text-{i}", tuple(ids), 0) for i, ids in enumerate(found)]


def entropy(head: Head, h_MD: torch.Tensor, temperature: float = 1.0) -> float:
    """Mean entropy, in nats, of the head's distribution at `h_MD` with this sampling temperature."""
    total = 0.0
    for h_CD in h_MD.split(ENTROPY_ROWS):
        logp_CV = (head.logits(h_CD) / temperature).log_softmax(-1)
        total -= float((logp_CV.exp() * logp_CV).sum())
    return total / len(h_MD)


def temperature_for(head: Head, h_MD: torch.Tensor, wanted: float) -> float:
    """The temperature in [0.05, 5] at which the mean entropy at `h_MD` is `wanted` nats.

    Found by bisection, since the entropy of a softmax rises with its temperature.
    """
    low, high = 0.05, 5.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        if entropy(head, h_MD, middle) < wanted:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5
