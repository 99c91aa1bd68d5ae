"""A user's function for `token_labels`: by kind of character, and by the prompt's domain."""

from __future__ import annotations

from typing import Any


def kinds(token_ids: list[int], text: str, record: Any) -> tuple[list[int], list[str]]:
    """Digits of any domain, and everything else by domain. A token of the quickstart's tokenizer is a character, the
    one that ends a text is written by name."""
    assert len(token_ids) <= len(text)
    return [int(not text[place : place + 1].isdigit()) for place in range(len(token_ids))], ["digit", record.domain]


def too_few(token_ids: list[int], text: str, record: Any) -> tuple[list[int], list[str]]:
    """One label less than there are tokens."""
    return [0] * (len(token_ids) - 1), ["a"]
