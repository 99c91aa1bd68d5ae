"""One optimizer step over all micro-batches of the global batch, with the gradient of that batch.

    A  forward only through Megatron's schedule       -> current log-probs, hence log-ratios   (skipped on-policy)
    B  one all-reduce                                  -> aggregates of the cells
    C  gates, one all-reduce                           -> coefficients c_j = dJ / d log pi_j
    D  forward and backward of -sum_j c_j log pi_j     -> the gradient of -J, whatever the split

A and D must be the same function of the parameters, so whatever draws random numbers or depends on which tokens share a
micro-batch is refused, see `schedule.refuse_inexact`. Pass A leaves no state behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.megatron.agreement import agreement
from nemo_fiberpo.megatron.groups import Reducer
from nemo_fiberpo.megatron.router_losses import balancing_real_tokens
from nemo_fiberpo.megatron.schedule import Policy, loss_scale, refuse_inexact, run, without_trace
from nemo_fiberpo.objective import (
    Hierarchy,
    RatioGating,
    Report,
    SharedCells,
    Surrogate,
    on_policy_coefficients,
    surrogate,
)

__all__ = ["Policy", "StepResult", "StepTokens", "current_log_probs", "exact_step", "linear_loss"]


@dataclass(frozen=True)
class StepTokens:
    """The tokens of one optimizer step on this rank: one tensor per micro-batch, of the shape that `log_probs` returns.

    old_log_probs       log-probs under the policy of the rollout
    weighted_advantage  w_i A_i, weights with global denominators
    mask                bool, True for live tokens
    cells               of all these tokens, flattened in this order; shared with the other ranks (`groups.exchange`)

    All ranks that hold copies of the same tokens (tensor and pipeline parallel) are given the same.
    """

    old_log_probs: Sequence[Tensor]
    weighted_advantage: Sequence[Tensor]
    mask: Sequence[Tensor]
    cells: SharedCells

    def __post_init__(self) -> None:
        for name in ("weighted_advantage", "mask"):
            shapes = [tuple(value.shape) for value in getattr(self, name)]
            wanted = [tuple(value.shape) for value in self.old_log_probs]
            if shapes != wanted:
                raise ValueError(f"{name}: shapes {shapes} of the micro-batches differ from old_log_probs' {wanted}")
        number = sum(value.numel() for value in self.old_log_probs)
        if number != self.cells.num_tokens:
            raise ValueError(f"cells: made for {self.cells.num_tokens} tokens, but the micro-batches have {number}")


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    loss             -J of the global batch, the same on every rank; None on-policy, where nothing is reduced
    report           the gates' metrics, the same on every rank; None on-policy
    extra_loss       sum of the `extra_loss` terms over this rank's micro-batches (0 but on the last pipeline stage)
    recompute_error  largest |difference| between the log-probs of pass D and those the coefficients belong to (pass
                     A's, or the old ones on-policy) over this rank's live tokens; more than rounding means that the
                     passes are not the same function. 0 but on the last pipeline stage
    coefficients     c_j of this rank's tokens, one tensor per micro-batch; has a meaning on the last stage alone
    second_share     of an optimistic step: the share of a rank's micro-batches that its second pass ran over
    """

    loss: float | None
    report: Report | None
    extra_loss: float
    recompute_error: float
    coefficients: list[Tensor] = field(repr=False)
    second_share: float | None = None

    @property
    def second_pass(self) -> str | None:
        """Of an optimistic step: "none", "part" or "whole", the micro-batches that its second pass ran over."""
        return None if self.second_share is None else {0.0: "none", 1.0: "whole"}.get(self.second_share, "part")


def exact_step(
    policy: Policy,
    microbatches: Sequence[Any],
    tokens: StepTokens,
    hierarchy: Hierarchy,
    reducer: Reducer,
    *,
    gating: RatioGating | None = None,
    use_min: bool = False,
    on_policy: bool = False,
    extra_loss: Callable[[Tensor, Any], Tensor] | None = None,
    forward_only: bool = False,
) -> StepResult:
    """Accumulate the gradient of -J(global batch) (+ extra losses) into the model's gradients.

    Args
        microbatches  this rank's micro-batches of the optimizer step; as many on every rank
        gating        a map of `objective.ratio_gating` instead of FiberPO's, see `surrogate`
        use_min       as in `surrogate`
        on_policy     the current policy is the one that gave the old log-probs: same weights, precision and layout. The
                      log-ratios are 0, c_j = w_j A_j, and pass A and both reductions are skipped
        extra_loss    (log-probs [b, s], micro-batch) -> scalar to be added to the loss, such as a KL penalty: this
                      micro-batch's part of a sum that already has its global denominator
        forward_only  stop after C: value and metrics, no gradient

    The caller zeroes gradients before and steps the optimizer after, as around Megatron's own schedule.

    Raises ValueError before any gradient is computed: for a refused config field, and, on every rank, for a non-finite
    log-ratio or weighted advantage on a live token of any rank, for a rank with fewer micro-batches than it has tokens
    for, and for ranks with different numbers of them. On-policy, where nothing is reduced, and with expert or context
    parallelism, where others wait for it earlier, such a rank raises alone; what they then do is in `timeouts`.
    `groups.exchange` with the fact "micro-batches per step" finds it before.

    SPMD: every rank calls this. Tokens are sharded over dp (and cp), replicated over tp and pp. Exactly
    `hierarchy.num_reductions` all-reduces over `reducer.axes.group`, half as many and one more with `gating`, which is
    two without branches; none if `on_policy`. Those of Megatron come beside.
    """
    refuse_inexact(policy.config)
    problem = told_problem(policy, microbatches, tokens, alone=on_policy)
    loss, report, reference = None, None, tokens.old_log_probs
    if on_policy:
        flat = on_policy_coefficients(flat_of(tokens.weighted_advantage), tokens.cells)
    else:
        current = current_log_probs(policy, microbatches) if problem is None else []
        result = gated(current, problem, len(microbatches), tokens, hierarchy, reducer, gating, use_min)
        flat, loss, report, reference = result.coefficients, -result.value, result.report, current or reference
    coefficients = split_like(flat, tokens.old_log_probs)
    extra, gaps = torch.zeros(()), [torch.zeros(())]

    def coefficients_of(index: int, log_probs: Tensor) -> Tensor:
        difference = (log_probs - reference[index].to(log_probs.device)).abs()
        gaps.append(torch.where(tokens.mask[index].to(log_probs.device), difference, 0.0).amax())
        return coefficients[index]

    if not forward_only:
        scale = loss_scale(len(microbatches), reducer.axes)
        extra = backward_pass(policy, microbatches, coefficients_of, scale, extra_loss)
    gap = torch.stack([value.double().to(gaps[-1].device) for value in gaps]).amax()
    extra_sum, gap_most = torch.stack([extra.double().to(gap.device), gap]).tolist()
    return StepResult(loss, report, extra_sum, gap_most, coefficients)


def current_log_probs(policy: Policy, microbatches: Sequence[Any]) -> list[Tensor]:
    """Pass A: log-probs of every micro-batch, without gradient, on the last stage; an empty list on the others.

    Leaves nothing behind: the model's buffers and the log of auxiliary losses are as before, gradient hooks silent.
    The old log-probs of a rollout can be taken with it, too.
    """

    def forward_step(data: Iterator[tuple[int, Any]], module: torch.nn.Module):
        _, batch = next(data)
        output = policy.forward(batch, module)
        return output, lambda output, non_loss_data=True: policy.log_probs(output, batch).detach()

    with torch.no_grad(), without_trace(policy.chunks):
        return list(run(policy, forward_step, microbatches, forward_only=True, collect_non_loss_data=True))


def backward_pass(
    policy: Policy,
    microbatches: Sequence[Any],
    coefficients_of: Callable[[int, Tensor], Tensor],
    scale: float,
    extra_loss: Callable[[Tensor, Any], Tensor] | None,
    balanced: bool = True,
) -> Tensor:
    """Pass D: forward and backward of (-sum_j c_j log pi_j + extra losses) * scale; returns this rank's extra losses,
    which the host has not read.

    `coefficients_of(index, log-probs)` gives the c_j of a micro-batch, from its log-probs without gradient; it is
    called on the last stage alone. Where `balanced`, routers balance the tokens of `Policy.routed`.
    """

    def forward_step(data: Iterator[tuple[int, Any]], module: torch.nn.Module):
        index, batch = next(data)

        def loss_func(output: Tensor):
            log_probs = policy.log_probs(output, batch)
            loss = linear_loss(log_probs, coefficients_of(index, log_probs.detach()))
            extra = extra_loss(log_probs, batch) if extra_loss is not None else loss.new_zeros(())
            return (loss + extra) * scale, {"extra": extra.detach().double()}

        return policy.forward(batch, module), loss_func

    with balancing_real_tokens(policy) if balanced else contextlib.nullcontext(policy) as policy:
        kept = run(policy, forward_step, microbatches, forward_only=False, collect_non_loss_data=False)
    return torch.stack([entry["extra"] for entry in kept]).sum() if kept else torch.zeros(())


def linear_loss(log_probs: Tensor, coefficients: Tensor) -> Tensor:
    """-sum_j c_j log pi_j, float64, with c constant; the derivative is -c_j, and 0 for c_j = 0 whatever log pi_j is."""
    c = coefficients.detach().to(log_probs.device, torch.float64)
    return -(torch.where(c != 0, log_probs, 0.0) * c).sum()


def gated(
    current: Sequence[Tensor],
    problem: str | None,
    microbatches: int,
    tokens: StepTokens,
    hierarchy: Hierarchy,
    reducer: Reducer,
    gating: RatioGating | None,
    use_min: bool,
) -> Surrogate:
    """B and C: coefficients, value and report from the current log-probs of every micro-batch, as pass A returns them.

    problem   why this rank cannot take the step: every rank raises it, as it does log-probs of another shape than the
              old ones, which are found on the last stage alone
    """
    misfits = (
        shape_problem(index, a, b) for index, (a, b) in enumerate(zip(current, tokens.old_log_probs, strict=False))
    )
    problem = problem or next((misfit for misfit in misfits if misfit), None)
    weighted = flat_of(tokens.weighted_advantage)
    log_ratio = log_ratio_of(current, tokens) if problem is None else torch.zeros_like(weighted)
    riders = agreement(reducer.axes, microbatches, problem, weighted.device)
    given = log_ratio, weighted, tokens.cells, hierarchy, reducer, gating, use_min, riders
    return surrogate(*given, flat_of(tokens.old_log_probs))


def shape_problem(index: int, log_probs: Tensor, old: Tensor) -> str | None:
    """What is wrong with the shape of a micro-batch's log-probs, None if nothing is."""
    if log_probs.shape == old.shape:
        return None
    shapes = tuple(log_probs.shape), tuple(old.shape)
    return f"log_probs: shape {shapes[0]} in micro-batch {index}, but old_log_probs have {shapes[1]}"


def told_problem(policy: Policy, microbatches: Sequence[Any], tokens: StepTokens, alone: bool = False) -> str | None:
    """`count_problem`, raised at once where there is no way to tell the other ranks: `alone`, without a reduction, and
    with expert and context parallelism, whose ranks wait for each other in pass A."""
    problem = count_problem(len(microbatches), len(tokens.old_log_probs))
    sizes = (getattr(policy.config, f"{axis}_parallel_size", 1) or 1 for axis in ("expert_model", "context"))
    if problem is not None and (alone or max(sizes) > 1):
        raise ValueError(problem)
    return problem


def count_problem(microbatches: int, of_tokens: int, of_cells: int | None = None) -> str | None:
    """What is wrong with the number of micro-batches, None if nothing is; `of_cells` where each has its own."""
    if microbatches == of_tokens and of_cells in (None, microbatches) and microbatches:
        return None
    cells = "" if of_cells is None else f" and cells of {of_cells}"
    return f"microbatches: {microbatches} of them, but tokens of {of_tokens}{cells}; at least one"


def log_ratio_of(current: Sequence[Tensor], tokens: StepTokens) -> Tensor:
    """Flat log-ratios; zeros on a stage without log-probs, which represents no tokens."""
    if not current:
        return flat_of([torch.zeros_like(old) for old in tokens.old_log_probs])
    return flat_of([new.to(old.device) - old for new, old in zip(current, tokens.old_log_probs, strict=True)])


def flat_of(values: Sequence[Tensor]) -> Tensor:
    """The values of all micro-batches, flattened in their order."""
    return torch.cat([value.reshape(-1) for value in values]) if values else torch.zeros(0)


def split_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The flat values of all micro-batches, one tensor per micro-batch of the shape it has in `like`."""
    parts = flat.split([value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]
