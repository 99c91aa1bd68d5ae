"""Parts of a response that match regular expressions, such as tool calls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..fields import setting
from ..values import cell_name
from .spelling import Response, Speller


@dataclass(frozen=True)
class Patterns:
    """Labels tokens by the expression whose match contains them, or a part of them.

    Where matches overlap, the expression that is listed first wins. Raises ValueError naming the field.
    """

    regex: str | Mapping[str, str] = setting(form="regular expression with one group, or {name: expression}")
    r"""Python's regular expressions; a dot matches line breaks too. The group of a single expression captures the name
    of the cell, as in `<tool name="(\w+)">.*?</tool>`."""

    names: tuple[str, ...] = setting((), form="list of names")
    """Names that the group of a single expression may capture; required there. A match with another name is `rest`,
    since the policy writes what is captured and must not be able to create cells."""

    rest: str = setting("rest")
    """Name of the cell of tokens that match no expression."""

    def __post_init__(self) -> None:
        if isinstance(self.regex, Mapping):
            for name, pattern in self.regex.items():
                _compiled(pattern, f"regex.{cell_name(name, 'regex', 'a cell')}")
            if not self.regex:
                raise ValueError("regex: must have at least one expression")
            if self.names:
                raise ValueError(f"names: are the keys of regex, {list(self.regex)}; leave them out")
        else:
            if _compiled(self.regex, "regex").groups != 1:
                raise ValueError(
                    f"regex: {self.regex!r} must have one group, which captures the name of the cell; or give a "
                    "mapping from names to expressions"
                )
            if isinstance(self.names, str) or not isinstance(self.names, Sequence) or not self.names:
                raise ValueError(f"names: must list the names that the group may capture, got {self.names!r}")
            names = tuple(cell_name(name, "names", "a cell") for name in self.names)
            object.__setattr__(self, "names", names)
        cell_name(self.rest, "rest", "a cell")
        if len(set(self.cells)) < len(self.cells):
            raise ValueError(f"names: must differ from each other and from rest, got {list(self.cells)}")

    @property
    def cells(self) -> tuple[str, ...]:
        """The names, `rest` last."""
        return (*map(str, self.regex if isinstance(self.regex, Mapping) else self.names), self.rest)

    def check(self, speller: Speller) -> None:
        """Nothing to check: the tokenizer does not determine what an expression can match."""

    def label(self, response: Response) -> list[int]:
        """The cell of each token, as an index into `cells`."""
        out = [len(self.cells) - 1] * len(response.ids)
        for cell, first, end in reversed(list(self._matches(response))):
            out[first:end] = [cell] * (end - first)
        return out

    def _matches(self, response: Response) -> Iterator[tuple[int, int, int]]:
        """Matches as (cell, first token, end); where they overlap, the earlier one wins."""
        numbers = {name: number for number, name in enumerate(self.cells[:-1])}
        by_name = self.regex if isinstance(self.regex, Mapping) else {None: self.regex}
        for name, pattern in by_name.items() if response.ids else ():
            for match in _compiled(pattern, "regex").finditer(response.text):
                cell = numbers.get(match[1] if name is None else str(name))
                if cell is not None and match.end() > match.start():
                    yield (cell, *response.tokens(*match.span()))


def _compiled(pattern: object, where: str) -> re.Pattern[str]:
    """The compiled pattern; ValueError naming `where` if it is not a regular expression, or matches an empty text."""
    try:
        compiled = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) and pattern else None
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
    if compiled is None or compiled.match(""):
        raise ValueError(f"{where}: must be a regular expression that matches some text, got {pattern!r}")
    return compiled
