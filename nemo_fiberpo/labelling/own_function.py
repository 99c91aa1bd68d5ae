"""Labels from a user's function."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..fields import setting
from ..values import cell_name
from .spelling import Response, Speller

MOST_CELLS = 1000


@dataclass(frozen=True)
class OwnFunction:
    """A custom function: (token ids, text, prompt record) -> (labels, names), for one response.

    labels  an integer per token; names[v] is the name of label v, without . / = or space

    It must depend only on its arguments, since tensor- and pipeline-parallel ranks call it for the same response.
    Raises ValueError naming the field.
    """

    function: str = setting(form="package.module:function")
    """Function that labels the tokens of a response, see docs/hierarchy.md."""

    names: tuple[str, ...] = setting((), form="list of names")
    """Names that the function may return, in order. Without them, each rollout has its own cells, and budgets cannot be
    set by name."""
    _call: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        module, _, name = self.function.partition(":") if isinstance(self.function, str) else ("", "", "")
        if not module or not name:
            raise ValueError(f"function: must be package.module:function, got {self.function!r}")
        try:
            call = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"function: {self.function!r} cannot be imported: {error}") from error
        if not callable(call):
            raise ValueError(f"function: {self.function!r} is not callable, got {call!r}")
        if isinstance(self.names, str) or not isinstance(self.names, Sequence) or len(self.names) == 1:
            raise ValueError(f"names: must be a list of two names or more, or left out, got {self.names!r}")
        names = tuple(cell_name(entry, "names", "a cell") for entry in self.names)
        if len(set(names)) < len(names):
            raise ValueError(f"names: must be unique, got {list(names)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "_call", call)

    @property
    def cells(self) -> tuple[str, ...] | None:
        """Names of the cells; None if they are known only after a rollout."""
        return self.names or None

    def check(self, speller: Speller) -> None:
        """Nothing to check: labels do not depend on the tokenizer."""

    def label(self, response: Response) -> list[str]:
        """Name of each token's cell. ValueError if the function returns anything else."""
        labels, names = self._returned(response)
        if len(labels) != len(response.ids):
            raise ValueError(
                f"function: {self.function!r} returned {len(labels)} labels for the {len(response.ids)} tokens of "
                f"{response.place}; it must return one for each"
            )
        called = [cell_name(name, f"function: {self.function!r}, names", "a cell") for name in names]
        if self.names and (other := set(called) - set(self.names)):
            raise ValueError(f"function: {self.function!r} returned the name {min(other)!r}; names has {self.names}")
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(called):
                raise ValueError(
                    f"function: {self.function!r} returned the label {label!r} for {response.place}; labels are the "
                    f"places of names, 0 to {len(called) - 1}"
                )
        return [called[label] for label in labels]

    def _returned(self, response: Response) -> tuple[list[Any], list[Any]]:
        returned = self._call(list(response.ids), response.text, response.record)
        try:
            labels, names = returned
            labels, names = (part.tolist() if hasattr(part, "tolist") else list(part) for part in (labels, names))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"function: {self.function!r} must return (labels, names), got {type(returned).__name__}"
            ) from error
        return labels, names
