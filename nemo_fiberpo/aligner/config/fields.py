"""Sections of a config as checked dataclasses: what `settings` and `algorithm` share."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_fiberpo.config import mapping, reject_unknown_keys
from nemo_fiberpo.values import nearest


def plain(cfg: DictConfig, section: str) -> dict[str, Any]:
    """A section of a config as plain values, references resolved. ValueError unless it is a mapping."""
    return mapping(OmegaConf.to_container(cfg[section], resolve=True, throw_on_missing=True), section)


def build(kind: type, values: dict[str, Any], where: str, **extra: Any) -> Any:
    """The dataclass `kind` with these values and `extra`; ValueErrors name the field below `where`."""
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


def whole(settings: Any, name: str, least: int) -> None:
    """ValueError unless that field is a whole number of at least `least`."""
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: must be a whole number of at least {least}, got {value!r}")


def choice(settings: Any, name: str, valid: tuple[str, ...]) -> None:
    """ValueError with the nearest valid value unless that field has one of them."""
    value = getattr(settings, name)
    if value not in valid:
        raise ValueError(f"{name}: {value!r} is unknown{nearest(value, valid)}")
