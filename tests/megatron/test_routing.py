"""Router masses and labels read on real Megatron groups, against router inputs of one process; what reading disturbs
(nothing), and what it refuses. `layouts.py` compares them on every layout; these are a few of them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.routing import hard_labels
from nemo_fiberpo.megatron.step import current_log_probs, exact_step
from nemo_fiberpo.objective import ExpertPartitions
from nemo_fiberpo.verification import shards
from tests.megatron import batches, comparison, partitions, tiny
from tests.megatron.comparison import BOUND, Reference
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

JOBS = [
    (1, Layout(microbatches=4, rope=False), ("experts", "experts_first", "experts_soft", "trajectory_experts")),
    (2, Layout(tp=2, microbatches=2, dispatcher="allgather"), ("experts",)),
    (2, Layout(pp=2, vpp=2, microbatches=4, packed=True, overlap=True), ("experts_first",)),
    (2, Layout(cp=2, microbatches=2, packed=True), ("experts_first",)),
    (2, Layout(ep=2, microbatches=2, recompute=True), ("experts",)),
    (4, Layout(cp=2, tp=2, microbatches=2, gathered="slice", rope=False), ("experts",)),
    (4, Layout(tp=2, pp=2, ep=2, etp=1, microbatches=2, packed=True), ("experts_soft", "experts_floor")),
]
SCORES = {"softmax": (), "sigmoid": (("moe_router_score_function", "sigmoid"), ("moe_router_enable_expert_bias", True))}


@pytest.fixture(scope="module")
def references() -> Mapping[tuple[comparison.Kind, str], Reference]:
    cases = sorted({case for _, _, cases in JOBS for case in cases})
    return comparison.references_for([layout for _, layout, _ in JOBS], cases)


@pytest.mark.parametrize(("world", "layout", "cases"), JOBS, ids=[f"{world}-{layout}" for world, layout, _ in JOBS])
def test_labels_masses_and_gradients_are_those_of_one_process(
    references, world: int, layout: Layout, cases: tuple[str, ...]
) -> None:
    every = comparison.run_steps(world, [(layout, case) for case in cases], references)
    for case, outcomes in zip(cases, every, strict=True):
        expected = references[layout.kind, case]
        assert all(outcome.same_labels for outcome in outcomes)
        assert max(outcome.mass_error for outcome in outcomes) <= BOUND
        error, name = comparison.largest_error(outcomes, expected)
        assert max(error, comparison.loss_error(outcomes, expected)) <= BOUND, name


def test_every_partition_occurs_in_the_data_that_is_compared(references) -> None:
    for (_, case), reference in references.items():
        every, mask = reference.batch["expert_partition"], reference.batch["mask"]
        assert every[mask].bincount().min() > 5, case
        assert (every[:, 1:] != every[:, :-1])[mask[:, 1:]].double().mean() > 0.25, "labels one place off would pass"
        two = reference.batch["masses"].sort(dim=-1).values
        assert (two[..., -1] - two[..., -2]).min() > 1e-6, "a label that rounding could change"


@dataclasses.dataclass
class Host:
    """The tiny model on this rank, with the uneven batch in its micro-batches."""

    layout: Layout

    def __post_init__(self) -> None:
        self.axes = TokenAxes.from_parallel_state()
        self.batch = batches.make_batch()
        self.batch["old"] = -2.0 - self.batch["log_ratio"]
        self.restart()

    def restart(self) -> None:
        self.model = tiny.make_model(self.layout)
        self.step = batches.make_step(self.layout, self.batch, batches.STRATA, self.axes)
        self.policy = batches.make_policy(self.layout, self.model, self.step.rows)

    def exact_step(self, policy: Any) -> Any:
        return exact_step(policy, self.step.microbatches, self.step.tokens, batches.hierarchy(), Reducer(self.axes))

    def state(self) -> dict[str, torch.Tensor]:
        held = {}
        for index, chunk in enumerate(shards.chunks_of(self.model)):
            entries = {**dict(torch.nn.Module.named_buffers(chunk)), **chunk.module.state_dict()}
            held |= {f"{index} {name}": value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        return {name: value.clone() for name, value in held.items()}


def trace_worker(rank: int, world: int, layout: Layout) -> None:
    with tiny.megatron(layout):
        host = Host(layout)
        plain, plain_state = host.exact_step(host.policy), host.state()
        plain_grads = shards.gradients(host.model)
        host.restart()
        capture = partitions.make_capture(host.policy)
        routers = [module for chunk in host.policy.chunks for module in chunk.modules() if hasattr(module, "gating")]
        own = [dict(vars(router)) for router in routers]
        assert routers
        with capture.watch(host.policy, host.step.microbatches) as watched:
            assert all("gating" in vars(router) for router in routers)
            result = host.exact_step(watched)
        assert result.loss == plain.loss and result.report.metrics() == plain.report.metrics()
        state, grads = host.state(), shards.gradients(host.model)
        assert state.keys() == plain_state.keys() and all(torch.equal(state[k], plain_state[k]) for k in state)
        assert all(torch.equal(grads[name].value, part.value) for name, part in plain_grads.items())
        assert all(vars(router).keys() == before.keys() for router, before in zip(routers, own, strict=True))
        with pytest.raises(RuntimeError, match="in the middle"):
            with capture.watch(host.policy, host.step.microbatches):
                raise RuntimeError("in the middle")
        assert not any("gating" in vars(router) for router in routers)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, Layout(microbatches=2, aux_loss=0.1, recompute=True, options=SCORES["sigmoid"])),
        (2, Layout(pp=2, vpp=2, microbatches=2, aux_loss=0.1, packed=True)),
        (2, Layout(tp=2, microbatches=2, aux_loss=0.1, recompute=True, distributed_optimizer=True)),
    ],
    ids=str,
)
def test_reading_changes_no_bit_of_a_step_and_leaves_nothing_behind(world: int, layout: Layout) -> None:
    distributed.run(trace_worker, world, layout)


def passes_worker(rank: int, world: int, layout: Layout) -> None:
    with tiny.megatron(layout):
        host = Host(layout)
        capture = partitions.make_capture(host.policy)
        with capture.watch(host.policy, host.step.microbatches) as watched:
            current_log_probs(watched, host.step.microbatches)
        once = capture.masses()
        assert all(torch.equal(a, b) for a, b in zip(once, capture.masses(), strict=True)), "read twice"
        with capture.watch(host.policy, host.step.microbatches) as watched:
            host.exact_step(watched)  # pass A, pass D and, with recomputation, its forward passes again
        assert all(torch.equal(a, b) for a, b in zip(once, capture.masses(), strict=True))
        with capture.watch(host.policy, host.step.microbatches) as watched:
            current_log_probs(watched, host.step.microbatches)
            with torch.no_grad():
                for _, parameter in shards.named_parameters(host.model):
                    parameter.mul_(1.5)
            current_log_probs(watched, host.step.microbatches)
        assert all(torch.equal(a, b) for a, b in zip(once, capture.masses(), strict=True))
        other = partitions.read_masses(host.policy, host.step.microbatches)
        assert not any(torch.equal(a, b) for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, Layout(microbatches=4, recompute=True)), (2, Layout(pp=2, vpp=2, microbatches=4, recompute=True))],
    ids=str,
)
def test_the_first_pass_over_a_micro_batch_is_read_and_no_other(world: int, layout: Layout) -> None:
    distributed.run(passes_worker, world, layout)


Found = tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]


def masses_worker(rank: int, world: int, layout: Layout, layers: Any, zero: bool) -> Any:
    """This rank's masses in samples; on one process the router inputs of a pass over the whole batch, too."""
    with tiny.megatron(layout):
        host = Host(layout)
        if zero:
            with torch.no_grad():
                for name, parameter in shards.named_parameters(host.model):
                    parameter.mul_(0.0 if "router" in name else 1.0)
        masses = partitions.read_masses(host.policy, host.step.microbatches, layers)
        sizes = [len(host.batch["mask"]) // len(masses)] * len(masses)
        column = partitions.in_samples(masses, host.step.rows, sizes, host.batch["mask"].shape[1])
        if world > 1:
            return pickle.dumps(column)
        [laid] = batches.lay_out(layout, [host.batch], batches.LENGTH, 0)
        with partitions.router_inputs(host.model) as seen, torch.no_grad():
            host.policy.forward({"rows": laid.rows}, host.model)
        return pickle.dumps((column, seen))


def on_one_process(layout: Layout, layers: Any = "all", zero: bool = False) -> tuple[torch.Tensor, list]:
    alone = Layout(layers=layout.num_layers, options=layout.options)
    return pickle.loads(distributed.run(masses_worker, 1, alone, layers, zero)[0])


def on_ranks(world: int, layout: Layout, layers: Any = "all", zero: bool = False) -> torch.Tensor:
    """The one column that all ranks have."""
    columns = [pickle.loads(found) for found in distributed.run(masses_worker, world, layout, layers, zero)]
    assert all(torch.equal(columns[0], column) for column in columns), "ranks of one model must have the same bits"
    return columns[0]


@pytest.mark.parametrize("score", SCORES)
def test_masses_are_probabilities_before_the_selection(score: str) -> None:
    column, seen = on_one_process(Layout(options=SCORES[score]))
    assert (column - partitions.slow_masses(seen, score)[:, :-1]).abs().max() <= BOUND
    assert (column.sum(-1) - 1).abs().max() <= BOUND


@pytest.mark.parametrize("layers", ["all", [1], [4, 3]], ids=str)
def test_layers_may_lie_on_any_stage(layers: Any) -> None:
    """Four layers on two stages, of which one may have none of those chosen; every rank gets the same bits."""
    column, seen = on_one_process(Layout(layers=4), layers)
    chosen = range(4) if layers == "all" else [layer - 1 for layer in layers]
    expected = partitions.slow_masses([seen[index] for index in chosen])[:, :-1]
    assert (column - expected).abs().max() <= BOUND
    for layout in (Layout(pp=2, microbatches=2, layers=4), Layout(pp=2, vpp=2, microbatches=2)):
        assert (on_ranks(2, layout, layers) - expected).abs().max() <= BOUND
    shards = on_ranks(4, Layout(pp=2, tp=2, microbatches=4, layers=4, dispatcher="allgather"), layers)
    assert (shards - expected).abs().max() <= BOUND


def test_equal_masses_go_to_the_lowest_partition_on_every_layout() -> None:
    """Routers without weights: 3/8, 2/8 and 3/8 in each of three layers, however these are dealt to stages."""
    column, _ = on_one_process(Layout(layers=3), zero=True)
    assert torch.equal(column, torch.tensor([3 / 8, 2 / 8, 3 / 8]).expand_as(column))
    assert not hard_labels(column).any()
    for layers in ("all", [2, 3]):
        assert torch.equal(on_ranks(2, Layout(tp=2, layers=3, microbatches=2), layers, zero=True), column)
        assert torch.equal(on_ranks(2, Layout(pp=2, layers=4, microbatches=2), layers, zero=True), column)


def blocks_worker(rank: int, world: int, layout: Layout) -> list[int]:
    with tiny.megatron(layout):
        return list(tiny.make_model(layout).module.decoder.layers[0].mlp.local_expert_indices)


def test_expert_parallel_partitions_are_the_experts_of_megatrons_ranks() -> None:
    table, names = ExpertPartitions().table(tiny.EXPERTS, 2)
    blocks = distributed.run(blocks_worker, 2, Layout(ep=2))
    assert blocks == [[index for index in range(tiny.EXPERTS) if table[index] == rank] for rank in range(2)]
    assert names == ("experts_0-3", "experts_4-7")
