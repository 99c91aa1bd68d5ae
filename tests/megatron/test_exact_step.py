"""The exact step on real Megatron groups over gloo against one process and plain autograd: loss and every gradient.

One set of numbers serves all layouts: the reference is a single process with the whole batch in one micro-batch, where
the loss is the slow objective of `tiny.py` and the gradient is autograd's. The bound is 1e-10, relative, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron.schedule import auxiliary_loss_log, schedule_cp_factor
from nemo_fiberpo.megatron.step import current_log_probs, exact_step
from tests import distributed
from tests.megatron import tiny
from tests.megatron.tiny import Layout

pytestmark = pytest.mark.distributed

BOUND = 1e-10
CASES = ("uneven", "masked_half", "on_policy")


def reference_worker(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Per case: the batch with its old log-probs, and loss and gradients by autograd through the slow objective."""
    out = {}
    with tiny.megatron(Layout()):
        for case in (*CASES, "penalty"):
            model = tiny.make_model(Layout())
            batch = tiny.make_batch(case)
            policy = tiny.make_policy(model, tiny.SAMPLES)
            log_probs = policy.log_probs(policy.forward(batch, model), batch)
            batch["old"] = log_probs.detach() - batch["log_ratio"]
            loss = -tiny.slow_objective(log_probs - batch["old"], batch, tiny.hierarchy(), ["math", "code"])
            extra = tiny.kl_penalty(log_probs, batch) if case == "penalty" else torch.zeros(())
            (loss + extra).backward()
            model.finish_grad_sync()
            grads = {name: grad for name, (grad, _) in tiny.gradients(model).items()}
            out[case] = {"batch": batch, "loss": loss.item(), "extra": extra.item(), "grads": grads}
    return out


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return distributed.run(reference_worker, 1)[0]


def take_step(layout: Layout, batch: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """One exact step on the tiny model, in a rank's process."""
    from megatron.core import parallel_state as mpu

    model = tiny.make_model(layout)
    reducer = tiny.make_reducer()
    local = tiny.share_of(batch, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())
    tokens = tiny.make_tokens(local, layout.microbatches, reducer.axes)
    microbatches = tiny.split(local, layout.microbatches)
    policy = tiny.make_policy(model, len(microbatches[0]["tokens"]))
    with tiny.counting_all_reduces() as sizes:
        result = exact_step(policy, microbatches, tokens, tiny.hierarchy(), reducer, **options)
    return {
        "loss": result.loss,
        "extra": result.extra_loss,
        "metrics": result.report.metrics() if result.report else None,
        "recompute_error": result.recompute_error,
        "grads": tiny.gradients(model),
        "reductions": sizes,
        "counted": (reducer.calls, reducer.bytes),
        "tp": mpu.get_tensor_model_parallel_rank(),
        "dp": mpu.get_data_parallel_rank(),
    }


def step_worker(rank: int, world: int, layout: Layout, jobs: dict[str, tuple[dict, dict]]) -> dict[str, dict]:
    with tiny.megatron(layout):
        return {name: take_step(layout, batch, **options) for name, (batch, options) in jobs.items()}


def largest_gradient_error(results: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error of any parameter's gradient, over all copies of it; every parameter must have one."""
    worst, seen = 0.0, set()
    for dp in sorted({result["dp"] for result in results}):
        replica = [result for result in results if result["dp"] == dp]
        for name in {name for result in replica for name in result["grads"]}:
            holders = sorted((r for r in replica if name in r["grads"]), key=lambda r: r["tp"])
            dim = holders[0]["grads"][name][1]
            copies = [r["grads"][name][0] for r in holders]
            for grad in copies if dim is None else [torch.cat(copies, dim=dim)]:
                worst = max(worst, float((grad - expected[name]).norm() / expected[name].norm()))
            seen.add(name)
    assert seen == set(expected)
    return worst


LAYOUTS = [
    (1, Layout()),
    (1, Layout(microbatches=2)),
    (1, Layout(microbatches=8)),
    (2, Layout(microbatches=1)),
    (2, Layout(microbatches=4)),
    (2, Layout(tp=2, microbatches=2)),
    (2, Layout(tp=2, microbatches=2, dispatcher="allgather")),
    (2, Layout(pp=2, microbatches=4)),
    (2, Layout(microbatches=2, overlap=True)),
    (4, Layout(pp=2, microbatches=2, overlap=True)),
    (4, Layout(microbatches=2)),
    (4, Layout(tp=2, microbatches=2)),
    (4, Layout(tp=2, pp=2, microbatches=4)),
]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_loss_and_every_gradient_are_those_of_one_process(references, world: int, layout: Layout) -> None:
    jobs = {case: (references[case]["batch"], {}) for case in CASES}
    jobs["skipped"] = (references["on_policy"]["batch"], {"on_policy": True})
    jobs["penalty"] = (references["penalty"]["batch"], {"extra_loss": tiny.kl_penalty})
    ranks = distributed.run(step_worker, world, layout, jobs)
    for job in jobs:
        expected = references["on_policy" if job == "skipped" else job]
        results = [result[job] for result in ranks]
        expected_calls = 0 if job == "skipped" else 2
        for result in results:
            calls, size = result["counted"]
            assert calls == expected_calls
            assert len(result["reductions"]) == (expected_calls if world > 1 else 0)
            assert sum(result["reductions"]) == (size if world > 1 else 0)
            assert result["loss"] == (pytest.approx(expected["loss"], rel=BOUND, abs=1e-14) if expected_calls else None)
            assert result["loss"] == results[0]["loss"] and result["metrics"] == results[0]["metrics"]
            assert result["recompute_error"] < 1e-12
        represented = {(r["dp"], r["tp"]): r["extra"] for r in results if r["tp"] == 0 and r["extra"]}
        assert sum(represented.values()) == pytest.approx(expected["extra"], rel=BOUND)
        error = largest_gradient_error(results, expected["grads"])
        print(f"{world} ranks {layout} {job}: gradient error {error:.1e}, reductions {results[0]['reductions']} bytes")
        assert error <= BOUND


def test_every_regime_occurs_in_the_data_that_is_compared(references) -> None:
    jobs = {case: (references[case]["batch"], {"forward_only": True}) for case in ("uneven", "masked_half")}
    for result in distributed.run(step_worker, 1, Layout(), jobs)[0].values():
        metrics = result["metrics"]
        for regime in ("pass_through", "rollback", "zeroed"):
            assert sum(value for name, value in metrics.items() if name.endswith(regime)) > 0, (regime, metrics)
        assert 0 < metrics["token/clipped"] < 1
        assert all(grad.eq(0).all() for grad, _ in result["grads"].values())


def poisoned(batch: dict[str, torch.Tensor], name: str, value: float, live: bool) -> dict[str, torch.Tensor]:
    """One live token of the first sample, or all masked tokens, set to `value`."""
    where = batch["mask"] if live else ~batch["mask"]
    out = batch[name].clone()
    out[tuple(where.nonzero()[0])] = value
    return {**batch, name: out if live else torch.where(where, value, batch[name])}


def refusal_worker(rank: int, world: int, layout: Layout, jobs: dict[str, dict]) -> dict[str, str]:
    messages = {}
    with tiny.megatron(layout):
        for name, batch in jobs.items():
            try:
                take_step(layout, batch)
            except ValueError as error:
                messages[name] = str(error)
            dist.barrier()
    return messages


@pytest.mark.parametrize(("world", "layout"), [(2, Layout(microbatches=2)), (4, Layout(pp=2, microbatches=2))], ids=str)
def test_non_finite_live_input_raises_on_every_rank(references, world: int, layout: Layout) -> None:
    batch = references["uneven"]["batch"]
    jobs = {
        "log_ratio": poisoned(batch, "old", math.nan, live=True),
        "weighted_advantage": poisoned(batch, "advantage", math.inf, live=True),
    }
    for messages in distributed.run(refusal_worker, world, layout, jobs):
        assert set(messages) == set(jobs)
        for name, message in messages.items():
            assert message.startswith(name)
            assert "sample 0, token position 1" in message or "another rank" in message


def test_masked_input_changes_no_bit(references) -> None:
    batch = references["uneven"]["batch"]
    jobs = {"clean": (batch, {})}
    for value in (math.nan, math.inf, -math.inf):
        for name in ("old", "advantage"):
            jobs[f"{name} {value}"] = (poisoned(batch, name, value, live=False), {})
    for ranks in distributed.run(step_worker, 2, Layout(microbatches=2), jobs):
        for result in ranks.values():
            assert result["loss"] == ranks["clean"]["loss"]
            for name, (grad, _) in ranks["clean"]["grads"].items():
                assert torch.equal(result["grads"][name][0], grad)


def trace_worker(rank: int, world: int, layout: Layout, batch: dict[str, torch.Tensor]) -> None:
    """Pass A after a first full step, so that there is something to disturb."""
    with tiny.megatron(layout):
        model = tiny.make_model(layout)
        policy = tiny.make_policy(model, 4)
        microbatches = tiny.split(batch, 2)
        plain_schedule(policy, microbatches)

        def state() -> dict[str, torch.Tensor]:
            log = {name: entry["values"] for name, entry in auxiliary_loss_log().items()}
            buffers = dict(torch.nn.Module.named_buffers(model))
            grads = {name: parameter.main_grad for name, parameter in tiny.named_parameters(model)}
            return {k: v.clone() for part in (log, buffers, grads) for k, v in part.items()} | {
                "rng": torch.get_rng_state()
            }

        def called(*_: Any) -> Any:
            raise AssertionError("a gradient hook was called in a forward-only pass")

        policy.config.no_sync_func = policy.config.grad_sync_func = called
        before = state()
        assert any(value.any() for name, value in before.items() if "loss" in name)
        assert any("expert" in name for name, _ in torch.nn.Module.named_buffers(model))
        log_probs = current_log_probs(policy, microbatches)
        after = state()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert policy.config.no_sync_func is called and policy.config.grad_sync_func is called
        assert model.training and [tuple(lp.shape) for lp in log_probs] == [(4, tiny.LENGTH - 1)] * 2


def plain_schedule(policy: Any, microbatches: list[dict[str, torch.Tensor]]) -> None:
    """Megatron's schedule with a loss of 0, so that auxiliary losses alone make gradients."""

    def forward_step(data: Any, module: Any) -> Any:
        return policy.forward(next(data), module), lambda output: (output.sum() * 0.0, {})

    policy.forward_backward_func(
        forward_step_func=forward_step, data_iterator=iter(microbatches), model=policy.model,
        num_microbatches=len(microbatches), seq_length=tiny.LENGTH, micro_batch_size=policy.micro_batch_size,
        forward_only=False,
    )  # fmt: skip


EXPERT_BIAS = (("moe_router_enable_expert_bias", True), ("moe_router_score_function", "sigmoid"))


def test_pass_a_leaves_no_state_behind(references) -> None:
    layout = Layout(aux_loss=0.1, options=(*EXPERT_BIAS, ("moe_z_loss_coeff", 0.1)))
    distributed.run(trace_worker, 1, layout, references["uneven"]["batch"])


def aux_loss_worker(rank: int, world: int, layout: Layout, batch: dict[str, torch.Tensor]) -> float:
    """Largest difference between the gradients of an exact step without signal and of Megatron's own schedule."""
    with tiny.megatron(layout):
        local = tiny.share_of(batch, rank, world)
        silent = {**batch, "advantage": torch.zeros_like(batch["advantage"])}
        stepped = take_step(layout, silent)["grads"]
        model = tiny.make_model(layout)
        plain_schedule(tiny.make_policy(model, 2), tiny.split(local, layout.microbatches))
        plain = tiny.gradients(model)
        assert any(grad.any() for grad, _ in plain.values())
        return max(float((stepped[name][0] - grad).abs().max()) for name, (grad, _) in plain.items())


def test_auxiliary_losses_keep_megatrons_scale(references) -> None:
    layout = Layout(microbatches=2, aux_loss=0.1, options=(("moe_z_loss_coeff", 0.1),))
    assert max(distributed.run(aux_loss_worker, 2, layout, references["uneven"]["batch"])) < 1e-15


def cp_factor_worker(rank: int, world: int) -> tuple[int, bool]:
    import inspect

    from megatron.core.pipeline_parallel import schedules

    return schedule_cp_factor(4), "output_tensor *= " in inspect.getsource(schedules)


def test_the_cp_factor_is_that_of_the_schedule() -> None:
    factor, multiplies = distributed.run(cp_factor_worker, 1)[0]
    assert factor == (4 if multiplies else 1)
