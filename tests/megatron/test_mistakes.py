"""Deliberate mistakes in each axis's reduction are caught: the comparison of `test_exact_step` fails by far.

Mistakes are made in the workers, in the `Reducer` or the axes that the step is given; the rest is as it is.

    double count       copies are summed as if they were shards (tp, pp, gathered cp), or the first rank of the axis
                       adds its tokens twice (cp, dp, ep)
    missing reduce     both reductions sum over a group that lacks the axis
    identity backward  the second reduction, that of the adjoint sums, does: along the axis it is the identity
    wrong speaker      the first pipeline stage speaks instead of the last, the only one with log-probs
    wrong average      the axis is forgotten in what DDP averages over (cp, dp)
    wrong gather       the backward pass of the gather over cp is the other one of `GATHERED` than the axes say, wrong
                       by the size of the axis

What cannot be got wrong, and so is not here: missing reduce and identity backward of tp, pp and gathered cp. There the
ranks whose loss reaches the parameters (for pp the last stage) have all log-probs, and sums over the other axes are
complete already; leaving the axis out is no mistake of the gradient. ep is no axis of tokens: its ranks lie inside
dp x cp, so a mistake of ep is one among some ranks of dp.

The step's own checks of what ranks agree on (`agreement.py`, and the number of ranks in `inputs.check_sums`) ride in
the first reduction and refuse those mistakes that touch their numbers, too. They are switched off here: the comparison
must catch them by itself.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron import step
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.objective import fibration
from nemo_fiberpo.objective.sharing import NO_RIDERS
from tests.megatron import comparison, tiny
from tests.megatron.comparison import BOUND, Outcome
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

FAR = 1e-3
NONE = "no mistake"
SHARDED = ("double count", "missing reduce", "identity backward")

RANKS = 4  # at least two ranks hold tokens of their own: cells of one rank need no reduction
DENSE = Layout(experts=0, microbatches=2)
# (layout, axis, mistakes)
PLAN = [
    (dataclasses.replace(DENSE, tp=2), "tp", ("double count",)),
    (dataclasses.replace(DENSE, pp=2), "pp", ("double count", "wrong speaker")),
    (dataclasses.replace(DENSE, cp=2), "cp", (*SHARDED, "wrong average")),
    (dataclasses.replace(DENSE, cp=2, gathered="slice"), "cp", ("double count", "wrong average", "wrong gather")),
    (dataclasses.replace(DENSE, cp=2, gathered="sum"), "cp", ("double count", "wrong average", "wrong gather")),
    (dataclasses.replace(DENSE, cp=2), "dp", (*SHARDED, "wrong average")),
    (Layout(ep=2, microbatches=2), "ep", SHARDED),
]
KEYS = [(index, mistake) for index, (_, _, mistakes) in enumerate(PLAN) for mistake in (NONE, *mistakes)]


def with_axis(axes: TokenAxes, name: str, **changes: object) -> TokenAxes:
    changed = tuple(dataclasses.replace(axis, **changes) if axis.name == name else axis for axis in axes.axes)
    return dataclasses.replace(axes, axes=changed)


def place_on(axis: str) -> tuple[int, dist.ProcessGroup]:
    """This rank's place on an axis of shards, and the group of the ranks that share that place."""
    from megatron.core import parallel_state as mpu

    if axis == "cp":
        return mpu.get_context_parallel_rank(), mpu.get_data_parallel_group()
    if axis == "dp":
        return mpu.get_data_parallel_rank(), mpu.get_context_parallel_group()
    return mpu.get_expert_model_parallel_rank(), mpu.get_expert_data_parallel_group()


class DoubleCount(Reducer):
    axis = ""

    def __call__(self, buffer: torch.Tensor) -> torch.Tensor:
        return super().__call__(buffer * 2 if place_on(self.axis)[0] == 0 else buffer)


class MissingReduce(Reducer):
    axis = ""

    def __call__(self, buffer: torch.Tensor) -> torch.Tensor:
        total = buffer.clone()
        dist.all_reduce(total, group=place_on(self.axis)[1])
        return total


class IdentityBackward(MissingReduce):
    def __call__(self, buffer: torch.Tensor) -> torch.Tensor:
        if self.calls % 2 == 0:
            return Reducer.__call__(self, buffer)
        self.calls += 1
        return super().__call__(buffer)


def sabotaged(mistake: str, axis: str, axes: TokenAxes) -> Reducer:
    """The reducer of a step in which the mistake is made; its axes also say what the loss is multiplied by."""
    if mistake == "wrong speaker":
        return Reducer(with_axis(axes, axis, speaker=0))
    if mistake == "wrong average":
        return Reducer(with_axis(axes, axis, averaged=False))
    if mistake == "wrong gather":
        other = {"slice": "sum", "sum": "slice"}[axes.axis(axis).backward or ""]
        return Reducer(with_axis(axes, axis, backward=other))
    if mistake == "double count" and axis in ("tp", "pp"):
        return Reducer(with_axis(axes, axis, sharded=True))
    if mistake == "double count" and axes.axis("cp").backward:
        reducer: Reducer = CopiesAsShards(axes)
    else:
        kinds = {"double count": DoubleCount, "missing reduce": MissingReduce, "identity backward": IdentityBackward}
        reducer = kinds.get(mistake, Reducer)(axes)
    reducer.axis = axis  # type: ignore[attr-defined]
    return reducer


class CopiesAsShards(Reducer):
    """Sums gathered log-probs of all cp ranks; the loss is scaled as it should be."""

    def __call__(self, buffer: torch.Tensor) -> torch.Tensor:
        return Reducer(with_axis(self.axes, "cp", sharded=True, backward=None))(buffer)


def mistakes_worker(
    rank: int, world: int, layout: Layout, axis: str, mistakes: list[str], pickled: bytes
) -> list[Outcome]:
    batch = pickle.loads(pickled)
    step.agreement = lambda *arguments: NO_RIDERS  # type: ignore[assignment]
    fibration.check_sums = lambda *arguments: None  # type: ignore[assignment]
    with tiny.megatron(layout):
        return [
            comparison.take_step(layout, batch, make_reducer=lambda axes, m=mistake: sabotaged(m, axis, axes))
            for mistake in mistakes
        ]


@pytest.fixture(scope="module")
def errors() -> Iterator[dict[tuple[int, str], float]]:
    """Largest relative error of any gradient, by place in PLAN and mistake."""
    references = comparison.references_for([layout for layout, _, _ in PLAN], ["uneven"])
    found = {}
    for index, (layout, axis, mistakes) in enumerate(PLAN):
        expected = references[layout.kind, "uneven"]
        every = [NONE, *mistakes]
        ranks = distributed.run(mistakes_worker, RANKS, layout, axis, every, pickle.dumps(expected.batch))
        for mistake, outcomes in zip(every, zip(*ranks, strict=True), strict=True):
            found[index, mistake] = comparison.largest_error(list(outcomes), expected)[0]
    yield found
    print("\n| layout | axis | mistake | largest gradient error |\n|---|---|---|---|")
    for (index, mistake), error in found.items():
        layout, axis, _ = PLAN[index]
        gathered = f" gathered {layout.gathered}" if layout.gathered else ""
        data = RANKS // (layout.tp * layout.pp * layout.cp)
        print(f"| {layout.groups} dp{data}{gathered} | {axis} | {mistake} | {error:.1e} |")


@pytest.mark.parametrize(("index", "mistake"), KEYS, ids=[f"{PLAN[i][1]}-{PLAN[i][0].gathered}-{m}" for i, m in KEYS])
def test_a_mistake_is_far_above_the_bound(errors, index: int, mistake: str) -> None:
    if mistake == NONE:
        assert errors[index, mistake] <= BOUND
    else:
        assert errors[index, mistake] > FAR
