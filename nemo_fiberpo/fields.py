"""Fields of settings: a key's default, bounds and meaning in one place.

    @dataclass(frozen=True)
    class DataSettings(Settings):
        \"""The prompts to train on.\"""

        max_prompt_length: int = setting(512, at_least=1)
        \"""Longest prompt, in tokens.\"""

`check`, which `Settings` calls, validates the values; `keys` lists what the reference of the config prints.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from .values import number, one_of, short, true_or_false, whole_number

_NAME = "setting"
_WORDS: dict[type, str] = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_COLLECTIONS: tuple[Any, ...] = (Sequence[str], Mapping[str, str], Mapping[str, int], Mapping[str, Any])


@dataclass(frozen=True)
class Bounds:
    """What a field may hold, beyond its annotation."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    form: str = ""  # what a value looks like, where the annotation is not enough
    may_change: bool = False  # a resumed run may have another value

    def words(self) -> str:
        """The limits of a number, in words."""
        if self.at_least is not None and self.at_most is not None:
            return f", from {self.at_least:.10g} to {self.at_most:.10g}"
        limits = {"at least": self.at_least, "greater than": self.above, "at most": self.at_most}
        return "".join(f", {words} {limit:g}" for words, limit in limits.items() if limit is not None)


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] = (),
    form: str = "",
    may_change: bool = False,
) -> Any:
    """A field of a dataclass; required if it has no default. The string literal below it is its meaning.

    at_least, above, at_most  limits of a number
    choices                   all values of a text
    form                      what a value looks like, for annotations other than bool, int, float, str and null
    may_change                whether a resumed run may have another value
    """
    bounds = Bounds(at_least, above, at_most, tuple(choices), form, may_change)
    metadata = {_NAME: bounds}
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """A base for dataclasses of settings: their values are checked when one is made."""

    def __post_init__(self) -> None:
        check(self)


def check(settings: Any) -> None:
    """ValueError naming the first field of a dataclass that does not fit its annotation and bounds.

    Numbers become floats where the annotation is float. Checked are bool, int, float, str, sequences of str and
    mappings with str keys, each with or without None; other annotations are left to the class.
    """
    of: type = type(settings)
    for name, (kind, optional, bounds) in _checked(of).items():
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if bounds.choices:
            one_of(value, name, bounds.choices)
        elif kind is bool:
            true_or_false(value, name)
        elif kind is int:
            whole_number(value, name, bounds.at_least, bounds.at_most)
        elif kind is float:
            limits = {"at_least": bounds.at_least, "above": bounds.above, "at_most": bounds.at_most}
            object.__setattr__(settings, name, number(value, name, **limits))
        elif kind is str and not isinstance(value, str):
            raise ValueError(f"{name}: must be a text, got {value!r}")
        elif kind is not str and not _is_collection(value, kind):
            form = f"mapping {bounds.form}" if bounds.form.startswith("{") else bounds.form
            raise ValueError(f"{name}: must be a {form}, got {short(value)}")


def _is_collection(value: Any, kind: Any) -> bool:
    """Whether `value` is a list of str, or a mapping with str keys."""
    of = list | tuple if get_origin(kind) is Sequence else Mapping
    return isinstance(value, of) and all(isinstance(entry, str) for entry in value)


@cache
def _checked(kind: type) -> dict[str, tuple[type, bool, Bounds]]:
    """Type, whether it may be None, and bounds of each field that `check` checks."""
    hints = get_type_hints(kind)
    found = {}
    for entry in dataclasses.fields(kind):
        plain, optional = _plain(hints[entry.name])
        bounds = entry.metadata.get(_NAME, Bounds())
        if entry.init and (plain in _WORDS or bounds.choices or plain in _COLLECTIONS):
            found[entry.name] = (plain, optional, bounds)
    return found


def _plain(hint: Any) -> tuple[Any, bool]:
    """A type without `| None`, and whether None was one of its members."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        if len(members) < len(get_args(hint)):
            return (members[0] if len(members) == 1 else hint), True
    return hint, False


@dataclass(frozen=True)
class Key:
    """A key of the config, as its reference lists it."""

    name: str
    form: str  # type, bounds and choices
    default: Any  # MISSING: must be given
    meaning: str
    may_change: bool = False


def keys(kind: type, prefix: str = "") -> list[Key]:
    """The keys of a settings class, in order. A key whose default is a dataclass is expanded into dotted names."""
    found = []
    for owner, entry, name, default in _leaves(kind, prefix):
        bounds = entry.metadata.get(_NAME, Bounds())
        form = bounds.form or _form(get_type_hints(owner)[entry.name], bounds)
        found.append(Key(name, form, default, meanings(owner).get(entry.name, ""), bounds.may_change))
    return found


def _leaves(kind: type, prefix: str) -> Iterator[tuple[type, dataclasses.Field[Any], str, Any]]:
    """(owning class, field, dotted name, default) of each key."""
    for entry in dataclasses.fields(kind):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if dataclasses.is_dataclass(default) and not entry.metadata.get(_NAME, Bounds()).form:
            yield from _leaves(type(default), f"{prefix}{entry.name}.")
        elif entry.init:
            yield kind, entry, f"{prefix}{entry.name}", default


def _form(hint: Any, bounds: Bounds) -> str:
    plain, optional = _plain(hint)
    form = ", ".join(bounds.choices) or _WORDS.get(plain, "") + bounds.words()
    return f"{form}, or null" if optional else form


def summary(kind: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


@cache
def meanings(kind: type) -> Mapping[str, str]:
    """The string literal below each field of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base) and base.__module__ in sys.modules:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(body, ast.ClassDef)
            for entry, below in zip(body.body, body.body[1:], strict=False):
                name = entry.target if isinstance(entry, ast.AnnAssign) else None
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(name, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[name.id] = inspect.cleandoc(text.value)
    return found


def changeable(kind: type, prefix: str) -> list[str]:
    """The dotted names of the keys that a resumed run may change."""
    leaves = _leaves(kind, f"{prefix}.")
    return [name for _, entry, name, _ in leaves if entry.metadata.get(_NAME, Bounds()).may_change]
