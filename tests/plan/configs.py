"""The configurations of conf/, composed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.cli.planning import plan_of as plan_of_config
from nemo_fiberpo.plan.plan import Plan
from nemo_fiberpo.plan.shape import ModelShape

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
CLUSTER = [f"cluster/{path.stem}" for path in sorted((ROOT / "conf" / "cluster").glob("*.yaml"))]


@functools.cache
def plan_of(name: str, *overrides: str) -> Plan:
    return plan_of_config(compose(str(ROOT / "conf" / f"{name}.yaml"), overrides), name)


def shape_of(name: str) -> ModelShape:
    shape = plan_of(name).shape
    assert shape is not None
    return shape
