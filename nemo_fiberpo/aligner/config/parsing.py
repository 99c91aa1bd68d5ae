"""From a section of a config to its checked dataclass."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig

from nemo_fiberpo.config import mapping, reject_unknown_keys
from nemo_fiberpo.plain import as_plain
from nemo_fiberpo.values import is_finite, short

_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_SEVERAL: dict[Any, str] = {
    bool: "true and false", int: "whole numbers", float: "numbers", str: "texts", Any: "values"
}  # fmt: skip


def plain(cfg: DictConfig, section: str) -> dict[str, Any]:
    """A section of a config as plain values, references resolved. ValueError unless it is a mapping."""
    node = cfg.get(section)
    if not isinstance(node, DictConfig):
        raise ValueError(f"{section}: must be a mapping, got {node!r}")
    return mapping(as_plain(node), section)


def build(kind: type, values: dict[str, Any], where: str, **extra: Any) -> Any:
    """The dataclass `kind` with these values and `extra`; ValueErrors name the field below `where`."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    reject_unknown_keys(values, fields, where)
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and values.get(name) is None and name not in extra:
            raise ValueError(f"{where}.{name}: is required")
    hints = get_type_hints(kind)
    wrong = [
        f"{where}.{name}: must be {in_words(hints[name])}, got {short(value)}"
        for name, value in values.items()
        if not fits(value, hints[name])
    ]
    try:
        made = kind(**values, **extra)  # whose own message comes first: it can tell what the field is for
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
    except (TypeError, AttributeError, OverflowError) as error:
        if not wrong:
            raise
        raise ValueError(wrong[0]) from error
    if wrong:
        raise ValueError(wrong[0])
    return made


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the type that a field is annotated with. A bool is no number, an integer is a float
    that has a value as one, and a type that no plain value has, such as a dataclass, is for the field's own check."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, entry) for entry in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, types.NoneType):
        return isinstance(value, hint)
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(fits(entry, get_args(hint)[0]) for entry in value)
    if get_origin(hint) is Mapping:
        names, entries = get_args(hint)
        return isinstance(value, dict) and all(fits(n, names) and fits(entry, entries) for n, entry in value.items())
    return True


def in_words(hint: Any) -> str:
    """What `fits` asks for."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(in_words(entry) for entry in get_args(hint))
    if get_origin(hint) is Sequence:
        return f"a list of {_SEVERAL.get(get_args(hint)[0], 'values')}"
    if get_origin(hint) is Mapping:
        return f"a mapping from names to {_SEVERAL.get(get_args(hint)[1], 'values')}"
    return _NAMES.get(hint, "null")
