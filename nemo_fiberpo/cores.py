"""How many cores a process may use."""

from __future__ import annotations

import os


def available() -> int:
    """The cores that this process may run on: within a cpuset or a SLURM job often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def of_this_rank() -> int:
    """This rank's share of the cores, with LOCAL_WORLD_SIZE ranks on the machine.

    Ranks of torchrun and `fiberpo train` share the cores of their launcher; srun may have bound each rank to its own.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "SLURM_PROCID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return max(1, available() // ranks)
    on_this_node = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
    return max(1, min(available(), on_this_node // ranks))
