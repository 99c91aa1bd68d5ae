"""Small tokenizers, and labels of tokens computed character by character, by none of the package's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Pieces:
    """A vocabulary of texts of any length. Special tokens are left out of decoded text, as NeMo's tokenizers do, and a
    space before the first word is dropped, as SentencePiece does."""

    def __init__(self, pieces: Sequence[str], special: Sequence[str] = ()):
        self.pieces, self.special = [*special, *pieces], set(special)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def text_to_ids(self, text: str) -> list[int]:
        """The longest piece that fits, again and again; what fits none is left out."""
        ids = []
        while text:
            fitting = [piece for piece in self.pieces if text.startswith(piece)]
            longest = max(fitting, key=len, default=text[0])
            ids += [self.pieces.index(longest)] if fitting else []
            text = text[len(longest) :]
        return ids

    def ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[token] for token in ids]

    def ids_to_text(self, ids: list[int]) -> str:
        text = "".join(piece for piece in self.ids_to_tokens(ids) if piece not in self.special)
        return text[1:] if text.startswith(" ") else text


class Bytes:
    """A token per byte of UTF-8."""

    vocab_size = 256

    def text_to_ids(self, text: str) -> list[int]:
        return list(text.encode())

    def ids_to_text(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def segments(pieces: Sequence[str], markers: Mapping[str, Sequence[str]], rest: str, first: str | None) -> list[str]:
    """The segment of each token by the definition: the innermost one that is open; a marker, with every token that it
    has a part in, is of the segment that it opens or closes."""
    text, place = "".join(pieces), 0
    opened = [] if first is None else [first]
    owner: list[str] = []
    of_marker: list[bool] = []
    while place < len(text):
        here = [(name, marker) for name, pair in markers.items() for marker in pair if text.startswith(marker, place)]
        name, marker = max(here, key=lambda entry: len(entry[1]), default=("", text[place]))
        counts = False
        if here and marker == markers[name][1] and name in opened:
            del opened[len(opened) - 1 - opened[::-1].index(name) :]
            counts = True
        elif here and marker == markers[name][0]:
            opened.append(name)
            counts = True
        owner += [name if counts else opened[-1] if opened else rest] * len(marker)
        of_marker += [counts] * len(marker)
        place += len(marker)
    out, start = [], 0
    for piece in pieces:
        chars = range(start, start + len(piece))
        out.append(owner[next((char for char in chars if of_marker[char]), start)])
        start += len(piece)
    return out
