"""How many cores a process may use."""

from __future__ import annotations

import os


def available() -> int:
    """The cores that this process may run on: in a container or a SLURM job often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def of_this_rank() -> int:
    """The share of a rank of LOCAL_WORLD_SIZE ranks on this machine, each bound to cores of its own or not."""
    return max(1, min(available(), (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
