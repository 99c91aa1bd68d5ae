"""Parsing a section of a config into its checked dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from omegaconf import DictConfig

from nemo_fiberpo.config import mapping, reject_unknown_keys
from nemo_fiberpo.plain import as_plain

T = TypeVar("T")


def plain(cfg: DictConfig, section: str) -> dict[str, Any]:
    """A section as plain values, references resolved."""
    node = cfg.get(section)
    if not isinstance(node, DictConfig):
        raise ValueError(f"{section}: must be a mapping, got {node!r}")
    return mapping(as_plain(node), section)


def read_section(kind: type[T], cfg: DictConfig, name: str, *, optional: bool = False) -> T:
    """A section as its dataclass `kind`; the defaults of `kind` if the section is optional and absent or null."""
    return build(kind, {} if optional and cfg.get(name) is None else plain(cfg, name), name)


def build(kind: type[T], values: dict[str, Any], where: str, **extra: Any) -> T:
    """The dataclass `kind` with these values and `extra`. ValueErrors name the field below `where`."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    reject_unknown_keys(values, fields, where)
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and values.get(name) is None and name not in extra:
            raise ValueError(f"{where}.{name}: is required")
    try:
        return kind(**values, **extra)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
