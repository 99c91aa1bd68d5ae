"""A step of one kind beside the two-pass step on the same tokens: loss, metrics, every gradient, and what was run."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_fiberpo.megatron.all_forward import all_forward_step
from nemo_fiberpo.megatron.compat import auxiliary_loss_log, fields_of
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.optimistic import optimistic_step
from nemo_fiberpo.megatron.step import StepResult, exact_step
from nemo_fiberpo.verification import shards
from tests.megatron import batches, comparison, tiny
from tests.megatron.batches import STRATA, Batch
from tests.megatron.comparison import CASES
from tests.megatron.tiny import Layout

ROUTER_LOSSES = {"aux_loss": 0.1, "options": (("moe_z_loss_coeff", 0.1),)}
SPREAD = {"distributed_optimizer": True, "overlap": True}

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
    `log` are the router losses that were logged, `buffers` those of the model."""

    loss: float
    metrics: dict[str, float]
    extra: float
    grads: dict[str, shards.Gradient]
    calls: int
    forwards: int
    finalised: int
    log: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
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


def problems_for(layouts: Sequence[Layout], names: Sequence[str] = tuple(PROBLEMS)) -> bytes:
    """Pickled {kind of model: {problem: batch}}: old log-probs are made from those of the kind in one process."""
    cases = sorted({PROBLEMS[name][0] for name in names})
    known = {case: next(name for name, entry in CASES.items() if entry.batch == case) for case in cases}
    references = comparison.references_for(layouts, list(known.values()))
    return pickle.dumps(
        {
            kind: {name: problem_of(name, references[kind, known[PROBLEMS[name][0]]].batch) for name in names}
            for kind in {layout.kind for layout in layouts}
        }
    )


def step_of(layout: Layout, batch: Batch, name: str, step_kind: str, **options: Any) -> Found:
    """A step of the kind `exact`, `optimistic`, `all_forward` or `on_host`; `options` go to it."""
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
    options |= {"extra_loss": batches.kl_penalty} if name == "penalty" else {}
    auxiliary_loss_log().clear()
    parts = [step.guessed] if step_kind == "optimistic" else []
    kinds: dict[str, Callable[..., StepResult]] = {
        "exact": exact_step,
        "optimistic": optimistic_step,
        "all_forward": all_forward_step,
        "on_host": functools.partial(all_forward_step, on_host=True),
    }
    result = kinds[step_kind](counting, step.microbatches, step.tokens, *parts, chain, reducer, **options)
    assert result.loss is not None and result.report is not None
    assert result.recompute_error < 1e-12
    log = {key: fields_of(entry)["values"].clone() for key, entry in auxiliary_loss_log().items()}
    buffers = {
        f"{index} {key}": value.clone()
        for index, chunk in enumerate(policy.chunks)
        for key, value in torch.nn.Module.named_buffers(chunk)
    }
    grads, metrics = shards.gradients(model), result.report.metrics()
    done = reducer.calls, forwards, finalised, log, buffers, result.second_pass, result.second_share
    return Found(result.loss, metrics, result.extra_loss, grads, *done)


def pairs_worker(
    rank: int, world: int, layouts: list[Layout], pickled: bytes, step_kind: str
) -> list[list[tuple[Found, Found]]]:
    """By layout and problem, the two-pass step and the one of the kind."""
    given: dict[comparison.Kind, dict[str, Batch]] = pickle.loads(pickled)
    with tiny.megatron(layouts[0]):
        return [
            [
                (step_of(layout, batch, name, "exact"), step_of(layout, batch, name, step_kind))
                for name, batch in given[layout.kind].items()
            ]
            for layout in layouts
        ]


def largest_difference(pairs: Sequence[tuple[Found, Found]]) -> float:
    """Largest relative difference of any parameter's gradient, over the ranks."""
    worst = 0.0
    for two, one in pairs:
        assert two.grads.keys() == one.grads.keys()
        for name, part in two.grads.items():
            error = float((one.grads[name].value - part.value).norm() / part.value.norm().clamp_min(1e-300))
            worst = error if not error <= worst else worst
    return worst
