"""A few of the kills of `python -m tests.kill`, with signals among them and NeMo's second copy of every checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.kill.series import Counts, check_resumption
from tests.support.launching import ROOT, environment

NEWEST = ("fiberpo-step=4", 4)
FROM_4 = "resuming from fiberpo-step=4: RL step 4\n"
TRAINED = "step 5/8  reward 0.1\nstep 6/8  reward 0.2\n"
KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("said", "expected", "status", "wrong", "checked"),
    [
        (FROM_4 + TRAINED, NEWEST, 0, 0, 1),
        (FROM_4, NEWEST, KILLED, 0, 1),
        ("", NEWEST, KILLED, 0, 0),
        ("starting at RL step 0\nstep 1/8  reward 0.1\n", None, 75, 0, 0),
        # Each of these is another way to go on from somewhere else.
        (TRAINED, NEWEST, 0, 1, 0),
        (TRAINED, NEWEST, KILLED, 1, 0),
        ("", NEWEST, 0, 1, 0),
        ("", None, 75, 1, 0),
        ("resuming from fiberpo-step=2: RL step 2\n", NEWEST, KILLED, 1, 1),
        ("resuming from fiberpo-step=4-last: RL step 4\n" + TRAINED, NEWEST, 0, 1, 1),
        ("starting at RL step 0\n", NEWEST, KILLED, 1, 1),
        (FROM_4 + "step 3/8  reward 0.1\n", NEWEST, KILLED, 1, 1),
        (FROM_4 + "step 5/8  reward 0.1\nstep 7/8  reward 0.1\n", NEWEST, 0, 1, 1),
        (FROM_4 + TRAINED, None, 0, 1, 0),
    ],
)
def test_a_run_that_resumes_from_elsewhere_is_counted(said, expected, status, wrong, checked):
    counts = Counts()
    check_resumption(said, expected, status, counts)
    assert counts.resumed_from_another_than_the_newest_whole_checkpoint == wrong
    assert counts.resumptions_checked == checked and counts.failed == bool(wrong)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    arguments = ["--kills", "3", "--steps", "4", "--seed", "1", "--directory", str(tmp_path)]
    arguments += ["--sigusr1", "0.3", "--save-last"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", *arguments],
        cwd=ROOT,
        env=environment() | {"TQDM_DISABLE": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    counts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][-1]
    assert counts["kills"] >= 3 and counts["runs_to_the_end"] >= 1 and counts["resumptions_checked"] >= 1
