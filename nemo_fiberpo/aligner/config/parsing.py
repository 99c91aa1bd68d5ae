"""From a section of a config to its checked dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig

from nemo_fiberpo.config import mapping, reject_unknown_keys
from nemo_fiberpo.plain import as_plain


def plain(cfg: DictConfig, section: str) -> dict[str, Any]:
    """A section as plain values, references resolved."""
    node = cfg.get(section)
    if not isinstance(node, DictConfig):
        raise ValueError(f"{section}: must be a mapping, got {node!r}")
    return mapping(as_plain(node), section)


def build(kind: type, values: dict[str, Any], where: str, **extra: Any) -> Any:
    """The dataclass `kind` with these values and `extra`. ValueErrors name the field below `where`."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    reject_unknown_keys(values, fields, where)
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and values.get(name) is None and name not in extra:
            raise ValueError(f"{where}.{name}: is required")
    try:
        return kind(**values, **extra)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
