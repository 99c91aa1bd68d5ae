"""The other objectives, and hierarchies with branches, on several ranks: as in one process."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.groups import Axis, Reducer, TokenAxes
from nemo_fiberpo.objective import (
    Apc,
    Budget,
    DppoTv,
    Gmpo,
    Gspo,
    Hierarchy,
    PpoClip,
    Stratum,
    TrulyPpo,
    surrogate,
)
from nemo_fiberpo.verification import shards
from tests.megatron import comparison, tiny
from tests.megatron.batches import Batch
from tests.megatron.comparison import BOUND, Outcome, take_step
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

GATINGS = {
    "grpo": PpoClip(0.05, 0.08),
    "gspo": Gspo(0.02, 0.03),
    "truly_ppo": TrulyPpo(0.05, 0.3),
    "apc": Apc(0.04),
    "gmpo": Gmpo(0.05, 0.08),
    "dppo_tv": DppoTv(0.002, 1.1),
}
ONE = Layout(rope=False)
LAYOUTS = [
    (2, Layout(microbatches=4, rope=False)),
    (2, Layout(cp=2, microbatches=2, packed=True, rope=False)),
    (2, Layout(pp=2, microbatches=2, rope=False)),
    (2, Layout(cp=2, microbatches=8, one_pass=True, rope=False)),
]


def worker(rank: int, world: int, layout: Layout, pickled: bytes, strata: tuple[str, ...]) -> dict[str, Outcome]:
    batch = pickle.loads(pickled)
    with tiny.megatron(layout):
        return {name: take_step(layout, batch, strata, gating=gating) for name, gating in GATINGS.items()}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return comparison.references_for([ONE], ["uneven"])[ONE.kind, "uneven"].batch


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_every_objective_has_the_gradient_of_one_process(batch: Batch, world: int, layout: Layout) -> None:
    """That of one process is compared with autograd and other people's formulas in tests/objective."""
    strata = ("trajectory",) if layout.one_pass else ("domain", "prompt_group", "trajectory")
    pickled = pickle.dumps(batch)
    [alone] = distributed.run(worker, 1, ONE, pickled, strata)
    ranks = distributed.run(worker, world, layout, pickled, strata)
    for name in GATINGS:
        expected = {key: part.value for key, part in alone[name].grads.items()}
        outcomes = [rank[name] for rank in ranks]
        error, where = shards.largest_gradient_error([outcome.grads for outcome in outcomes], expected)
        assert error <= BOUND, (name, where)
        for outcome in outcomes:
            assert outcome.calls == (1 if layout.one_pass else 2)
            assert outcome.loss == pytest.approx(alone[name].loss, rel=BOUND)
            assert 0 < outcome.metrics["token/clipped"] == pytest.approx(alone[name].metrics["token/clipped"])


BRANCHED = Hierarchy(
    (Stratum("domain", Budget(0.005, 0.005), slope=0.6), Stratum("trajectory", Budget(0.01, 0.01), slope=0.6)),
    token_clip=0.1,
    branches=(Stratum("modality", Budget(0.001, 0.001), slope=0.2),),
    sweeps=2,
)


def branch_worker(rank: int, world: int, columns: dict[str, list]) -> dict[str, Any]:
    """`surrogate` of this rank's tokens, the modality changing within trajectories."""
    own = {name: torch.tensor(values).chunk(world)[rank] for name, values in columns.items()}
    labels = {name: own[name] for name in ("domain", "trajectory", "modality")}
    axes = TokenAxes((Axis("dp", world, rank, sharded=True),))
    reducer = Reducer(axes)
    [cells] = exchange([BRANCHED.cells(labels)], axes)
    result = surrogate(own["log_ratio"], own["weighted"], cells, BRANCHED, reducer)
    return {"c": result.coefficients, "value": result.value, "calls": reducer.calls, "metrics": result.report.metrics()}


def test_branches_over_ranks_are_those_of_one_process() -> None:
    random = torch.Generator().manual_seed(4)
    trajectory = torch.arange(8).repeat_interleave(9)
    columns = {
        "domain": (trajectory // 4).tolist(),
        "trajectory": trajectory.tolist(),
        "modality": torch.randint(0, 3, (72,), generator=random).tolist(),
        "log_ratio": (0.08 * torch.randn(72, generator=random, dtype=torch.float64)).tolist(),
        "weighted": torch.randn(72, generator=random, dtype=torch.float64).tolist(),
    }
    [alone] = distributed.run(branch_worker, 1, columns)
    ranks = distributed.run(branch_worker, 3, columns)
    assert alone["calls"] == BRANCHED.num_reductions == 8
    torch.testing.assert_close(torch.cat([rank["c"] for rank in ranks]), alone["c"], rtol=1e-12, atol=1e-15)
    for rank in ranks:
        assert rank["calls"] == alone["calls"]
        assert rank["value"] == pytest.approx(alone["value"], rel=1e-12)
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-12, abs=1e-15)
    assert any(alone["metrics"][f"modality/{channel}/pass_through"] < 1 for channel in ("pos", "neg"))
