"""A few of the kills of `python -m tests.kill`, with signals among them and NeMo's second copy of every checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.aligner.launching import ROOT, environment

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


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
    assert counts["kills"] >= 3 and counts["runs_to_the_end"] >= 1
