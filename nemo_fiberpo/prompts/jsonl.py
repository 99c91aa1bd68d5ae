"""Strict reading of JSON lines."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_fiberpo.storage import reading


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each with "file:line". ValueError for a file that cannot be read."""
    try:
        with reading.open_regular(path) as file:  # a FIFO would wait for a writer
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a duplicate name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: duplicate name in an object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def parse_line(line: bytes) -> Any:
    """A line of JSON: UTF-8, unique names in objects, finite numbers, and text without half of a surrogate pair.
    ValueError otherwise."""
    try:
        text = line.decode().strip()
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - 20) : error.start]
        raise ValueError(f"half of a surrogate pair ({error.object[error.start]!a}) after {around!r}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    return data
