"""Checks of values that users give, and the ends of their messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


def did_you_mean(given: object, valid: Iterable[object]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or nothing where none is near."""
    close = difflib.get_close_matches(str(given), [str(option) for option in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(given: object, valid: Iterable[object]) -> str:
    """`did_you_mean`, or the list of all valid names where none is near."""
    options = [str(option) for option in valid]
    return did_you_mean(given, options) or f"; valid: {', '.join(sorted(options)) or 'none'}"


def positive_number(value: object, where: str) -> float:
    """`value` as a float; ValueError naming `where` unless it is a finite number above 0."""
    return number(value, where, above=0)


def number(
    value: object,
    where: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> float:
    """`value` as a float; ValueError naming `where` unless it is a finite number within the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: must be a number, got {value!r}")
    above_most = at_most is not None and value > at_most
    below = (at_least is not None and value < at_least) or (above is not None and value <= above)
    if not is_finite(value) or below or above_most:
        if at_least is not None and at_most is not None:
            wanted = f"from {at_least:g} to {at_most:g}"
        elif above_most and is_finite(value):
            wanted = f"at most {at_most:g}"
        else:
            limits = {"at least": at_least, "greater than": above}
            wanted = "finite" + "".join(f" and {name} {limit:g}" for name, limit in limits.items() if limit is not None)
        raise ValueError(f"{where}: must be {wanted}, got {short(value)}")
    return float(value)


def whole_number(value: object, where: str, at_least: float | None = None, at_most: float | None = None) -> int:
    """`value`; ValueError naming `where` unless it is an int within the limits."""
    wanted = "" if at_least is None else f" of at least {at_least}"
    if at_least is not None and at_most is not None:
        wanted = f" from {at_least} to {at_most}"
    low, high = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where}: must be a whole number{wanted}, got {short(value)}")
    return value


def true_or_false(value: object, where: str) -> bool:
    """`value`; ValueError naming `where` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{where}: must be true or false, got {value!r}")
    return value


def one_of(value: object, where: str, options: Sequence[str]) -> None:
    """ValueError naming `where` unless `value` is one of the options."""
    if value not in options:
        valid = " or ".join(options) if len(options) < 3 else f"one of {', '.join(options)}"
        raise ValueError(f"{where}: must be {valid}, got {value!r}{did_you_mean(value, options)}")


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float; an integer may be too large to convert."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def short(value: object) -> str:
    """`repr(value)` for a message, cut at 200 characters; a huge integer by its size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def cell_name(name: object, where: str, of: str) -> str:
    """`name` as text; ValueError naming `where` unless it can be part of the keys of metrics and overrides. `of`: what
    it names."""
    text = str(name)
    if not text or set(text) & set("./= \t\n"):
        raise ValueError(
            f"{where}: {text!r} is no name for {of}: metrics and overrides need one without . / = or space"
        )
    return text


@contextmanager
def at(prefix: str) -> Iterator[None]:
    """Prefix the message of a ValueError raised in the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error.__cause__
