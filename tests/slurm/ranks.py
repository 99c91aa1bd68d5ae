"""Ranks in place of the training script's, which end as they are told to: see ranks_that_end.sh."""

from __future__ import annotations

import sys
from pathlib import Path


def ranks_that_end(ends: str) -> dict[str, str]:
    """Variables with which the scripts of examples/slurm start `ranks_that_end.sh` instead of Python."""
    return {
        "PYTHON": str(Path(__file__).with_name("ranks_that_end.sh")),
        "REAL_PYTHON": sys.executable,
        "ENDS": ends,
    }


def count_waiting(output: str) -> int:
    """How many ranks say there that they wait for a signal."""
    return output.count("waits\n")
