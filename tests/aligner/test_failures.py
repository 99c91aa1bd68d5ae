"""A rank of a running training script that is killed or stopped: the launch ends, with an error that says why."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import arguments, begin, check_each, fresh, steps_so_far
from tests.support.processes import variables_of

pytestmark = pytest.mark.timeout(600)

TIMEOUT = 20
TORCHRUN_PATIENCE = 30  # seconds between its SIGTERM and its SIGKILL, which alone ends a stopped process
ENDLESS = ["algorithm.rl_steps=1000", "algorithm.data_epochs=1000", "algorithm.save_interval=0"]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of the launcher's ranks."""
    children = map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    variables = {child: variables_of(child) for child in children}
    return {int(own["RANK"]): child for child, own in variables.items() if "RANK" in own}


@contextlib.contextmanager
def training(run_dir: Path, output: Path) -> Iterator[tuple[subprocess.Popen, dict[int, int]]]:
    """The launcher and its ranks once they take optimizer steps; none of them is left at the end."""
    overrides = [*ENDLESS, f"collective_timeout={TIMEOUT}"]
    with output.open("w") as file, begin(run_dir, *overrides, output=file) as launcher:
        until = time.monotonic() + 240
        while len(steps_so_far(run_dir)) < 3:
            assert launcher.poll() is None, output.read_text()[-8000:]
            assert time.monotonic() < until, "no third optimizer step"
            time.sleep(0.05)
        ranks = ranks_of(launcher.pid)
        assert set(ranks) == {0, 1}
        yield launcher, ranks


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("sent", "rank"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)], ids=["killed", "stopped"])
def test_a_launch_ends_with_an_error_when_a_rank_dies_or_stalls(start, tmp_path, sent: signal.Signals, rank: int):
    run_dir, output = fresh(start, tmp_path, "run"), tmp_path / "output"
    with training(run_dir, output) as (launcher, ranks):
        begun = time.monotonic()
        os.kill(ranks[rank], sent)
        status = launcher.wait(timeout=TIMEOUT + TORCHRUN_PATIENCE + 120)
        print(f"{sent.name} to rank {rank}: the launch ended after {time.monotonic() - begun:.0f} s, status {status}")
        said = output.read_text()
        print(said[-6000:])
        assert status != 0
        assert not any(map(alive, ranks.values()))
    # torchrun's summary; a rank that is stopped is in it too, since torchrun kills it in the end
    assert f"Signal 9 (SIGKILL) received by PID {ranks[rank]}" in said
    if sent is signal.SIGKILL:
        root = said[said.index("Root Cause") :]
        assert f"rank      : {rank} " in root
    else:
        assert "RuntimeError" in said and f"Timed out waiting {TIMEOUT}000ms" in said


def test_a_time_out_that_is_none_is_refused_by_name(tmp_path):
    found, _ = check_each([arguments(tmp_path, f"collective_timeout={value}") for value in ("0", "soon", "null")])
    assert all(line.startswith("error: collective_timeout: must be ") for line in found), found
