"""The optimistic step against the two-pass step: loss, metrics and every gradient, on the layouts whose gradients
Megatron finalises in ways of their own; what it runs and reduces; and deliberate mistakes in it."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron import optimistic
from tests.megatron import tiny
from tests.megatron.comparison import BOUND
from tests.megatron.pairs import (
    PROBLEMS,
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

RUNS = [
    (1, [Layout(microbatches=8), Layout(microbatches=4, packed=True, **ROUTER_LOSSES)]),
    (2, [Layout(microbatches=4, **SPREAD), Layout(microbatches=4, overlap=True, rope=False)]),
    (2, [Layout(pp=2, microbatches=4, tied=True), Layout(pp=2, microbatches=4, tied=True, overlap=True)]),
    (2, [Layout(tp=2, microbatches=4), Layout(tp=2, microbatches=4, tied=True, experts=0)]),
    (2, [Layout(ep=2, microbatches=4, **ROUTER_LOSSES), Layout(ep=2, microbatches=4, recompute=True, **SPREAD)]),
    (2, [Layout(pp=2, vpp=2, microbatches=4, overlap=True)]),
    (2, [Layout(cp=2, microbatches=4), Layout(cp=2, microbatches=4, gathered="slice")]),
]
"""Ranks, and layouts with the same process groups."""


@pytest.fixture(scope="module")
def problems() -> bytes:
    return problems_for([layout for _, layouts in RUNS for layout in layouts])


@pytest.mark.parametrize(("world", "layouts"), RUNS, ids=[f"{world}-{layouts[0]}" for world, layouts in RUNS])
def test_it_is_the_two_pass_step(problems, world: int, layouts: list[Layout]) -> None:
    ranks = distributed.run(pairs_worker, world, layouts, problems, "optimistic", timeout=400.0)
    for layout, of_layout in zip(layouts, zip(*ranks, strict=True), strict=True):
        words = {}
        for name, pairs in zip(PROBLEMS, zip(*of_layout, strict=True), strict=True):
            error = largest_difference(list(pairs))
            two, one = pairs[0]
            words[name] = one.second_pass
            print(f"{world} {layout} {name}: gradient difference {error:.1e}, {one.second_pass} {one.share:.2f}")
            assert error <= BOUND, (layout, name)
            for two, one in pairs:
                assert one.loss == pytest.approx(two.loss, rel=BOUND) and same_metrics(one.metrics, two.metrics)
                assert one.extra == pytest.approx(two.extra, rel=BOUND)
                assert (one.second_pass, one.share, one.calls) == (words[name], pairs[0][1].share, two.calls + 1)
                again, chunks = round(one.share * layout.microbatches), layout.vpp
                assert one.forwards == (layout.microbatches + again) * chunks
                assert one.finalised == two.finalised == 1
                assert two.forwards == 2 * layout.microbatches * chunks
                assert one.log.keys() == two.log.keys()
                assert all(torch.allclose(one.log[key], value, rtol=BOUND) for key, value in two.log.items())
        assert words["quiet"] == "none" and words["far"] == "whole"
        assert words["local cells"] == "none" or (layout.cp > 1 and not layout.gathered)


@contextlib.contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """An attribute of the module of the optimistic step."""
    before = getattr(optimistic, name)
    setattr(optimistic, name, value)
    try:
        yield
    finally:
        setattr(optimistic, name, before)


@contextlib.contextmanager
def synchronised(policy: Any) -> Iterator[Callable[[], None]]:
    yield lambda: None


def whole_coefficients(*given: Any) -> Any:
    guesses = given[4]
    guesses.coefficients = [torch.zeros_like(value) for value in guesses.coefficients]
    return optimistic_correct(*given)


optimistic_correct, first_scale = optimistic._correct, optimistic.loss_scale
MISTAKES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "no mistake": contextlib.nullcontext,
    "no second pass": lambda: replaced("_chosen", lambda *given: []),
    "gradients are finalised twice": lambda: replaced("without_gradient_sync", synchronised),
    "the second pass has the exact coefficients": lambda: replaced("_correct", whole_coefficients),
    "router losses in both passes": lambda: replaced("without_router_losses", contextlib.nullcontext),
    "the second pass is scaled like the first": lambda: replaced(
        "loss_scale", lambda number, axes: first_scale(8, axes)
    ),
}


def mistakes_worker(rank: int, world: int, layout: Layout, pickled: bytes, name: str) -> list[tuple[Found, Found]]:
    batch = pickle.loads(pickled)[layout.kind][name]
    pairs = []
    with tiny.megatron(layout):
        two = step_of(layout, batch, name, "exact")
        for mistake in MISTAKES.values():
            with mistake():
                pairs.append((two, step_of(layout, batch, name, "optimistic")))
    return pairs


def test_a_mistake_is_far_above_the_bound(problems) -> None:
    layout, name = Layout(ep=2, microbatches=8, **ROUTER_LOSSES), "one domain"
    ranks = distributed.run(mistakes_worker, 2, layout, problems, name, timeout=400.0)
    for mistake, pairs in zip(MISTAKES, zip(*ranks, strict=True), strict=True):
        error = largest_difference(list(pairs))
        print(f"{mistake}: {error:.1e}")
        assert pairs[0][1].second_pass in ("part", "none" if mistake == "no second pass" else "part")
        assert error <= BOUND if mistake == "no mistake" else error > 1e-3, mistake
