"""The optimistic step against the two-pass step: loss, metrics and every gradient, on the layouts whose gradients
Megatron finalises in ways of their own; what it runs and reduces; and deliberate mistakes in it."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nemo_fiberpo.megatron import optimistic
from nemo_fiberpo.megatron.compat import auxiliary_loss_log, fields_of
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.optimistic import optimistic_step
from nemo_fiberpo.megatron.step import exact_step
from nemo_fiberpo.verification import shards
from tests.megatron import batches, comparison, tiny
from tests.megatron.batches import STRATA, Batch
from tests.megatron.comparison import BOUND, CASES
from tests.megatron.slow import same_metrics
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

ROUTER_LOSSES = {"aux_loss": 0.1, "options": (("moe_z_loss_coeff", 0.1),)}
SPREAD = {"distributed_optimizer": True, "overlap": True}
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

# (batch, strata, what log-ratios are multiplied by, and whether in the first domain only)
PROBLEMS = {
    "quiet": ("uneven", STRATA, 0.02, False),
    "one domain": ("uneven", STRATA, 0.02, True),
    "drift": ("uneven", STRATA, 0.4, False),
    "far": ("uneven", STRATA, 1.0, False),
    "half without tokens": ("masked_half", STRATA, 0.5, False),
    "whole groups": ("groups_in_two", STRATA, 0.3, False),
    "local cells": ("groups_in_two", ("prompt_group", "trajectory"), 1.0, False),
    "penalty": ("uneven", STRATA, 0.3, True),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a rank's step gave; `forwards` and `finalised` count forward passes and how often gradients were finalised,
    `log` are the router losses that were logged."""

    loss: float
    metrics: dict[str, float]
    extra: float
    grads: dict[str, shards.Gradient]
    calls: int
    forwards: int
    finalised: int
    log: dict[str, torch.Tensor]
    second_pass: str | None
    share: float | None


def problem_of(name: str, batch: Batch) -> Batch:
    """The batch, whose old log-probs lie as far from the current ones as the problem says."""
    _, _, scale, one_domain = PROBLEMS[name]
    factor = torch.full_like(batch["log_ratio"], scale)
    if one_domain:
        factor = torch.where((batch["domain"] == 0)[:, None], 1.0, factor)
    current = batch["old"] + batch["log_ratio"]
    return {**batch, "log_ratio": factor * batch["log_ratio"], "old": current - factor * batch["log_ratio"]}


def step_of(layout: Layout, batch: Batch, name: str, guess: bool) -> Found:
    model, strata = tiny.make_model(layout), PROBLEMS[name][1]
    axes = TokenAxes.from_parallel_state(gathered={"cp": layout.gathered} if layout.gathered else None)
    step, reducer = batches.make_step(layout, batch, strata, axes), Reducer(axes)
    policy, forwards, finalised = batches.make_policy(layout, model, step.rows), 0, 0
    finalise = policy.config.finalize_model_grads_func

    def counted(*given: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return policy.forward(*given)

    def finalising(*given: Any, **options: Any) -> Any:
        nonlocal finalised
        finalised += 1
        return finalise(*given, **options)

    policy.config.finalize_model_grads_func = finalising
    counting, chain = dataclasses.replace(policy, forward=counted), batches.hierarchy(strata)
    options = {"extra_loss": batches.kl_penalty} if name == "penalty" else {}
    auxiliary_loss_log().clear()
    if guess:
        result = optimistic_step(counting, step.microbatches, step.tokens, step.guessed, chain, reducer, **options)
    else:
        result = exact_step(counting, step.microbatches, step.tokens, chain, reducer, **options)
    assert result.loss is not None and result.report is not None
    assert result.recompute_error < 1e-12
    log = {key: fields_of(entry)["values"].clone() for key, entry in auxiliary_loss_log().items()}
    grads, metrics = shards.gradients(model), result.report.metrics()
    done = reducer.calls, forwards, finalised, log, result.second_pass, result.second_share
    return Found(result.loss, metrics, result.extra_loss, grads, *done)


def pairs_worker(rank: int, world: int, layouts: list[Layout], pickled: bytes) -> list[list[tuple[Found, Found]]]:
    given: dict[comparison.Kind, dict[str, Batch]] = pickle.loads(pickled)
    found = []
    with tiny.megatron(layouts[0]):
        for layout in layouts:
            of_layout = given[layout.kind].items()
            found.append(
                [(step_of(layout, batch, name, False), step_of(layout, batch, name, True)) for name, batch in of_layout]
            )
    return found


def largest_difference(pairs: list[tuple[Found, Found]]) -> float:
    """Largest relative difference of any parameter's gradient, over the ranks."""
    worst = 0.0
    for two, one in pairs:
        assert two.grads.keys() == one.grads.keys()
        for name, part in two.grads.items():
            error = float((one.grads[name].value - part.value).norm() / part.value.norm().clamp_min(1e-300))
            worst = error if not error <= worst else worst
    return worst


@pytest.fixture(scope="module")
def problems() -> bytes:
    """By kind of model, whose log-probs in one process the old ones are made from."""
    cases = sorted({case for case, *_ in PROBLEMS.values()})
    known = {case: next(name for name, entry in CASES.items() if entry.batch == case) for case in cases}
    layouts = [layout for _, layouts in RUNS for layout in layouts]
    references = comparison.references_for(layouts, list(known.values()))
    return pickle.dumps(
        {
            kind: {name: problem_of(name, references[kind, known[case]].batch) for name, (case, *_) in PROBLEMS.items()}
            for kind in {layout.kind for layout in layouts}
        }
    )


@pytest.mark.parametrize(("world", "layouts"), RUNS, ids=[f"{world}-{layouts[0]}" for world, layouts in RUNS])
def test_it_is_the_two_pass_step(problems, world: int, layouts: list[Layout]) -> None:
    ranks = distributed.run(pairs_worker, world, layouts, problems, timeout=400.0)
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
        two = step_of(layout, batch, name, guess=False)
        for mistake in MISTAKES.values():
            with mistake():
                pairs.append((two, step_of(layout, batch, name, guess=True)))
    return pairs


def test_a_mistake_is_far_above_the_bound(problems) -> None:
    layout, name = Layout(ep=2, microbatches=8, **ROUTER_LOSSES), "one domain"
    ranks = distributed.run(mistakes_worker, 2, layout, problems, name, timeout=400.0)
    for mistake, pairs in zip(MISTAKES, zip(*ranks, strict=True), strict=True):
        error = largest_difference(list(pairs))
        print(f"{mistake}: {error:.1e}")
        assert pairs[0][1].second_pass in ("part", "none" if mistake == "no second pass" else "part")
        assert error <= BOUND if mistake == "no mistake" else error > 1e-3, mistake
