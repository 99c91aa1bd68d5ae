"""A run of the training script that is told to end, and one whose newest checkpoint is damaged."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aligner.test_failures import ranks_of
from tests.support import forked
from tests.support.damage import flip_middle
from tests.support.launching import (
    TWO_EPOCHS,
    begin,
    command,
    environment,
    fresh,
    metrics,
    optimizer_steps,
    wait_for_rl_step,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.distributed]


def stopped_by_a_signal(run_dir: Path, output: Path) -> str:
    """What a run on two ranks said of which the second got SIGUSR1 in its third RL step."""
    with output.open("w") as file, begin(run_dir, *TWO_EPOCHS, output=file) as launcher:
        wait_for_rl_step(launcher, run_dir, 2, seconds=300, said=output)
        os.kill(ranks_of(launcher.pid)[1], signal.SIGUSR1)
        launcher.wait(timeout=300)
    return output.read_text()


def test_a_signal_to_one_rank_saves_and_a_damaged_checkpoint_gives_way_to_the_one_before(
    start, uninterrupted, tmp_path
):
    run_dir = fresh(start, tmp_path, "stopped")
    said = stopped_by_a_signal(run_dir, tmp_path / "output")
    stopped = re.search(r"stopped by SIGUSR1 at RL step (\d) of 4: checkpoint saved; the same command resumes", said)
    assert stopped is not None, said[-8000:]
    # torchrun lists the ranks that had ended when it looked
    assert set(re.findall(r"exitcode +: (-?\d+) ", said)) == {"75"}, "ranks end with the status for 'run it again'"
    step = int(stopped.group(1))
    assert max(row["rl_step"] for row in optimizer_steps(run_dir)) == step - 1, "the step in progress was the last"

    (newest,) = (run_dir / "nemo" / "checkpoints").glob(f"fiberpo-step={step}-*")
    flip_middle(newest / "__1_0.distcp")
    said = forked.launch("train_gpt_fiberpo.py", run_dir, *TWO_EPOCHS)
    assert f"checkpoint {newest.name}: damaged: __1_0.distcp: its SHA-256 differs" in said
    assert "resuming from fiberpo-step=2-" in said
    assert metrics(run_dir) == metrics(uninterrupted)
    used = (run_dir / "prompts.jsonl").read_text()
    assert used == (uninterrupted / "prompts.jsonl").read_text(), "a prompt was skipped or used twice"
    lines = [line for row in map(json.loads, used.splitlines()) for line in row["lines"]]
    assert len(lines) == len(set(lines)) == 4 * 8, "within an epoch every prompt comes once"
    assert (run_dir / "nemo" / "checkpoints-damaged" / newest.name).is_dir()


def test_a_changed_budget_is_refused_before_anything_is_loaded(uninterrupted):
    script = command("train_gpt_fiberpo.py", uninterrupted, *TWO_EPOCHS, "hierarchy.strata.domain.budget.pos=0.07")[5:]
    done = subprocess.run([sys.executable, *script, "--check"], env=environment(), text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: hierarchy.strata.domain.budget.pos: 0.07, but the run in "), done.stderr
    allowed = [sys.executable, *script, "--check", "resume.allow=[hierarchy.strata.domain]"]
    assert subprocess.run(allowed, env=environment()).returncode == 0
