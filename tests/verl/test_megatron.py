"""verl's Megatron engine takes the exact step on every axis: the same gradient on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from nemo_fiberpo import load_hierarchy
from tests.support.distributed import run
from tests.verl import host
from tests.verl.host import HIERARCHY
from tests.verl.megatron_host import LAYOUTS, Expected, compare, reference, save_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Expected]]:
    """By model: its folder, and what a step of it must give."""
    weights = tmp_path_factory.mktemp("old_policy")
    host.save_model(weights)
    batch = host.make_batch(weights)

    @cache
    def of(model: str) -> tuple[Any, Expected]:
        folder = tmp_path_factory.mktemp(model)
        save_model(folder, model)
        return folder, run(reference, 1, folder, batch, HIERARCHY, timeout=240)[0]

    return of


@pytest.mark.parametrize("model, layout", [(model, layout) for model in LAYOUTS for layout in LAYOUTS[model]])
def test_step_of_every_layout_is_that_of_the_slow_loops(
    expected: Callable[[str], tuple[Any, Expected]], model: str, layout: str
):
    folder, wanted = expected(model)
    found = compare(folder, wanted, HIERARCHY, model, layout)
    assert found.gradient < FLOAT32, found.name
    assert found.parameter < FLOAT32
    assert found.metrics["actor/pg_loss"][0] == pytest.approx(-wanted.value, rel=1e-6)
    assert found.metrics["recompute_error"][0] < 1e-5
    assert found.metrics["gate_all_reduces"][0] == load_hierarchy(HIERARCHY).num_reductions
    assert found.metrics["gates/token/live"][0] == int(wanted.batch.response_mask.sum())
