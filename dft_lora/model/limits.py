"""The limits of a base, read from its config before its weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import DataError, ModelError

UNLIMITED = 10**9
"""Positions of a model without a limit."""


def refuse_running_state(config: Any, name: str) -> None:
    """Raises ModelError for a model with state-space or recurrent layers (Mamba, RWKV, Qwen3-Next).

    They carry a state along the row, but generation here caches keys and values of every token.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(kind, "_is_stateful", False):
        raise ModelError(
            f"model.name: {name!r} is a {config.model_type} model, with state-space or recurrent layers, "
            "which are not supported; use a model that has only attention layers"
        )


def positions(config: Any) -> int | None:
    """Tokens of the longest row a model accepts, rope scaling included; None if its config has no limit."""
    config = config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not stated:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]  # one per kind of layer
    stretched = [
        (part.get("factor") or 1) * (part.get("original_max_position_embeddings") or stated) for part in kinds
    ]
    return int(max(stated, *stretched))


def refuse_long_answers(longest: int, most_new: int, config: Any, name: str) -> None:
    """Raises DataError if the model has too few positions for the `longest` prompt with `most_new` tokens."""
    most = positions(config)
    if most is not None and longest + most_new > most:
        raise DataError(
            f"rollouts.max_new_tokens {most_new}: the longest prompt and answer have {longest + most_new} "
            f"tokens, and {name!r} has {most} positions"
        )


def refuse_unknown_tokens(ids: Iterable[int], config: Any, tokenizer: Any) -> None:
    """Raises ModelError for a token id without a row in the embedding.

    Only ids that occur are checked: Gemma's tokenizer has an image token that its text models lack.
    """
    V, highest = config.get_text_config().vocab_size, max(ids)
    if highest >= V:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ModelError(
            f"model.name: its tokenizer has token {highest} ({token!r}), but its embedding has {V} rows; "
            "use the tokenizer that the model was trained with, or resize the model's embedding"
        )


def overflows_float16(config: Any) -> bool:
    """Whether activations exceed float16's 65,504: Gemma-3-270M's do from its seventh layer on (measured)."""
    return config.get_text_config().model_type.startswith("gemma")


def caps_logits(config: Any) -> bool:
    """Whether the output head has a soft-cap (Gemma-2)."""
    return bool(getattr(config.get_text_config(), "final_logit_softcapping", None))
