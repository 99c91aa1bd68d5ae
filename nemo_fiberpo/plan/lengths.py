"""How long prompts and responses may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def response_length(model: Mapping[str, Any]) -> int:
    """Longest response in tokens, of NeMo's `model` section. ValueError if that is no number of tokens."""
    length = model["ppo"]["length_params"]["max_length"]
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"model.ppo.length_params.max_length: must be a whole number of at least 1, got {length!r}")
    return length


def too_long(model: Mapping[str, Any], prompt: int) -> Iterator[str]:
    """One message for every key of NeMo's `model` section that the longest prompt and response do not fit in. Learned
    positions have no row for what is beyond: generation and log-probs would end in an IndexError."""
    length = prompt + response_length(model)
    for name in ("encoder_seq_length", "max_position_embeddings"):
        limit = model.get(name)
        if limit and length > limit:
            yield (
                f"model.{name}: {limit} is less than data.max_prompt_length + model.ppo.length_params.max_length = "
                f"{length}; make it at least that, or the lengths shorter"
            )
