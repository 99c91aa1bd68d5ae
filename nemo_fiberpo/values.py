"""Checks of values that a user gives, and what their messages end with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def nearest(given: object, valid: Iterable[object]) -> str:
    """The tail of a message about an unknown name: the nearest valid one, or all of them where none is near."""
    options = [str(option) for option in valid]
    close = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(options)) or 'none'}"


def positive_number(value: object, where: str) -> float:
    """`value` as a float, or a ValueError that names `where`: it must be a finite number above 0 (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: must be a number, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{where}: must be finite and greater than 0, got {value!r}")
    return float(value)
