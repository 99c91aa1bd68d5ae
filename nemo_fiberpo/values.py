"""Checks of values that a user gives, and what their messages end with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


def nearest(given: object, valid: Iterable[object]) -> str:
    """The tail of a message about an unknown name: the nearest valid one, or all of them where none is near."""
    options = [str(option) for option in valid]
    close = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(options)) or 'none'}"


def positive_number(value: object, where: str) -> float:
    """`value` as a float, or a ValueError that names `where`: it must be a finite number above 0 (a bool is none)."""
    return number(value, where, above=0)


def number(
    value: object,
    where: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> float:
    """`value` as a float, or a ValueError that names `where`: it must be a finite number within the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: must be a number, got {value!r}")
    beyond = at_most is not None and value > at_most
    below = (at_least is not None and value < at_least) or (above is not None and value <= above)
    if not is_finite(value) or below or beyond:
        if at_least is not None and at_most is not None:
            asked = f"from {at_least:g} to {at_most:g}"
        elif beyond and is_finite(value):
            asked = f"at most {at_most:g}"
        else:
            limits = {"at least": at_least, "greater than": above}
            asked = "finite" + "".join(f" and {name} {limit:g}" for name, limit in limits.items() if limit is not None)
        raise ValueError(f"{where}: must be {asked}, got {short(value)}")
    return float(value)


def whole_number(value: object, where: str, at_least: float | None = None, at_most: float | None = None) -> int:
    """`value` if it is an int within the limits, else a ValueError that names `where`."""
    asked = "" if at_least is None else f" of at least {at_least}"
    if at_least is not None and at_most is not None:
        asked = f" from {at_least} to {at_most}"
    low, high = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where}: must be a whole number{asked}, got {short(value)}")
    return value


def true_or_false(value: object, where: str) -> bool:
    """`value` if it is a bool, else a ValueError that names `where`."""
    if not isinstance(value, bool):
        raise ValueError(f"{where}: must be true or false, got {value!r}")
    return value


def one_of(value: object, where: str, options: Sequence[str]) -> None:
    """ValueError that names `where`, and the nearest option, unless `value` is one of them."""
    if value not in options:
        close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        valid = " or ".join(options) if len(options) < 3 else f"one of {', '.join(options)}"
        raise ValueError(f"{where}: must be {valid}, got {value!r}{hint}")


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
