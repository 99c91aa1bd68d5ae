"""Runs forked from one process: that they never outlive the tests, and that what went wrong is said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.launching import ROOT, environment

# Forks ranks without having imported NeMo, which these scripts do not need.
LIGHT = """
import socket
import nemo_fiberpo.nemo_cpu
from tests.support import forked
forked.serve(socket.socket(fileno=0))
"""
STAYS = """
import os, time
os.write(1, f"rank {os.environ['RANK']} stays\\n".encode())  # in one write, as ranks share a file
time.sleep(600)
"""
CLIENT = f"""
import sys
from pathlib import Path
from tests.support import forked
forked.COMMAND = [sys.executable, "-c", {LIGHT!r}]
with open(sys.argv[2], "wb") as output:
    print(forked.begin(sys.argv[1], Path("unused"), output=output).pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command of the server, for this test alone."""
    command = [sys.executable, "-c", LIGHT]
    monkeypatch.setattr(forked, "COMMAND", command)
    monkeypatch.setattr(forked, "_running", None)
    yield command
    if forked._running is not None:
        forked._running.control.close()
        forked._running.process.wait(timeout=60)


def script(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(text)
    return str(folder / "script.py")


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, of, *_ = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(of) == group and state != "Z" else []
    return found


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


def test_a_failing_server_reports_why_and_the_next_run_has_its_own(light, tmp_path, monkeypatch):
    says = script(tmp_path, "print('done')")
    failing = "import sys; print('no module of that name', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(forked, "COMMAND", [sys.executable, "-c", failing])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"ended with exit status 3; it wrote:\nno module of that name"):
            forked.launch(says, tmp_path, processes=1)
    monkeypatch.setattr(forked, "COMMAND", light)
    assert forked.launch(says, tmp_path, processes=1) == "done\n"


def test_a_run_that_takes_too_long_reports_its_output(light, tmp_path):
    with pytest.raises(TimeoutError, match=r"goes on after 5.0 s; it wrote:\nrank 0 stays"):
        forked.launch(script(tmp_path, STAYS), tmp_path, processes=1, timeout=5.0)


def test_no_process_of_a_run_outlives_a_session_that_is_killed(tmp_path):
    output = tmp_path / "output"
    output.touch()
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, script(tmp_path, STAYS), str(output)],
        cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    group = 0
    try:
        assert client.stdout is not None
        group = int(client.stdout.readline())
        assert until(lambda: output.read_text().count("stays") == 2), output.read_text()
        assert len(alive(group)) == 3
        client.kill()
        client.wait()
        assert until(lambda: not alive(group)), alive(group)
    finally:
        client.kill()
        client.communicate()
        if group and alive(group):
            os.killpg(group, signal.SIGKILL)
