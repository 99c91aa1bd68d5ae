"""Budgets at their extremes in a run: every stratum switched off, and gates that are closed from the second step on."""

from __future__ import annotations

import math

import pytest

from tests.support import forked
from tests.support.launching import fresh, optimizer_steps

STRATA = ("domain", "prompt_group", "trajectory")
OFF = [f"hierarchy.strata.{name}.enabled=false" for name in STRATA]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("passes", [1, 2])
def test_only_a_token_clip_trains(start, tmp_path, passes: int):
    """Two optimizer steps, the second off-policy with a clip that cuts; no stratum is reported."""
    run_dir = fresh(start, tmp_path, "run")
    forked.launch(
        "train_gpt_fiberpo.py", run_dir, *OFF, "hierarchy.token_clip=1e-4",
        "algorithm.rl_steps=1", "algorithm.save_interval=0", f"algorithm.passes={passes}",
    )  # fmt: skip
    first, second = optimizer_steps(run_dir)
    assert first["train_optim/on_policy"] == float(passes == 2)
    assert 0 < second["train_optim/gates/token/clipped"] <= 1
    assert math.isfinite(second["train_optim/loss"]) and second["train_optim/grad_norm"] > 0
    if passes == 2:
        assert second["train_optim/gate_all_reduces"] == 2.0 and first["train_optim/recompute_error"] < 1e-5
    assert not [name for name in second if name.startswith(tuple(f"train_optim/gates/{stratum}" for stratum in STRATA))]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_whose_gates_close_at_once_warns_what_to_change(start, tmp_path):
    """Once, however many rollouts it is so."""
    run_dir = fresh(start, tmp_path, "run")
    said = forked.launch(
        "train_gpt_fiberpo.py", run_dir, "hierarchy=trajectory", "hierarchy.strata.trajectory.budget.pos=1e-7",
        "hierarchy.strata.trajectory.budget.neg=9e-8", "algorithm.rl_steps=2", "algorithm.save_interval=0",
    )  # fmt: skip
    assert said.count("stratum 'trajectory': more than half of its cells are over budget") == 1, said
