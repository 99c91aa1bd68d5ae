"""The configurations of conf/, composed."""

from __future__ import annotations

import functools
from pathlib import Path

from nemo_fiberpo import cli
from nemo_fiberpo.plan.plan import Plan
from nemo_fiberpo.plan.shape import ModelShape

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = [f"cluster/{path.stem}" for path in sorted((ROOT / "conf" / "cluster").glob("*.yaml"))]


@functools.cache
def plan_of(name: str, *overrides: str) -> Plan:
    return cli.plan_of(cli.compose(str(ROOT / "conf" / f"{name}.yaml"), overrides), name)


def shape_of(name: str) -> ModelShape:
    shape = plan_of(name).shape
    assert shape is not None
    return shape
