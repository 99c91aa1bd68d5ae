"""Replacing attributes of other people's modules: opt-in, reversible, and naming the symbol that is gone.

Shared by `megatron.cpu`, `nemo_cpu` and `hydra_support.named_strata`, the places that patch anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """`module.attribute` becomes `value`, or `wrap(original)`; `missing_ok` for names only some versions have.

    `module` is an import path, or that of a class inside a module ("package.module:Class").
    """

    module: str
    attribute: str
    reason: str
    value: Any = None
    wrap: Callable[[Any], Any] | None = None
    missing_ok: bool = False

    def resolve(self) -> tuple[Any, Any]:
        """The object that holds the attribute, and the attribute's value now (`_ABSENT` where it has none)."""
        path, _, inner = self.module.partition(":")
        holder = importlib.import_module(path)
        if inner:
            holder = getattr(holder, inner)
        original = getattr(holder, self.attribute, _ABSENT)
        if original is _ABSENT and not self.missing_ok:
            raise ImportError(
                f"{self.module}.{self.attribute} does not exist in this version; it would be replaced because: "
                f"{self.reason}. Nothing was changed."
            )
        return holder, original


class Patches:
    """A set of patches that is applied as a whole and undone as a whole."""

    def __init__(self, patches: Iterable[Patch]):
        self._patches = tuple(patches)
        self._originals: list[tuple[Any, str, Any]] = []

    def apply(self) -> None:
        """Raises ImportError naming the first missing symbol, before anything is changed."""
        resolved = [(patch, *patch.resolve()) for patch in self._patches]
        for patch, holder, original in resolved:
            if original is _ABSENT and patch.wrap:
                continue
            self._originals.append((holder, patch.attribute, original))
            setattr(holder, patch.attribute, patch.wrap(original) if patch.wrap else patch.value)

    def undo(self) -> None:
        """Every attribute is the object it was."""
        for holder, attribute, original in reversed(self._originals):
            if original is _ABSENT:
                delattr(holder, attribute)
            else:
                setattr(holder, attribute, original)
        self._originals.clear()
