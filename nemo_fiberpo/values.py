"""Checks of values that a user gives, and what their messages end with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def nearest(given: object, valid: Iterable[object]) -> str:
    """The tail of a message about an unknown name: the nearest valid one, or all of them where none is near."""
    options = [str(option) for option in valid]
    close = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(options)) or 'none'}"


def positive_number(value: object, where: str) -> float:
    """`value` as a float, or a ValueError that names `where`: it must be a finite number above 0 (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: must be a number, got {value!r}")
    if not is_finite(value) or value <= 0:
        raise ValueError(f"{where}: must be finite and greater than 0, got {short(value)}")
    return float(value)


def is_finite(value: float) -> bool:
    """Whether a number has a value as a float: an integer may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def short(value: object) -> str:
    """`value` for a message: of a long one the beginning, and of an integer that Python does not write out its size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def cell_name(name: object, where: str, of: str) -> str:
    """`name` if it can stand in the keys of metrics and overrides, else a ValueError that names `where`; `of` is what
    it would name."""
    text = str(name)
    if not text or set(text) & set("./= \t\n"):
        raise ValueError(
            f"{where}: {text!r} is no name for {of}: metrics and overrides need one without . / = or space"
        )
    return text


@contextmanager
def at(prefix: str) -> Iterator[None]:
    """Put `prefix` before the message of a ValueError from below."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error.__cause__
