"""Lengths of prompts and responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def response_length(model: Mapping[str, Any]) -> int:
    """Longest response in tokens, from NeMo's `model` section. ValueError unless it is a positive whole number."""
    length = model["ppo"]["length_params"]["max_length"]
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"model.ppo.length_params.max_length: must be a whole number of at least 1, got {length!r}")
    return length


def too_long(model: Mapping[str, Any], prompt: int) -> Iterator[str]:
    """A message for every key of NeMo's `model` section that the longest prompt and response exceed. Learned positions
    have no row beyond it: generation and log-probs would raise an IndexError."""
    length = prompt + response_length(model)
    for name in ("encoder_seq_length", "max_position_embeddings"):
        limit = model.get(name)
        if limit and length > limit:
            yield (
                f"model.{name}: {limit} is less than data.max_prompt_length + model.ppo.length_params.max_length = "
                f"{length}; raise it, or shorten the lengths"
            )
