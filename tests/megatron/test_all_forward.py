"""All forward passes before all backward passes, against the two-pass step: loss, metrics and every gradient; what it
runs and leaves; its refusals; and deliberate mistakes in it."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron import all_forward, host_copies
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.objective import Gspo, PpoClip
from nemo_fiberpo.plan.layout import Layout as PlannedLayout
from nemo_fiberpo.plan.memory import Run, memory
from nemo_fiberpo.plan.shape import ModelShape
from nemo_fiberpo.verification.model import Shape
from tests.megatron import batches, tiny
from tests.megatron.batches import Batch
from tests.megatron.comparison import BOUND
from tests.megatron.pairs import (
    ROUTER_LOSSES,
    SPREAD,
    Found,
    largest_difference,
    pairs_worker,
    problems_for,
    step_of,
)
from tests.megatron.slow import same_metrics
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

BIAS = {"options": (("moe_router_enable_expert_bias", True), ("moe_router_score_function", "sigmoid"))}
RUNS = [
    (1, [Layout(microbatches=8), Layout(microbatches=4, packed=True, recompute=True, **ROUTER_LOSSES)]),
    (1, [Layout(microbatches=4, logprobs="chunked", recompute=True), Layout(microbatches=4, recompute=True, **BIAS)]),
    (2, [Layout(microbatches=4, **SPREAD), Layout(microbatches=4, recompute=True, overlap=True, rope=False)]),
    (2, [Layout(pp=2, microbatches=4, tied=True), Layout(pp=2, microbatches=4, recompute=True, overlap=True)]),
    (2, [Layout(pp=2, vpp=2, microbatches=4, overlap=True), Layout(pp=2, vpp=2, microbatches=4, recompute=True)]),
    (2, [Layout(tp=2, microbatches=4, recompute=True), Layout(tp=2, microbatches=4, tied=True, experts=0)]),
    (2, [Layout(ep=2, microbatches=4, **ROUTER_LOSSES), Layout(ep=2, microbatches=4, recompute=True, **SPREAD)]),
    (2, [Layout(cp=2, microbatches=4, packed=True), Layout(cp=2, microbatches=4, recompute=True, gathered="slice")]),
]
"""Ranks, and layouts with the same process groups."""
NAMES = ("drift", "far", "half without tokens", "penalty")


@pytest.fixture(scope="module")
def problems() -> bytes:
    return problems_for([layout for _, layouts in RUNS for layout in layouts], NAMES)


def check(two: Found, one: Found, layout: Layout) -> None:
    assert one.loss == pytest.approx(two.loss, rel=BOUND) and same_metrics(one.metrics, two.metrics)
    assert one.extra == pytest.approx(two.extra, rel=BOUND)
    assert one.calls == two.calls
    assert one.forwards == layout.microbatches * layout.vpp and two.forwards == 2 * one.forwards
    assert one.finalised == two.finalised == 1
    assert one.log.keys() == two.log.keys() and one.buffers.keys() == two.buffers.keys()
    assert all(torch.allclose(one.log[key], value, rtol=BOUND) for key, value in two.log.items())
    assert all(torch.equal(one.buffers[key], value) for key, value in two.buffers.items())


@pytest.mark.parametrize(("world", "layouts"), RUNS, ids=[f"{world}-{layouts[0]}" for world, layouts in RUNS])
def test_it_is_the_two_pass_step(problems, world: int, layouts: list[Layout]) -> None:
    ranks = distributed.run(pairs_worker, world, layouts, problems, "all_forward", timeout=400.0)
    for layout, of_layout in zip(layouts, zip(*ranks, strict=True), strict=True):
        for name, pairs in zip(NAMES, zip(*of_layout, strict=True), strict=True):
            error = largest_difference(pairs)
            print(f"{world} {layout} {name}: gradient difference {error:.1e}")
            assert error <= BOUND, (layout, name)
            for two, one in pairs:
                check(two, one, layout)
                assert (one.extra != 0) == (name == "penalty" and (layout.pp == 1 or one is pairs[-1][1]))
        if dict(layout.options).get("moe_router_enable_expert_bias"):
            assert any("expert_bias" in key and value.any() for key, value in pairs[0][1].buffers.items())


def random_worker(rank: int, world: int, layout: Layout, pickled: bytes, seeds: list[int]) -> list[tuple[Found, Found]]:
    """Log-ratios and advantages drawn anew, with and without PPO's minimum and ratio-gating maps."""
    base: Batch = pickle.loads(pickled)[layout.kind]["far"]
    every = ({"use_min": True}, {"gating": Gspo(0.05, 0.05)}, {"gating": PpoClip(0.1, 0.2)}, {})
    pairs = []
    with tiny.megatron(layout):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            shape = base["log_ratio"].shape
            ratio = torch.randn(shape, generator=generator) * 10 ** (-2 * float(torch.rand(1, generator=generator)))
            advantage = torch.randn(shape[0], 1, generator=generator).expand(shape)
            current = base["old"] + base["log_ratio"]
            batch = {**base, "log_ratio": ratio, "old": current - ratio, "advantage": advantage}
            steps = (step_of(layout, batch, "far", kind, **every[seed % 4]) for kind in ("exact", "all_forward"))
            pairs.append(tuple(steps))
    return pairs


def test_random_problems(problems) -> None:
    layout, seeds = Layout(microbatches=4, recompute=True), list(range(8))
    ranks = distributed.run(random_worker, 2, layout, problems, seeds, timeout=400.0)
    for seed, pairs in zip(seeds, zip(*ranks, strict=True), strict=True):
        assert largest_difference(pairs) <= BOUND, seed
        for two, one in pairs:
            check(two, one, layout)
    assert len({pairs[0].loss for pairs in ranks[0]}) == len(seeds)


HOST_RUNS = [
    (1, [Layout(microbatches=4, logprobs="chunked", recompute=True), Layout(microbatches=4, **ROUTER_LOSSES)]),
    (2, [Layout(tp=2, microbatches=4, tied=True, experts=0), Layout(tp=2, microbatches=4, recompute=True, **SPREAD)]),
    (2, [Layout(pp=2, microbatches=4, recompute=True, overlap=True)]),
]


def host_worker(rank: int, world: int, layouts: list[Layout], pickled: bytes) -> list[list[tuple[Found, Found]]]:
    host_copies.LEAST_BYTES = 0
    return pairs_worker(rank, world, layouts, pickled, "on_host")


@pytest.mark.parametrize(("world", "layouts"), HOST_RUNS, ids=[f"{world}-{layouts[0]}" for world, layouts in HOST_RUNS])
def test_what_is_kept_in_host_memory_comes_back(problems, world: int, layouts: list[Layout]) -> None:
    ranks = distributed.run(host_worker, world, layouts, problems, timeout=400.0)
    for layout, of_layout in zip(layouts, zip(*ranks, strict=True), strict=True):
        for name, pairs in zip(NAMES, zip(*of_layout, strict=True), strict=True):
            assert largest_difference(pairs) <= BOUND, (layout, name)
            for two, one in pairs:
                check(two, one, layout)


def recompute_worker(rank: int, world: int, layouts: list[Layout], pickled: bytes) -> list[Found]:
    given = pickle.loads(pickled)
    with tiny.megatron(layouts[0]):
        return [step_of(layout, given[layout.kind]["far"], "far", "all_forward") for layout in layouts]


def test_recomputation_does_not_change_the_gradient(problems) -> None:
    held = Layout(microbatches=4, **ROUTER_LOSSES)
    pairs = distributed.run(recompute_worker, 2, [held, dataclasses.replace(held, recompute=True)], problems)
    assert largest_difference(pairs) <= 1e-13
    assert all(one.loss == other.loss for one, other in pairs)


class Saved:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, value: torch.Tensor):
        self.value = value


def kept_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> int:
    """Bytes that the graphs of all micro-batches hold after the forward passes, parameters left out."""
    batch = pickle.loads(pickled)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(value: torch.Tensor) -> Saved:
        saved = Saved(value)
        alive.add(saved)
        return saved

    with tiny.megatron(layout):
        model, axes = tiny.make_model(layout), TokenAxes.from_parallel_state()
        rows = batches.rows_of(layout, batch, axes)
        policy = batches.make_policy(layout, model, rows)
        kept = [all_forward._Kept({"rows": entry}) for entry in rows]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
            all_forward._forward_passes(policy, kept)
        storages = {value.data_ptr(): value.nbytes() for value in (saved.value.untyped_storage() for saved in alive)}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(number for place, number in storages.items() if place not in weights)


@pytest.mark.parametrize("logprobs", ["chunked", "logits"])
@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_kept_is_what_the_plan_counts(tp: int, logprobs: str) -> None:
    wide = Shape(hidden=128, heads=8, channels=16, ffn=256, vocab=512)
    layout = Layout(tp=tp, microbatches=8, experts=0, layers=3, recompute=True, logprobs=logprobs, shape=wide)
    found = max(distributed.run(kept_worker, tp, layout, pickle.dumps(batches.make_batch())))
    shape = ModelShape(layers=3, hidden=128, heads=8, groups=8, head_dim=16, ffn=256, vocab=512)
    run = Run(
        prompt=6, response=6, rows=2, forward=2, generated=0, microbatches=8, weight_bytes=8, gradient_bytes=8,
        optimizer_bytes=16, recompute=-1, checkpoint_every=1, flash=True, allgather=False, logprobs=logprobs,
        all_forward=True,
    )  # fmt: skip
    items = memory(shape, PlannedLayout(1, tp, tp=tp, sequence_parallel=tp > 1), run, 1.0).training
    # Of log-probs, the plan counts what all micro-batches but the last keep; logits are float64 here, not float32.
    planned = items["activation checkpoints"] + 8 / 7 * items["inputs of log-probs kept"]
    planned += 2 * 8 / 7 * items.get("logits kept", 0)
    print(f"{layout}: {found} bytes kept, {planned:.0f} planned")
    assert planned <= found <= 1.05 * planned


@contextlib.contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """An attribute of the module of the step."""
    before = getattr(all_forward, name)
    setattr(all_forward, name, value)
    try:
        yield
    finally:
        setattr(all_forward, name, before)


def unfinalised(policy: Any, *given: Any, **options: Any) -> Any:
    finalise, policy.config.finalize_model_grads_func = policy.config.finalize_model_grads_func, None
    try:
        return right_backward(policy, *given, **options)
    finally:
        policy.config.finalize_model_grads_func = finalise


right_backward, right_scale, right_split = all_forward.backward_pass, all_forward.loss_scale, all_forward.split_like
MISTAKES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "no mistake": contextlib.nullcontext,
    "coefficients of another micro-batch": lambda: replaced("split_like", lambda *given: right_split(*given)[::-1]),
    "gradients are not finalised": lambda: replaced("backward_pass", unfinalised),
    "the scale of another number of micro-batches": lambda: replaced(
        "loss_scale", lambda number, axes: right_scale(number + 1, axes)
    ),
    "routers balance padding": lambda: replaced("balancing_real_tokens", contextlib.nullcontext),
}


def mistakes_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> list[tuple[Found, Found]]:
    batch = pickle.loads(pickled)[layout.kind]["far"]
    pairs = []
    with tiny.megatron(layout):
        two = step_of(layout, batch, "far", "exact")
        for mistake in MISTAKES.values():
            with mistake():
                pairs.append((two, step_of(layout, batch, "far", "all_forward")))
    return pairs


def test_a_mistake_is_far_above_the_bound(problems) -> None:
    ranks = distributed.run(mistakes_worker, 2, Layout(ep=2, microbatches=4, **ROUTER_LOSSES), problems, timeout=400.0)
    for mistake, pairs in zip(MISTAKES, zip(*ranks, strict=True), strict=True):
        error = largest_difference(pairs)
        print(f"{mistake}: {error:.1e}")
        assert error <= BOUND if mistake == "no mistake" else error > 1e-3, mistake


def refusals_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> list[str]:
    batch = pickle.loads(pickled)[layout.kind]["far"]
    broken = {**batch, "old": batch["old"].clone()}
    broken["old"][tuple(batch["mask"].nonzero()[0])] = torch.nan
    messages, make_model = [], tiny.make_model

    def with_field(name: str | None) -> Callable[[Layout], Any]:
        """Models whose config has the field set after they are built, for which some need Transformer Engine."""

        def make(layout: Layout) -> Any:
            model = make_model(layout)
            if name is not None:
                setattr(model.config, name, True)
            return model

        return make

    with tiny.megatron(layout):
        for given, name in ((batch, "cpu_offloading"), (batch, "moe_router_force_load_balancing"), (broken, None)):
            tiny.make_model = with_field(name)
            with pytest.raises(ValueError) as error:
                step_of(layout, given, "far", "all_forward")
            messages.append(str(error.value))
    return messages


def test_refusals_name_the_field_on_every_rank(problems) -> None:
    for offload, routing, ratio in distributed.run(refusals_worker, 2, Layout(microbatches=2), problems):
        assert offload.startswith("cpu_offloading: True is refused") and "switch it off, or use two passes" in offload
        assert routing.startswith("moe_router_force_load_balancing: True is refused by the exact step")
        assert ratio.startswith("log_ratio") and ("sample 0, token position 1" in ratio or "another rank" in ratio)


@pytest.mark.parametrize("value", [None, False, "none"])
def test_what_is_off_is_not_refused(value: Any) -> None:
    all_forward.refuse_unkept(SimpleNamespace(cpu_offloading=False, enable_cuda_graph=value, cuda_graph_impl=value))
    with pytest.raises(ValueError, match="cuda_graph_impl: local is refused"):
        all_forward.refuse_unkept(SimpleNamespace(cuda_graph_impl="local"))
    fused = SimpleNamespace(gradient_accumulation_fusion=True)
    all_forward.refuse_unkept(fused)
    with pytest.raises(ValueError, match="gradient_accumulation_fusion: True is refused"):
        all_forward.refuse_unkept(fused, on_host=True)
