"""A command that a test starts leaves no process behind."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support.processes import processes, started


@pytest.mark.parametrize("end", ["wait", "exit"], ids=["its parent waits", "its parent has ended"])
def test_a_process_in_a_session_of_its_own_ends_with_the_command(end):
    """As torchrun's workers are."""
    command = ["bash", "-c", f"setsid bash -c 'echo $$; exec sleep 600' & {end}"]
    with started(command, os.environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sleeper = int(process.stdout.readline())
        if end == "exit":
            process.wait(timeout=60)
        assert sleeper in processes() and os.getsid(sleeper) == sleeper != os.getsid(os.getpid())
    assert sleeper not in processes() and process.returncode is not None
