"""`examples/slurm/rank.sh` on one node without SLURM: its exit status says how ranks ended, and signals reach them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.ranks import count_waiting, ranks_that_end
from tests.support.launching import ROOT, free_ports, wait_for
from tests.support.processes import started


@contextmanager
def task(launcher: str, ends: str, output: Path) -> Iterator[subprocess.Popen]:
    """What a SLURM task runs: by torchrun two ranks, by srun the first of two. Nothing of it is left at the end."""
    variables = ranks_that_end(ends) | {
        "LAUNCHER": launcher,
        "RANKS_PER_NODE": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    command = ["bash", ROOT / "examples" / "slurm" / "rank.sh", "train.py"]
    with (
        output.open("w") as file,
        started(
            command, os.environ | variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        yield process


@pytest.mark.parametrize(
    ("launcher", "ends", "status", "said"),
    [
        ("srun", "0 0", 0, []),
        ("srun", "75 0", 75, ["rank 0 ended with status 75"]),
        ("srun", "KILL 0", 137, ["rank 0 ended with status 137"]),
        ("torchrun", "0 0", 0, []),
        ("torchrun", "75 75", 75, ["rank 0 ended with status 75"]),
        ("torchrun", "75 then:3", 3, ["rank 0 ended with status 75", "rank 1 ended with status 3"]),
        ("torchrun", "KILL wait", 137, ["rank 0 ended with status 137"]),
        ("torchrun", "0 75", 75, []),
    ],
)
def test_the_status_is_that_of_the_first_error_then_that_of_a_saved_run(tmp_path, launcher, ends, status, said):
    output = tmp_path / "output"
    with task(launcher, ends, output) as process:
        assert process.wait(timeout=120) == status, output.read_text()
    lines = re.findall(r"rank\.sh: (rank .*)", output.read_text())
    assert sorted(line for line in lines if "status 143" not in line) == said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_signal_to_only_the_task_reaches_its_ranks(tmp_path, launcher, number):
    """proctrack/cgroup, which most clusters have, signals no other process of a step."""
    output, ranks = tmp_path / "output", 1 if launcher == "srun" else 2
    with task(launcher, "wait wait", output) as process:
        wait_for(lambda: count_waiting(output.read_text()) == ranks, 120, "the ranks")
        process.send_signal(number)
        assert process.wait(timeout=120) == 75, output.read_text()


def test_a_signal_to_all_processes_of_a_task_does_not_hide_how_its_rank_ended(tmp_path):
    """The shell and the rank get it, as from proctrack/linuxproc. Ten times, since the rank does not end every time at
    the very moment in which bash could miss its status."""
    for number in range(10):
        output = tmp_path / f"output{number}"
        with task("srun", "start start", output) as process:
            wait_for(lambda output=output: count_waiting(output.read_text()) == 1, 120, "the rank")
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(timeout=120) == 128 + signal.SIGTERM, output.read_text()
