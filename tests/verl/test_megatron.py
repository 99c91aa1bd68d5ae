"""verl's Megatron engine takes the exact step on every axis: the same gradient on the same weights."""

from __future__ import annotations

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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("qwen3")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    other = tmp_path_factory.mktemp("qwen3_moe")
    host.save_model(other)
    return run(reference, 1, folder, host.make_batch(other), HIERARCHY, timeout=240)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_every_layout_is_that_of_the_slow_loops(folder: Any, expected: Expected, layout: str):
    error, name, metrics = compare(folder, expected, HIERARCHY, layout)
    assert error < FLOAT32, name
    assert metrics["actor/pg_loss"][0] == pytest.approx(-expected.value, rel=1e-6)
    assert metrics["recompute_error"][0] < 1e-5
    assert metrics["gate_all_reduces"][0] == load_hierarchy(HIERARCHY).num_reductions
    assert metrics["gates/token/live"][0] == int(expected.batch.response_mask.sum())
