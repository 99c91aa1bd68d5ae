"""A run with labels of sampled tokens that resumes is the run that was not interrupted; its metrics are documented."""

from __future__ import annotations

import json

import pytest

from tests.aligner.test_layouts import GRADED, SEGMENTS, graded_by_checksum
from tests.aligner.test_what_a_run_leaves import unknown
from tests.support import forked
from tests.support.launching import fresh, metrics

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.distributed]

STEPS = ["trainer.max_steps=4", "algorithm.save_interval=1", "model.optim.lr=1e-3"]


def test_a_resumed_run_has_the_labels_of_an_uninterrupted_one(start, tmp_path):
    whole, stopped = (fresh(start, tmp_path, name) for name in ("whole", "stopped"))
    for run_dir, runs in ((whole, (2,)), (stopped, (1, 2))):
        graded_by_checksum(run_dir)
        for rl_steps in runs:
            steps = [*STEPS, f"algorithm.rl_steps={rl_steps}"]
            said = forked.launch("train_gpt_fiberpo.py", run_dir, *GRADED, *SEGMENTS, *steps)
    assert "resuming from fiberpo-step=1-" in said
    assert metrics(stopped) == metrics(whole)
    rollouts = [row for row in metrics(whole) if "train_rollouts/rewards" in row]
    assert len(rollouts) == 2 and all(row["train_rollouts/token_share/segment.think"] > 0 for row in rollouts)
    keys = {key for line in (whole / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert not unknown(keys)
