"""`examples/slurm/rank.sh` with torchrun on one node: the step's exit status says how the ranks ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aligner.launching import ROOT
from tests.slurm.cluster import free_ports

RANKS_THAT_END = Path(__file__).with_name("ranks_that_end.sh")


@pytest.mark.parametrize(
    ("ends", "status"),
    [("0 0", 0), ("75 75", 75), ("75 3", 3), ("KILL wait", 137), ("0 75", 75)],
    ids=["all well", "all saved", "one saved, one failed", "one got SIGKILL", "one saved"],
)
def test_the_status_under_torchrun_is_that_of_the_first_error_then_that_of_a_saved_run(ends: str, status: int):
    variables = {
        "PYTHON": str(RANKS_THAT_END),
        "REAL_PYTHON": sys.executable,
        "ENDS": ends,
        "LAUNCHER": "torchrun",
        "RANKS_PER_NODE": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    done = subprocess.run(
        ["bash", ROOT / "examples" / "slurm" / "rank.sh", "train.py"],
        env=os.environ | variables,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
