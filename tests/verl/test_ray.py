"""Two CPU workers of verl's RayWorkerGroup take the step that one process takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_fiberpo import load_hierarchy
from tests.verl.host import HIERARCHY, make_batch, save_model
from tests.verl.ranks import steps
from tests.verl.slow import expected, largest_difference, relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FLOAT32 = 1e-5
ARGUMENTS = {
    "micro_batch_size": 4,
    "policy_loss": {"loss_mode": "fiberpo", "hierarchy": HIERARCHY},
    "loss_agg_mode": "seq-mean-token-mean",
}


def test_step_of_a_ray_worker_group_is_that_of_one_process(tmp_path: Path):
    from tests.verl.ray_group import ray_on_this_machine, step_of_group

    save_model(tmp_path)
    batch = make_batch(tmp_path)
    alone = steps(1, tmp_path, batch, [ARGUMENTS])[0]
    with ray_on_this_machine(cpus=2):
        found = step_of_group(2, tmp_path, batch, **ARGUMENTS)
    wanted = expected(tmp_path, batch, HIERARCHY)
    assert len({worker["pid"] for worker in found["workers"]}) == 2
    for worker in found["workers"]:
        assert relative_error(worker["gradients"], wanted.gradients) < FLOAT32
        assert largest_difference(worker["parameters"], alone["parameters"]) < FLOAT32
    metrics = found["metrics"]
    assert metrics["actor/pg_loss"][0] == pytest.approx(-wanted.value, rel=1e-6)
    assert metrics["gate_all_reduces"][0] == load_hierarchy(HIERARCHY).num_reductions
    assert metrics["gates/token/live"][0] == int(batch.response_mask.sum())
