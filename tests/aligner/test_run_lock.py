"""One job at a time in a run's directory, whatever becomes of the one before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from nemo_fiberpo.aligner import run_lock
from tests.aligner.launching import environment

HOLD = """
import os, runpy, sys, time
hold = runpy.run_path(sys.argv[2])["hold"]  # without what its package imports
hold(sys.argv[1], patience=0.0)
hold(sys.argv[1], patience=0.0)
if {forks} and os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(run_dir, forks: bool = False, **variables: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock, with a child of its own if `forks`."""
    script = [sys.executable, "-c", HOLD.format(forks=forks), str(run_dir), run_lock.__file__]
    process = subprocess.Popen(
        script, env=environment() | variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def elsewhere(monkeypatch):
    """This process is on another node than the holder."""
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_job_is_refused_at_once_with_the_holder_in_the_message(tmp_path):
    with holder(tmp_path, SLURM_JOB_ID="4711") as process:
        with pytest.raises(ValueError) as error:
            run_lock.hold(tmp_path, patience=600.0)
        since = json.loads((tmp_path / run_lock.NAME).read_text())["since"]
        words = (
            f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}, SLURM job 4711, since {since}"
        )
        assert str(error.value).startswith(f"run_dir: {words}; ") and "\n" not in str(error.value)


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a forked helper that lives on"])
def test_a_killed_holder_leaves_no_lock(tmp_path, forks):
    with holder(tmp_path, forks) as process:
        process.kill()
        process.wait()
        run_lock.hold(tmp_path, patience=0.0)
    # Another process reads the file: the lock of this one would end with its reading.
    said = subprocess.check_output(["cat", str(tmp_path / run_lock.NAME)], text=True)
    assert json.loads(said)["pid"] == os.getpid()
    script = [sys.executable, "-c", HOLD.format(forks=False), str(tmp_path), run_lock.__file__]
    refused = subprocess.run(script, env=environment(), text=True, capture_output=True, timeout=50)
    assert refused.returncode == 1 and f"in use by process {os.getpid()} on " in refused.stderr


def test_the_lock_of_a_dead_node_is_waited_for(tmp_path, elsewhere, capsys):
    with holder(tmp_path) as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
        run_lock.hold(tmp_path, patience=60.0)
        killer.wait()
    assert "waiting up to 60 s" in capsys.readouterr().out


def test_a_living_job_on_another_node_is_refused_after_the_wait(tmp_path, elsewhere):
    with holder(tmp_path), pytest.raises(ValueError, match=r"is in use by process .* remove .*run\.lock"):
        run_lock.hold(tmp_path, patience=0.2)


@pytest.mark.parametrize(("restart", "goes_on"), [("1", True), ("0", False)])
def test_a_requeued_job_goes_on_although_its_dead_node_still_has_the_lock(
    tmp_path, elsewhere, monkeypatch, capsys, restart, goes_on
):
    """A second step of the same allocation has the same job id, but was not restarted: it is refused."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    with holder(tmp_path, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="0"):
        if goes_on:
            run_lock.hold(tmp_path, patience=0.2)
            assert "still locked by process" in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match="SLURM job 4711"):
                run_lock.hold(tmp_path, patience=0.2)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run_lock.hold(tmp_path)
    run_lock.hold(tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("warning: run_dir: ") and os.strerror(number) in said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}'])
def test_what_the_file_says_never_stops_a_run(tmp_path, text):
    (tmp_path / run_lock.NAME).write_text(text)
    run_lock.hold(tmp_path)
    assert (tmp_path / run_lock.NAME).read_text() != text, "the holder has written itself down"


def test_a_directory_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / run_lock.NAME).mkdir()
    with pytest.raises(ValueError, match=r"^run_dir: .*run\.lock cannot be opened: Is a directory"):
        run_lock.hold(tmp_path)
