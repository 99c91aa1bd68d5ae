"""The exact step on real Megatron groups over gloo against one process and plain autograd: loss and every gradient.

One set of numbers serves all layouts: the reference is a single process with the whole batch in one micro-batch, where
the loss is the slow objective of `batches.py` and the gradient is autograd's. The bound is 1e-10, relative, in float64.
These are layouts chosen for what they combine; `layouts.py` runs all of them.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron.compat import auxiliary_loss_log, fields_of, schedule_cp_factor
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.step import current_log_probs
from nemo_fiberpo.verification import shards
from tests.megatron import batches, comparison, tiny
from tests.megatron.batches import Batch
from tests.megatron.comparison import BOUND, Outcome, Reference, take_step
from tests.megatron.slow import same_metrics
from tests.megatron.tiny import Layout
from tests.support import distributed

pytestmark = pytest.mark.distributed

CASES = ("uneven", "masked_half", "on_policy", "penalty")
SPREAD = {"distributed_optimizer": True, "overlap": True}

FEW = [
    (1, Layout(microbatches=4, rope=False)),
    (2, Layout(microbatches=8, rope=False, **SPREAD)),
    (2, Layout(tp=2, microbatches=2, dispatcher="allgather")),
    (2, Layout(pp=2, microbatches=4, overlap=True)),
    (2, Layout(cp=2, microbatches=2)),
]
"""Every axis once, with all cases of data."""

MANY = [
    (1, Layout(microbatches=16, packed=True)),
    (2, Layout(tp=2, experts=0, sequence_parallel=False, rope=False)),
    (2, Layout(cp=2, microbatches=2, packed=True)),
    (2, Layout(cp=2, microbatches=2, gathered="slice", packed=True)),
    (2, Layout(cp=2, microbatches=2, gathered="sum", rope=False)),
    (2, Layout(ep=2, microbatches=2, recompute=True)),
    (2, Layout(pp=2, vpp=2, microbatches=4, packed=True, overlap=True)),
    (4, Layout(cp=2, tp=2, microbatches=2, dispatcher="allgather", rope=False)),
    (4, Layout(ep=4, etp=1, tp=2, microbatches=2, packed=True, **SPREAD)),
    (4, Layout(ep=2, etp=2, tp=2, microbatches=2, dispatcher="allgather", packed=True)),
    (4, Layout(pp=4, microbatches=4, dispatcher="allgather")),
    (8, Layout(tp=2, pp=2, cp=2, ep=4, etp=1, vpp=2, microbatches=4, packed=True, recompute=True, **SPREAD)),
]
"""What axes do together, with the uneven batch."""

JOBS = [(world, layout, CASES) for world, layout in FEW] + [(world, layout, CASES[:1]) for world, layout in MANY]


@pytest.fixture(scope="module")
def references() -> Mapping[tuple[comparison.Kind, str], Reference]:
    return comparison.references_for([layout for _, layout, _ in JOBS], CASES)


def uneven(references: Mapping[tuple[comparison.Kind, str], Reference], layout: Layout | None = None) -> Batch:
    return references[(layout or FEW[1][1]).kind, "uneven"].batch


def check(outcomes: list[Outcome], expected: Reference, world: int, on_policy: bool) -> None:
    for outcome in outcomes:
        assert outcome.calls == 2
        assert len(outcome.reductions) == (2 if world > 1 else 0)
        assert outcome.loss == pytest.approx(expected.loss, rel=BOUND, abs=1e-14)
        assert outcome.loss == outcomes[0].loss and outcome.metrics == outcomes[0].metrics
        # On-policy the log-ratios are rounding errors around 0, and so is what there is to report of them.
        assert on_policy or same_metrics(outcome.metrics, expected.metrics)
        assert outcome.recompute_error < 1e-12
    represented = sum(outcome.extra for outcome in outcomes if outcome.represents)
    assert represented == pytest.approx(expected.extra, rel=BOUND)


@pytest.mark.parametrize(("world", "layout", "cases"), JOBS, ids=[f"{world}-{layout}" for world, layout, _ in JOBS])
def test_loss_and_every_gradient_are_those_of_one_process(
    references, world: int, layout: Layout, cases: tuple[str, ...]
) -> None:
    every = comparison.run_steps(world, [(layout, case) for case in cases], references)
    for case, outcomes in zip(cases, every, strict=True):
        expected = references[layout.kind, case]
        check(outcomes, expected, world, case == "on_policy")
        error, name = comparison.largest_error(outcomes, expected)
        print(f"{world} ranks {layout} {case}: gradient error {error:.1e} ({name}), {outcomes[0].reductions}")
        assert error <= BOUND, name


def options_worker(rank: int, world: int, layout: Layout, pickled: bytes, options: dict[str, Any]) -> Outcome:
    with tiny.megatron(layout):
        return take_step(layout, pickle.loads(pickled), **options)


@pytest.mark.parametrize(("world", "layout"), [FEW[1], FEW[3], FEW[4]], ids=str)
def test_the_first_step_after_a_rollout_reduces_nothing(references, world: int, layout: Layout) -> None:
    expected = references[layout.kind, "on_policy"]
    outcomes = distributed.run(options_worker, world, layout, pickle.dumps(expected.batch), {"on_policy": True})
    for outcome in outcomes:
        assert outcome.calls == 0 and not outcome.reductions
        assert outcome.loss is None and outcome.metrics is None and outcome.recompute_error < 1e-12
    assert comparison.largest_error(outcomes, expected)[0] <= BOUND


def test_every_regime_occurs_in_the_data_that_is_compared(references) -> None:
    for case in ("uneven", "masked_half"):
        metrics = references[FEW[0][1].kind, case].metrics
        for regime in ("pass_through", "rollback", "zeroed"):
            assert sum(value for name, value in metrics.items() if name.endswith(regime)) > 0, (regime, metrics)
        assert 0 < metrics["token/clipped"] < 1


def test_forward_only_makes_no_gradient(references) -> None:
    expected = references[FEW[0][1].kind, "uneven"]
    options = {"forward_only": True}
    [outcome] = distributed.run(options_worker, 1, FEW[0][1], pickle.dumps(expected.batch), options)
    assert outcome.loss == pytest.approx(expected.loss, rel=BOUND)
    assert all(part.value.eq(0).all() for part in outcome.grads.values())


def poisoned(batch: Batch, name: str, value: float, live: bool) -> Batch:
    """One live token of the first sample, or all masked tokens, set to `value`."""
    where = batch["mask"] if live else ~batch["mask"]
    out = batch[name].clone()
    out[tuple(where.nonzero()[0])] = value
    return {**batch, name: out if live else torch.where(where, value, batch[name])}


def refusal_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> dict[str, str]:
    messages = {}
    with tiny.megatron(layout):
        for name, batch in pickle.loads(pickled).items():
            try:
                take_step(layout, batch)
            except ValueError as error:
                messages[name] = str(error)
            dist.barrier()
    return messages


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, Layout(microbatches=2)),
        (2, Layout(cp=2, microbatches=2)),
        (2, Layout(cp=2, microbatches=2, gathered="slice")),
        (4, Layout(pp=2, microbatches=2)),
    ],
    ids=str,
)
def test_non_finite_live_input_raises_on_every_rank(references, world: int, layout: Layout) -> None:
    batch = uneven(references, layout)
    jobs = {
        "log_ratio": poisoned(batch, "old", math.nan, live=True),
        "weighted_advantage": poisoned(batch, "advantage", math.inf, live=True),
    }
    for messages in distributed.run(refusal_worker, world, layout, pickle.dumps(jobs)):
        assert set(messages) == set(jobs)
        for name, message in messages.items():
            assert message.startswith(name)
            assert "sample 0, token position 1" in message or "another rank" in message


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, Layout(microbatches=2, rope=False)), (2, Layout(cp=2, microbatches=2, packed=True))],
    ids=str,
)
def test_masked_input_changes_no_bit(references, world: int, layout: Layout) -> None:
    batch = uneven(references, layout)
    every = {"clean": batch} | {
        f"{name} {value}": poisoned(batch, name, value, live=False)
        for value in (math.nan, math.inf, -math.inf)
        for name in ("old", "advantage")
    }
    jobs = pickle.dumps([(layout, one, "uneven") for one in every.values()])
    for clean, *others in distributed.run(comparison.steps_worker, world, jobs):
        for outcome in others:
            assert outcome.loss == clean.loss
            for name, part in clean.grads.items():
                assert torch.equal(outcome.grads[name].value, part.value)


def trace_worker(rank: int, world: int, layout: Layout, pickled: bytes) -> None:
    """Pass A after a first full step, so that there is something to disturb."""
    with tiny.megatron(layout):
        model = tiny.make_model(layout)
        axes = TokenAxes.from_parallel_state()
        step = batches.make_step(layout, pickle.loads(pickled), batches.STRATA, axes)
        policy = batches.make_policy(layout, model, step.rows)
        plain_schedule(policy, step.microbatches)
        chunks = shards.chunks_of(model)

        def state() -> dict[str, torch.Tensor]:
            log = {name: fields_of(entry)["values"] for name, entry in auxiliary_loss_log().items()}
            buffers = {
                f"{index} {name}": buffer
                for index, chunk in enumerate(chunks)
                for name, buffer in torch.nn.Module.named_buffers(chunk)
            }
            grads = {name: parameter.main_grad for name, parameter in shards.named_parameters(model)}
            return {k: v.clone() for part in (log, buffers, grads) for k, v in part.items()} | {
                "rng": torch.get_rng_state()
            }

        def called(*_: Any) -> Any:
            raise AssertionError("a gradient hook was called in a forward-only pass")

        policy.config.no_sync_func = policy.config.grad_sync_func = called
        before = state()
        assert any(value.any() for name, value in before.items() if "loss" in name)
        assert any("expert" in name for name, _ in torch.nn.Module.named_buffers(chunks[0]))
        log_probs = current_log_probs(policy, step.microbatches)
        after = state()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert policy.config.no_sync_func is called and policy.config.grad_sync_func is called
        assert all(chunk.training for chunk in chunks)
        shapes = [tuple(old.shape) for old in step.tokens.old_log_probs]
        last = axes.axis("pp").rank == layout.pp - 1
        assert [tuple(lp.shape) for lp in log_probs] == (shapes if last else [])


def plain_schedule(policy: Any, microbatches: list[dict[str, Any]]) -> None:
    """Megatron's schedule with a loss of 0, so that auxiliary losses alone make gradients."""

    def forward_step(data: Any, module: Any) -> Any:
        return policy.forward(next(data), module), lambda output: (output.sum() * 0.0, {})

    iterators = [iter(microbatches) for _ in policy.chunks]
    policy.forward_backward_func(
        forward_step_func=forward_step, data_iterator=iterators if isinstance(policy.model, list) else iterators[0],
        model=policy.model, num_microbatches=len(microbatches), seq_length=policy.seq_length,
        micro_batch_size=policy.micro_batch_size, forward_only=False,
    )  # fmt: skip


EXPERT_BIAS = (("moe_router_enable_expert_bias", True), ("moe_router_score_function", "sigmoid"))


@pytest.mark.parametrize(
    ("world", "layout"), [(1, Layout(microbatches=2)), (2, Layout(pp=2, vpp=2, microbatches=2))], ids=str
)
def test_pass_a_leaves_no_state_behind(references, world: int, layout: Layout) -> None:
    biased = dataclasses.replace(layout, aux_loss=0.1, options=(*EXPERT_BIAS, ("moe_z_loss_coeff", 0.1)))
    distributed.run(trace_worker, world, biased, pickle.dumps(uneven(references)))


def cp_factor_worker(rank: int, world: int) -> tuple[int, bool]:
    import inspect

    from megatron.core.pipeline_parallel import schedules

    return schedule_cp_factor(4), "output_tensor *= " in inspect.getsource(schedules)


def test_the_cp_factor_is_that_of_the_schedule() -> None:
    factor, multiplies = distributed.run(cp_factor_worker, 1)[0]
    assert factor == (4 if multiplies else 1)
