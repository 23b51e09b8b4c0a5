"""How much memory a batch of answers takes beside the weights, known before it starts.

    bound(rows, tokens, kept) = rows * row(tokens) + shared(tokens) + kept tokens of the cache

`row` is a row's part of the key-value cache, with the room that the cache reserves (cache.py). `shared` does
not grow with the batch, because the loop works in chunks: a prefill of so many tokens, the logits of so many
rows, the sampler's work arrays, the largest 4-bit matrix unpacked, and a copy of the adapters (adapters.py).
`kept` are the tokens of a prefix that prompts share, once per adapter.
"""

from __future__ import annotations

from typing import Any

import torch

from .accelerator import accelerator
from .cache import room_for
from .head import head_of
from .memory import MIB

PREFILL_TOKENS = 4096
"""Tokens of one prefill forward, padding included; a longer prompt goes alone."""
LOGITS_BYTES = 64 * MIB
"""Logits that exist at a time, unless a single row has more."""
MOST_ROWS = 1024


class Bound:
    """Bytes that generating with `model` takes at most, beside the weights.

    It grows with the rows of a batch and with the tokens of its longest row, prompt and answer.
    """

    def __init__(self, model: Any):
        self.config, self.head = model.config.get_text_config(), head_of(model)
        weight_VD, heads = self.head.weight_VD, self.config.num_attention_heads
        self.device, self.size = weight_VD.device, weight_VD.element_size()
        head_width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        self.query_width = heads * head_width
        layers = self.config.num_hidden_layers + 1  # a layer that grows exists twice for a moment
        self.cached_token = layers * 2 * kv_heads * head_width * self.size  # keys and values
        self.attended = 2 * self.query_width * self.size  # those of a layer, repeated for every query head
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        self.stacked = sum(p.numel() * p.element_size() for p in adapters)
        matrices = [m for m in model.modules() if hasattr(m, "quant_state")]
        self.unpacked = max((m.in_features * m.out_features * self.size for m in matrices), default=0)

    def __call__(self, rows: int, tokens: int, kept: int = 0) -> int:
        return rows * self.row(tokens) + self.shared(tokens) + kept * self.cached_token

    def rows(self, tokens: int, budget: int, kept: int = 0) -> int:
        """Rows that fit, at least one."""
        return int(max(1, (budget - self(0, tokens, kept)) // self.row(tokens)))

    def row(self, tokens: int) -> int:
        return room_for(tokens) * self.cached_token + tokens * self.attended

    def shared(self, tokens: int) -> int:
        prefill = max(PREFILL_TOKENS, tokens) * self.prefilled_token(tokens)
        logits = max(LOGITS_BYTES, self.head.row_bytes)
        return prefill + self.stacked + max(logits + self.sampler(), 2 * self.unpacked)

    def prefilled_token(self, tokens: int) -> int:
        """A token's part of a prefill: its cache, the widest layer's activations, its row of the mask.

        LoRA computes in float32 and picks the rows of each adapter, hence the copies beside the layer's own.
        """
        width = max(getattr(self.config, "intermediate_size", 0), self.query_width, self.config.hidden_size)
        activations = width * (6 * self.size + 12) + self.config.hidden_size * 8 * self.size
        mask = tokens * (6 + 2 * self.size)
        if self.config._attn_implementation == "eager":
            mask += tokens * self.config.num_attention_heads * (8 + self.size)
        return self.cached_token + self.attended + activations + mask

    def share_of_a_copy(self, tokens: int) -> float:
        """A copied token of the cache, as a share of a prefilled one."""
        return (self.cached_token + self.attended) / self.prefilled_token(tokens)

    def sampler(self) -> int:
        """float32, float32 and float64 of a few rows; the nucleus sorts them besides."""
        V = self.head.weight_VD.shape[0]
        return sampler_rows(self.device, V) * V * (16 + 32)


def sampler_rows(device: torch.device, V: int) -> int:
    """Rows sampled at a time: few enough to stay in a CPU's cache, enough for each of its threads."""
    if device.type == "cpu":
        return max(torch.get_num_threads(), 2**18 // V)
    return max(1, 2**24 // V)


def rows_that_fit(model: Any, tokens: int, kept: int = 0) -> int:
    """Rows of `tokens` tokens whose bound is half of the free memory (at most 4 GB on a CPU), 1 to 1024."""
    bound = Bound(model)
    budget = accelerator(bound.device).free_memory // 2
    if bound.device.type == "cpu":
        budget = min(budget, 2**32)
    return min(MOST_ROWS, bound.rows(tokens, budget, kept))
