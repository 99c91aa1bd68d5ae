"""What became of attacks: counted by kind, and those that are faults."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType


class TooLong(BaseException):
    """Something did not end in time."""


@dataclass
class Outcomes:
    """counts   (kind of attack, what became of it) -> number;  faults: what should not have been, a line each."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, became: str, fault: str = "") -> None:
        self.counts[kind, became] += 1
        if fault:
            self.faults.append(f"{kind}: {became}: {fault}")

    def __str__(self) -> str:
        """A row for each kind, with the number of its attacks and what became of them."""
        kinds = dict.fromkeys(kind for kind, _ in self.counts)
        columns = sorted({became for _, became in self.counts})
        rows = [["", "tried", *columns]]
        for kind in kinds:
            numbers = [self.counts[kind, became] for became in columns]
            rows.append([kind, str(sum(numbers)), *map(str, numbers)])
        rows.append(["all", *(str(sum(int(row[place]) for row in rows[1:])) for place in range(1, len(columns) + 2))])
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, f"faults: {len(self.faults)}", *self.faults[:40]])


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """TooLong where the block does not end in that time; of the main thread."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
