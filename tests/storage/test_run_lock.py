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

from nemo_fiberpo.storage import run_lock
from tests.support.launching import environment

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


def ends_while_it_is_waited_for(monkeypatch, process: subprocess.Popen) -> None:
    """The holder dies when this process first waits."""

    def end(_seconds: float) -> None:
        process.kill()
        process.wait()

    monkeypatch.setattr(run_lock.time, "sleep", end)


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


def test_the_lock_of_a_dead_node_is_waited_for(tmp_path, elsewhere, monkeypatch, capsys):
    with holder(tmp_path) as process:
        ends_while_it_is_waited_for(monkeypatch, process)
        run_lock.hold(tmp_path, patience=60.0)
    assert "waiting up to 60 s" in capsys.readouterr().out


def test_a_living_job_on_another_node_is_refused_after_the_wait(tmp_path, elsewhere):
    with holder(tmp_path), pytest.raises(ValueError, match=r"is in use by process .* remove .*run\.lock"):
        run_lock.hold(tmp_path, patience=0.2)


def start(job: str, restart: int, task: int | None = None) -> dict[str, str]:
    """SLURM's variables of a job, or of a task of the job array `job`."""
    if task is None:
        return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}
    array = {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task)}
    return array | {"SLURM_JOB_ID": str(int(job) + task), "SLURM_RESTART_COUNT": str(restart)}


def pretend(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (start("4711", 0), start("4711", 1)),
        (start("4711", 1, task=3), start("4711", 2, task=3)),
        (start("4711", 2, task=3), start("4711", 0, task=4)),
    ],
    ids=["requeued", "a task requeued", "the next task"],
)
def test_a_job_whose_earlier_start_still_has_the_lock_is_to_try_again(tmp_path, elsewhere, monkeypatch, before, now):
    """SLURM requeues a job whose node did not answer; the ranks there may train on."""
    with holder(tmp_path, **before) as process:
        pretend(monkeypatch, now)
        with pytest.raises(run_lock.HeldByEarlierStart, match=f"still locked by process {process.pid} on "):
            run_lock.hold(tmp_path, patience=0.1)
        process.kill()
        process.wait()
        run_lock.hold(tmp_path, patience=0.0)
    said = subprocess.check_output(["cat", str(tmp_path / run_lock.NAME)], text=True)
    assert json.loads(said)["pid"] == os.getpid(), "nothing was kept of the attempt"


def test_an_earlier_start_of_the_job_on_the_same_node_is_waited_for_too(tmp_path, monkeypatch):
    with holder(tmp_path, **start("4711", 0)) as process:
        pretend(monkeypatch, start("4711", 1))
        ends_while_it_is_waited_for(monkeypatch, process)
        run_lock.hold(tmp_path, patience=60.0)


@pytest.mark.parametrize(
    ("other", "now"),
    [
        (start("4711", 0), start("4711", 0)),
        (start("4711", 0), start("4712", 1)),
        (start("4711", 0, task=4), start("4711", 1, task=3)),
        ({}, start("4711", 1)),
    ],
    ids=["another step of the job", "another job", "a later task", "no job"],
)
def test_another_job_that_has_the_lock_is_an_error(tmp_path, elsewhere, monkeypatch, other, now):
    with holder(tmp_path, **other):
        pretend(monkeypatch, now)
        with pytest.raises(ValueError, match="is in use by process"):
            run_lock.hold(tmp_path, patience=0.1)


def test_a_process_with_the_id_of_this_one_is_in_another_container(tmp_path, monkeypatch):
    """Same hostname, process 1 in both: the lock is waited for, as one of another node."""
    with holder(tmp_path) as process:
        monkeypatch.setattr(os, "getpid", lambda: process.pid)
        ends_while_it_is_waited_for(monkeypatch, process)
        run_lock.hold(tmp_path, patience=60.0)


@pytest.mark.parametrize("call", ["mkdir", "pwrite", "ftruncate", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_what_cannot_be_written_is_an_error_of_the_directory_and_leaves_no_lock(tmp_path, monkeypatch, call, number):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    run_dir = tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(run_lock.Path if call == "mkdir" else os, call, refuse)
        words = rf"^run_dir: {run_dir}.* cannot be \w+: {os.strerror(number)} \(errno {number}\)$"
        with pytest.raises(ValueError, match=words):
            run_lock.hold(run_dir, patience=0.0)
    with holder(run_dir):  # another process gets it
        pass
    run_lock.hold(run_dir, patience=0.0)
    said = subprocess.check_output(["cat", str(run_dir / run_lock.NAME)], text=True)
    assert json.loads(said)["pid"] == os.getpid(), "the second call locks"


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
def test_the_content_of_the_file_never_stops_a_run(tmp_path, text):
    (tmp_path / run_lock.NAME).write_text(text)
    run_lock.hold(tmp_path)
    assert (tmp_path / run_lock.NAME).read_text() != text, "the holder has written itself down"


def test_a_directory_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / run_lock.NAME).mkdir()
    with pytest.raises(ValueError, match=r"^run_dir: .*run\.lock cannot be opened: Is a directory"):
        run_lock.hold(tmp_path)
