"""A grader that gives any response a reward of its own: named in the tests as "tests.support.checksum_grader:grade"."""

from __future__ import annotations

import zlib


def grade(record: dict, response: str) -> float:
    """Between 0 and 1, a function of the answer alone."""
    return zlib.crc32(response.encode()) % 101 / 100
