"""Plain values from YAML files and OmegaConf, with one-line errors that name the key or the line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .yaml_text import check_yaml

NAMED = ("strata", "branches")
"""The keys of a hierarchy that hold strata, by name or as a list."""


def read_yaml(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
        check_yaml(text)
        with named_references():
            loaded = OmegaConf.load(io.StringIO(text))
        return as_plain(loaded)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{line}not valid YAML: {getattr(error, 'problem', None) or error}") from error


def as_plain(cfg: Any) -> Any:
    """`cfg` as plain dicts, lists and scalars, interpolations resolved. ValueError naming a key that cannot be resolved
    or is missing."""
    with named_references():
        node = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg)
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)


def strata_by_name(value: Any) -> Any:
    """A list of strata as a mapping by name, in order. Anything else, or a list without unique names, is returned as
    is; `load_hierarchy` reports the error."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return value
    names = [entry.get("name") for entry in value]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        return value
    return {entry["name"]: {key: field for key, field in entry.items() if key != "name"} for entry in value}


@contextmanager
def named_references(key: str = "") -> Iterator[None]:
    """Turn OmegaConf's errors, such as an unresolved reference, into one-line ValueErrors that name the key:
    OmegaConf's, or `key` if it has none."""
    try:
        yield
    except OmegaConfBaseException as error:
        named = f"{error.full_key or key}: ".removeprefix(": ")
        raise ValueError(f"{named}{str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ValueError("nested too deep, or circular references") from error
