"""How many threads a rank takes, whoever started it."""

from __future__ import annotations

import os

import pytest

from nemo_fiberpo import cores

TORCHRUN = {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {"LOCAL_WORLD_SIZE": "4", "SLURM_PROCID": "2", "SLURM_CPUS_ON_NODE": "32"}


@pytest.mark.parametrize(
    ("usable", "variables", "threads"),
    [
        (64, {}, 64),
        (64, TORCHRUN, 16),
        (8, TORCHRUN, 2),
        (2, TORCHRUN, 1),
        (32, SRUN, 8),
        (8, SRUN, 8),
        (8, SRUN | TORCHRUN, 2),
    ],
    ids=["one process", "torchrun", "in a cpuset", "too many ranks", "srun", "bound by srun", "torchrun under srun"],
)
def test_a_rank_takes_its_share_of_the_cores_that_it_may_use(usable, variables, threads, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
    assert cores.of_this_rank() == threads
