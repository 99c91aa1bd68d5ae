"""Positions in the response, in bins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..fields import setting
from .spelling import Response, Speller


@dataclass(frozen=True)
class TimeBins:
    """Bins of the position in the response, from 0, by where each begins: [0, 64, 256] makes 0-63, 64-255 and 256-end.

    Raises ValueError naming the field.
    """

    bins: Sequence[int] = setting(form="list of positions, such as [0, 64, 256]")
    """Positions in the response at which bins begin, in tokens, the first 0."""

    def __post_init__(self) -> None:
        given = self.bins
        bins = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
        if not bins or not all(isinstance(start, int) and not isinstance(start, bool) for start in bins):
            raise ValueError(f"bins: must be a list of positions, such as [0, 64, 256], got {given!r}")
        if bins[0] != 0:
            raise ValueError(f"bins: must begin with 0, the first token of a response, got {given!r}")
        if any(later <= earlier for earlier, later in pairwise(bins)):
            raise ValueError(f"bins: must increase, got {given!r}")
        if len(bins) < 2:
            raise ValueError(f"bins: {given!r} is one bin of all tokens, which classifies nothing")
        object.__setattr__(self, "bins", bins)

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the bins, in order."""
        ends = [f"{start}-{end - 1}" for start, end in pairwise(self.bins)]
        return (*ends, f"{self.bins[-1]}-end")

    def check(self, speller: Speller) -> None:
        """Nothing to check: positions do not depend on the tokenizer."""

    def label(self, response: Response) -> list[int]:
        """The bin of each token, as an index into `cells`."""
        return [bisect_right(self.bins, place) - 1 for place in range(len(response.ids))]
