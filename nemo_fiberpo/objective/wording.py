"""Wording that error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: object, valid: Iterable[object]) -> str:
    """The tail of a message about an unknown name: the nearest valid one, or all of them where none is near."""
    options = [str(option) for option in valid]
    close = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(options)) or 'none'}"
