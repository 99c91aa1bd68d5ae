"""Turns of a response that has several, each begun by a marker."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import setting
from ..values import whole_number
from .markers import Marker, as_marker, check_marker, occurrences
from .spelling import Response, Speller


@dataclass(frozen=True)
class Turns:
    """Turns of a response: the first from its beginning, each further one from a marker, which belongs to it.

    Raises ValueError naming the field.
    """

    split: Marker = setting(form="text, or list of token ids")
    """Marker that begins each further turn and belongs to it."""

    most: int = setting(8, at_least=2)
    """Number of turns that are distinguished; later ones count as the last."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "split", as_marker(self.split, "split"))
        whole_number(self.most, "most", 2)

    @property
    def cells(self) -> tuple[str, ...]:
        """turn_1, turn_2 and so on; the last includes all later turns."""
        return (*(f"turn_{number}" for number in range(1, self.most)), f"turn_{self.most}-end")

    def check(self, speller: Speller) -> None:
        """ValueError for a marker that the tokenizer cannot produce."""
        check_marker(self.split, speller, "split")

    def label(self, response: Response) -> list[int]:
        """The turn of each token, as an index into `cells`."""
        out: list[int] = []
        turn = 0
        for mark in occurrences([self.split], response):
            out += [min(turn, self.most - 1)] * (mark.first - len(out))
            turn += 1
        return out + [min(turn, self.most - 1)] * (len(response.ids) - len(out))
