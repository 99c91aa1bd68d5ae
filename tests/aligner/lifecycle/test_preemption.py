"""SIGUSR1 and SIGTERM: what a process does with them, and what its helpers do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_fiberpo.aligner.lifecycle import ending, preemption
from nemo_fiberpo.aligner.run import stop_in_training
from nemo_fiberpo.graders.pool import GraderPool
from tests.aligner.test_failures import alive
from tests.support import distributed
from tests.support.launching import environment

CATCH = """
import os, signal, time
from nemo_fiberpo.aligner.lifecycle import preemption
preemption.SAME_SIGNAL = preemption.SAME_KEY = {same}
preemption.install()
for name in {sent}:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.05)
print("received", signal.Signals(preemption._received).name, flush=True)
"""


def caught(*sent: str, same: float = 5.0) -> subprocess.CompletedProcess:
    script = CATCH.format(same=same, sent=sent)
    return subprocess.run([sys.executable, "-c", script], env=environment(), text=True, capture_output=True)


@pytest.mark.parametrize(
    "sent", [("SIGUSR1",), ("SIGTERM",), ("SIGINT",), ("SIGUSR1", "SIGTERM"), ("SIGUSR1", "SIGUSR1")]
)
def test_a_signal_only_sets_a_flag_and_the_first_is_the_reason(sent):
    done = caught(*sent)
    assert (done.returncode, done.stdout) == (0, f"received {sent[0]}\n"), done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_a_launcher_repeats_is_one_signal(name):
    assert caught(name, name).returncode == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_one_ends_the_process_at_once(name):
    done = caught(name, name, same=0.0)
    assert (done.returncode, done.stdout) == (-getattr(signal, name), "") and "Traceback" not in done.stderr


def test_the_first_ctrl_c_tells_what_comes_of_it():
    said = caught("SIGINT").stderr
    assert said.count("Ctrl-C: the run is saved after the RL step in progress; press again to end it at once") == 1


SIGNALLED_WHILE_IT_ENDS = """
import os, signal
from nemo_fiberpo.aligner.lifecycle import ending, preemption
preemption.install()
rank = os.getpid()
if os.fork() == 0:
    os.closerange(0, 3)
    try:
        while True:
            os.kill(rank, signal.{name})
    except ProcessLookupError:
        os._exit(0)
def main():
    raise preemption.Stopped
ending.run_main(main)
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_no_signal_changes_the_status_of_a_run_that_ends(name):
    script = SIGNALLED_WHILE_IT_ENDS.format(name=name)
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True)
    assert done.returncode == preemption.NOT_FINISHED, done.stderr


SIGNALLED_TRACKER = """
import multiprocessing, os, signal, sys, time
from multiprocessing import resource_tracker
from nemo_fiberpo.aligner.lifecycle import preemption
preemption.install()
if {shield}:
    preemption.shield_resource_tracker()
lock = multiprocessing.get_context("spawn").Lock()  # registers a semaphore
tracker = resource_tracker._resource_tracker._pid
for pid in (tracker, os.getpid()):
    os.kill(pid, signal.{name})
if not {shield}:
    os.waitid(os.P_PID, tracker, os.WEXITED | os.WNOWAIT)
"""


@pytest.mark.parametrize(("shield", "name"), [(True, "SIGUSR1"), (True, "SIGTERM"), (False, "SIGUSR1")])
def test_a_signal_to_the_whole_job_leaves_no_traceback_of_the_resource_tracker(shield, name):
    """Without the shield there is one: this test can fail."""
    script = SIGNALLED_TRACKER.format(shield=shield, name=name)
    done = subprocess.run([sys.executable, "-c", script], env=environment(), text=True, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert ("KeyError" in done.stderr, bool(done.stderr)) == (not shield, not shield), done.stderr


LAUNCHER = """
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", {rank!r}])
time.sleep(60)
"""
RANK = """
import os, time
from nemo_fiberpo.aligner.lifecycle import preemption
preemption.install()
print(os.getpid(), flush=True)
until = time.monotonic() + 30
while not preemption._received and time.monotonic() < until:
    time.sleep(0.05)
print(preemption._received, flush=True)
"""


@pytest.mark.parametrize("torchrun", [True, False])
def test_the_end_of_torchrun_is_a_sigterm_to_its_ranks_and_that_of_a_shell_is_not(torchrun):
    script = LAUNCHER.format(rank=RANK.replace("30", "30" if torchrun else "2"))
    variables = {"TORCHELASTIC_RUN_ID": "1"} if torchrun else {}
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], env=environment() | variables, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        launcher.kill()
        launcher.wait()
        assert int(launcher.stdout.readline()) == (signal.SIGTERM if torchrun else 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


class Trained:
    """What `stop_in_training` sees of a trainer: a step, and a save that is complete once it is finished."""

    step, max_steps = 7, 60

    def __init__(self):
        self.done: list[str] = []

    def save(self) -> None:
        self.done.append("saved")

    def finish(self, blocking: bool = False) -> None:
        self.done.append("finished" if blocking else "looked")


@pytest.mark.parametrize(("interval", "expected"), [(0, ["saved", "finished"]), (5, [])])
def test_a_stopped_run_is_saved_whatever_its_save_interval(interval, expected, capsys):
    """With an interval `fit` has saved it."""
    trained = Trained()
    with pytest.raises(preemption.Stopped) as stopped:
        stop_in_training("SIGUSR1", trained, interval, trained.finish)
    assert trained.done == expected and stopped.value.resumable
    assert "stopped by SIGUSR1 at RL step 7 of 60: checkpoint saved" in capsys.readouterr().out


def test_a_stopped_run_that_cannot_be_saved_is_not_one_to_start_again(monkeypatch, capsys):
    def main() -> None:
        stop_in_training("SIGUSR1", Trained(), 5, None)

    monkeypatch.setattr(ending, "finish", lambda: None)
    with pytest.raises(SystemExit) as leaving:
        ending.run_main(main)
    assert leaving.value.code == 1 and "exp_manager.create_checkpoint_callback is false" in capsys.readouterr().out


def agree_worker(rank: int, world: int) -> list[str | None]:
    before = preemption.agreed_reason()
    late = preemption.agreed_reason(time_is_up=True) if rank else preemption.agreed_reason()
    on_time = preemption.agreed_reason(time_is_up=rank == 0)
    if rank == world - 1:
        preemption.install()
        os.kill(os.getpid(), signal.SIGUSR1)
    return [before, late, on_time, preemption.agreed_reason()]


@pytest.mark.distributed
def test_one_ranks_signal_is_every_ranks_and_the_first_ranks_clock_counts():
    for answers in distributed.run(agree_worker, 2):
        assert answers == [None, None, "its time limit, exp_manager.max_time_per_run,", "SIGUSR1"]


def test_a_process_started_while_signals_are_blocked_starts_with_them_blocked():
    show = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with preemption.signals_blocked():
        inside = subprocess.check_output([sys.executable, "-c", show], text=True)
    outside = subprocess.check_output([sys.executable, "-c", show], text=True)
    assert inside.count("SIGUSR1") == inside.count("SIGTERM") == 1 and outside == "[]\n"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("when", ["while they start", "while they grade"])
def test_graders_outlive_the_signals_of_a_whole_job(when):
    items = [("checksum", {}, f"answer {number}") for number in range(20)]
    with GraderPool({"checksum": "tests.support.checksum_grader:grade"}, [("checksum", {})], workers=2) as pool:
        supervisors = [slot.process.pid for slot in pool._slots]
        if when == "while they grade":
            pool.wait_until_ready()
        for _ in range(20):
            for supervisor in supervisors:
                for pid in (supervisor, *children(supervisor)):
                    os.kill(pid, signal.SIGUSR1)
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.02)
        pool.wait_until_ready()
        workers = [slot.pid for slot in pool._slots]
        assert all(outcome.failure is None for outcome in pool.grade(items))
        assert [slot.process.pid for slot in pool._slots] == supervisors
        assert [slot.pid for slot in pool._slots] == workers


def test_a_helper_that_multiprocessing_starts_ends_with_its_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, signal, time\n"
        "from nemo_fiberpo.aligner.lifecycle import preemption\n"
        "preemption.install(__name__)\n"
        "if __name__ == '__main__':\n"
        "    manager = multiprocessing.get_context('spawn').Manager()\n"
        "    print(manager._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with (tmp_path / "output").open("w") as output:  # a pipe would stay open with the helper
        status = subprocess.call([sys.executable, str(script)], env=environment(), stdout=output)
    assert status == -signal.SIGKILL
    pid, until = int((tmp_path / "output").read_text()), time.monotonic() + 20
    try:
        while alive(pid):
            assert time.monotonic() < until, "the helper is still there"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
