"""The text of sampled tokens, and the characters of each token."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """The methods of a tokenizer that are used. If `ids_to_text` omits special tokens, `ids_to_tokens` exists too."""

    @property
    def vocab_size(self) -> int: ...
    def text_to_ids(self, text: str) -> list[int]: ...
    def ids_to_text(self, ids: list[int]) -> str: ...


class Speller:
    """Decodes tokens one by one, with special tokens written out by name. Every token of the vocabulary is decoded
    once and cached."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def piece(self, token: int) -> str:
        """The text that the token adds, including its leading space in vocabularies whose words have one."""
        if token not in self._pieces:
            self._pieces[token] = self._decode(token)
        return self._pieces[token]

    def _decode(self, token: int) -> str:
        # Decoders drop the space before the first word of a text; the second of two equal tokens has it.
        once, twice = (self.tokenizer.ids_to_text([token] * number) for number in (1, 2))
        if not twice:
            name = getattr(self.tokenizer, "ids_to_tokens", None)
            return str(name([token])[0]) if name is not None else ""
        return twice[len(once) :] if twice.startswith(once) else once

    def spell(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text, and the position in it at which each token begins. Tokens that form a character only together, such
        as bytes, begin at the same position."""
        parts: list[str] = []
        starts: list[int] = []
        length = 0
        for incomplete, run in groupby(ids, key=lambda token: _INCOMPLETE in self.piece(token)):
            tokens = list(run)
            if incomplete:
                starts += [length] * len(tokens)
                pieces = [self.tokenizer.ids_to_text(tokens)]
            else:
                pieces = [self.piece(token) for token in tokens]
                place = length
                for piece in pieces:
                    starts.append(place)
                    place += len(piece)
            parts += pieces
            length += sum(map(len, pieces))
        return "".join(parts), starts


@dataclass(frozen=True)
class Response:
    """The sampled tokens of one response. `record` is that of the prompt, for custom functions."""

    ids: Sequence[int]
    speller: Speller
    record: Any = None

    @cached_property
    def _spelled(self) -> tuple[str, list[int]]:
        return self.speller.spell(self.ids)

    @property
    def place(self) -> str:
        """The prompt's file and line, for messages."""
        return f"a response to {getattr(self.record, 'where', 'a prompt')}"

    @property
    def text(self) -> str:
        return self._spelled[0]

    def tokens(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens [first, end) that contribute to the characters [start, stop) of the text, start < stop."""
        starts = self._spelled[1]
        first = bisect_left(starts, starts[bisect_right(starts, start) - 1])
        return first, bisect_right(starts, stop - 1)

    def start_of(self, token: int) -> int:
        """The character at which a token begins; the end of the text for the index after the last token."""
        text, starts = self._spelled
        return starts[token] if token < len(starts) else len(text)
