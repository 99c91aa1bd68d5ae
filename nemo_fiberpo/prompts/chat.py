"""Prompts as chat messages: their format, and their tokens by the policy's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_fiberpo.values import nearest, short

ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("role", "content")


def check_messages(messages: Any) -> None:
    """ValueError naming the message unless this is a list of {"role", "content"} that a response can follow."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'messages: expected a list of {{"role": ..., "content": ...}}, found {short(messages)}')
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}: expected {{"role": ..., "content": ...}}, found {short(message)}')
        for key in message:
            if key not in _KEYS:
                raise ValueError(f"{where}.{key}: unknown key; a message has role and content")
        for key in _KEYS:
            if key not in message:
                raise ValueError(f"{where}.{key}: missing")
            if not isinstance(message[key], str):
                raise ValueError(f"{where}.{key}: expected a string, found {type(message[key]).__name__}")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}.role: {short(message['role'])} is unknown{nearest(message['role'], ROLES)}")
        # An empty system message disables the template's default one.
        if not message["content"].strip() and message["role"] != "system":
            raise ValueError(f"{where}.content: is empty")
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"messages[{len(messages) - 1}].role: the last message has the role {messages[-1]['role']!r}, but the "
            "policy answers a user or a tool; a reference answer goes into response"
        )


def chat_ids(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """The tokens of a conversation by the tokenizer's chat template, with the generation prompt.

    They are those of transformers' `apply_chat_template(messages, add_generation_prompt=True, tokenize=True)`, with a
    BOS token only if the template writes one.

    tokenizer  NeMo's. ValueError unless it wraps one of transformers with a template, or if the template fails.
    """
    wrapped = getattr(tokenizer, "tokenizer", None)
    if getattr(wrapped, "chat_template", None) is None:
        raise ValueError(
            "messages: the policy's tokenizer has no chat template; add one to its folder (chat_template in "
            "tokenizer_config.json, with model.tokenizer.library: huggingface), or write the text as prompt"
        )
    assert wrapped is not None
    try:
        ids = wrapped.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template is a program of the tokenizer's author
        raise ValueError(f"messages: the tokenizer's chat template fails: {type(error).__name__}: {error}") from error
    return list(ids)
