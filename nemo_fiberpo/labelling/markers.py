"""Segments of a response between markers, such as <think> and </think>; and positions of markers in sampled tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..fields import setting
from ..values import cell_name
from .spelling import Response, Speller

Marker = str | tuple[int, ...]
"""A text, wherever it appears in the text of the tokens, or a sequence of token ids."""

WRONG_PAIR = "must be a pair of markers, [opening, closing], each a text or a list of token ids"


@dataclass(frozen=True)
class Markers:
    """Segments that begin with an opening marker and end with a closing one.

    A token belongs to the innermost open segment. A marker belongs to the segment that it opens or closes, and so does
    every token that contains a part of it. A segment that is never closed lasts to the end of the response. A closing
    marker closes the innermost open segment of its name and everything opened inside it; if none is open, it is
    ordinary text.
    Raises ValueError naming the field.
    """

    markers: Mapping[str, tuple[Marker, Marker]] = setting(form="{segment: [opening, closing]}")
    """Markers of each segment: texts, or lists of token ids. One marker may open and close."""

    rest: str = setting("rest")
    """Name of the cell of tokens that are in no segment."""

    first: str | None = setting(None, form="name of a segment, or null")
    """Segment in which responses begin, if the prompt opens it; null: `rest`."""

    def __post_init__(self) -> None:
        if not isinstance(self.markers, Mapping) or not self.markers:
            raise ValueError(
                f"markers: must be a mapping from names of segments to pairs of markers, got {self.markers!r}"
            )
        pairs = {}
        for key, value in self.markers.items():
            where = f"markers.{cell_name(key, 'markers', 'a segment')}"
            pairs[str(key)] = check_pair(value, where)
        object.__setattr__(self, "markers", pairs)
        cell_name(self.rest, "rest", "a segment")
        if self.rest in pairs:
            raise ValueError(f"rest: {self.rest!r} is a segment with markers; choose another name for the rest")
        if self.first is not None and self.first not in pairs:
            raise ValueError(f"first: must be one of the segments {', '.join(pairs)}, got {self.first!r}")
        seen: dict[Marker, str] = {}
        for name, pair in pairs.items():
            for marker in dict.fromkeys(pair):
                if marker in seen:
                    raise ValueError(f"markers.{name}: {marker!r} is a marker of {seen[marker]} already")
                seen[marker] = name

    @property
    def cells(self) -> tuple[str, ...]:
        """The segments, `rest` last."""
        return (*self.markers, self.rest)

    def check(self, speller: Speller) -> None:
        """ValueError for a marker that the tokenizer cannot produce."""
        for name, pair in self.markers.items():
            for marker in pair:
                check_marker(marker, speller, f"markers.{name}")

    def label(self, response: Response) -> list[int]:
        """The segment of each token, as an index into `cells`."""
        names = list(self.markers)
        owner = {marker: number for number, pair in enumerate(self.markers.values()) for marker in pair}
        opens = {pair[0] for pair in self.markers.values()}
        closes = {pair[1] for pair in self.markers.values()}
        rest = len(names)
        stack = [] if self.first is None else [names.index(self.first)]
        out: list[int] = []
        for mark in occurrences(list(owner), response):
            segment = owner[mark.marker]
            out += [stack[-1] if stack else rest] * (mark.first - len(out))
            if mark.marker in closes and segment in stack:
                while stack.pop() != segment:
                    pass
            elif mark.marker in opens:
                stack.append(segment)
            else:
                continue
            out += [segment] * (mark.end - len(out))
        return out + [stack[-1] if stack else rest] * (len(response.ids) - len(out))


class Occurrence(NamedTuple):
    """A marker in the tokens [first, end), at the characters [start, stop)."""

    first: int
    start: int
    end: int
    stop: int
    marker: Marker


def occurrences(markers: Sequence[Marker], response: Response) -> Iterator[Occurrence]:
    """Occurrences of the markers from left to right, without overlaps: the leftmost first, of those the longest."""
    found = sorted(
        [*_of_text(markers, response), *_of_ids(markers, response)],
        key=lambda mark: (mark.first, mark.start, -mark.end, -mark.stop),
    )
    last: Occurrence | None = None
    for mark in found:
        by_text = last is not None and isinstance(mark.marker, str) and isinstance(last.marker, str)
        if last is None or (mark.start >= last.stop if by_text else mark.first >= last.end):
            last = mark
            yield mark


def _of_text(markers: Sequence[Marker], response: Response) -> Iterator[Occurrence]:
    texts = sorted((marker for marker in markers if isinstance(marker, str)), key=len, reverse=True)
    if texts and response.ids:
        for match in re.finditer("|".join(map(re.escape, texts)), response.text):
            first, end = response.tokens(*match.span())
            yield Occurrence(first, match.start(), end, match.end(), match[0])


def _of_ids(markers: Sequence[Marker], response: Response) -> Iterator[Occurrence]:
    begins: dict[int, list[tuple[int, ...]]] = {}
    for marker in markers:
        if not isinstance(marker, str):
            begins.setdefault(marker[0], []).append(marker)
    for first, token in enumerate(response.ids) if begins else ():
        for marker in begins.get(token, ()):
            end = first + len(marker)
            if tuple(response.ids[first:end]) == marker:
                yield Occurrence(first, response.start_of(first), end, response.start_of(end), marker)


def as_marker(value: object, where: str) -> Marker:
    """`value` as a marker; ValueError naming `where` unless it is one."""
    if isinstance(value, str) and value:
        return value
    ids = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not ids or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"{where}: must be a text or a list of token ids, not empty, got {value!r}")
    return ids


def check_pair(value: object, where: str) -> tuple[Marker, Marker]:
    """An opening and a closing marker; ValueError naming `where` unless `value` is such a pair."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{where}: {WRONG_PAIR}, got {value!r}")
    if all(isinstance(token, int) for token in value):
        raise ValueError(f"{where}: {WRONG_PAIR}, got {value!r}; of one token each: {[[token] for token in value]}")
    return as_marker(value[0], where), as_marker(value[1], where)


def check_marker(marker: Marker, speller: Speller, where: str) -> None:
    """ValueError for a text that does not come back from the tokenizer, or an id outside its vocabulary."""
    tokenizer = speller.tokenizer
    if isinstance(marker, str):
        ids = tokenizer.text_to_ids(marker)
        if marker not in (made := speller.spell(ids)[0]):
            raise ValueError(
                f"{where}: the tokenizer cannot produce {marker!r}: its tokens for it, {ids}, decode to {made!r}; no "
                "response could contain it"
            )
        return
    outside = [token for token in marker if not 0 <= token < tokenizer.vocab_size]
    if outside:
        raise ValueError(f"{where}: token {outside[0]} is outside the vocabulary of {tokenizer.vocab_size}")
