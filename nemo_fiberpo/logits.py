"""Whether log-probs are computed from all logits or by blocks of the vocabulary, and in what pieces: what a plan of the
memory and the training step both go by."""

from __future__ import annotations

from .values import nearest

CHUNK_ELEMENTS = 1 << 24
"""Logits that the plain path works on at a time, at most."""
CHUNKS = 8
"""In how many chunks it takes the tokens, at least: what is held beside the logits is a part of them."""
BLOCKS = 32
"""In how many blocks the chunked path takes the vocabulary, unless they would have fewer than LEAST_COLUMNS columns."""
LEAST_COLUMNS = 512

LOG_PROBS = ("chunked", "logits", "auto")
AUTO_BYTES = 2**30
"""Float32 logits of a micro-batch on a rank from which on `auto` is `chunked`: 2048 tokens of a vocabulary of 128k."""


def check_choice(logprobs: object, field: str = "logprobs") -> None:
    """ValueError naming the field for a value that is none of LOG_PROBS."""
    if logprobs not in LOG_PROBS:
        hint = nearest(logprobs, LOG_PROBS) if isinstance(logprobs, str) else f"; use one of: {', '.join(LOG_PROBS)}"
        raise ValueError(f"{field}: {logprobs!r} is unknown{hint}")


def is_large(tokens: int, columns: int) -> bool:
    """Whether `auto` is `chunked`, for `tokens` of a micro-batch and `columns` of the vocabulary on a rank."""
    return 4 * tokens * columns >= AUTO_BYTES


def block_width(columns: int) -> int:
    """Columns of a block of the chunked path, of the `columns` of the vocabulary on a rank."""
    return min(max(-(-columns // BLOCKS), LEAST_COLUMNS), max(columns, 1))


def chosen(
    logprobs: str, *, samples: int, length: int, vocabulary: int, tensor_parallel: int, context_parallel: int
) -> str:
    """`logprobs`, with `auto` decided for a run by its largest micro-batch: `samples` sequences of `length` tokens. So
    every pass of a run computes log-probs in the same way, however long its rows are."""
    if logprobs != "auto":
        return logprobs
    large = is_large(samples * length // context_parallel, vocabulary // tensor_parallel)
    return "chunked" if large else "logits"
