"""One optimizer step whose second pass runs only over the micro-batches in which it changes something.

    A  forward and backward with coefficients from each micro-batch by itself (`objective.optimistic`), unsynchronised
    B  one all-reduce, the gates, one all-reduce: the exact coefficients, as in `exact_step`
    C  one all-reduce: the micro-batches of all ranks that hold a token whose coefficient differs
    D  forward and backward with the differences over these micro-batches, if there are any

The gradient is linear in the coefficients, so that A and D add up to the exact one. Megatron finalises gradients at the
end of a schedule: sums over data-parallel ranks, of layer norms over TP, of tied embeddings over PP. These run once, at
the end of D or in its place. D has no extra loss and no losses of routers, and leaves their counts as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.router_losses import without_router_losses
from nemo_fiberpo.megatron.schedule import Policy, loss_scale, refuse_inexact, without_sync_hooks
from nemo_fiberpo.megatron.step import (
    StepResult,
    StepTokens,
    backward_pass,
    count_problem,
    gated,
    shape_problem,
    split_like,
)
from nemo_fiberpo.objective import Hierarchy, RatioGating
from nemo_fiberpo.objective.optimistic import PartCells, differs, optimistic_coefficients


def optimistic_step(
    policy: Policy,
    microbatches: Sequence[Any],
    tokens: StepTokens,
    parts: Sequence[PartCells],
    hierarchy: Hierarchy,
    reducer: Reducer,
    *,
    gating: RatioGating | None = None,
    use_min: bool = False,
    extra_loss: Callable[[Tensor, Any], Tensor] | None = None,
) -> StepResult:
    """Accumulate the gradient of -J(global batch) (+ extra losses), as `exact_step` does, with 1 + f passes.

    Arguments as `exact_step`; `parts` are those of `objective.optimistic.part_cells`, one per micro-batch. f is the
    `second_share` of the result: the largest share of a rank's micro-batches that D runs over.

    Refusals are those of `exact_step`, but come after a backward pass: gradients must then be thrown away.

    SPMD: every rank calls this. One all-reduce over `reducer.axes.group` more than `exact_step`.
    """
    refuse_inexact(policy.config)
    problem = count_problem(len(microbatches), len(tokens.old_log_probs), len(parts))
    if problem is not None:
        raise ValueError(problem)
    guesses = _Guesses(tokens, parts, hierarchy, gating, use_min)
    with without_gradient_sync(policy) as finalise:
        scale = loss_scale(len(microbatches), reducer.axes)
        extra = backward_pass(policy, microbatches, guesses.coefficients_of, scale, extra_loss)
    found = guesses.log_probs(), guesses.problem, len(microbatches)
    result = gated(*found, tokens, hierarchy, reducer, gating, use_min)
    exact = split_like(result.coefficients, tokens.old_log_probs)
    touched = _touched(exact, guesses.coefficients, tokens, reducer)
    again, error = _chosen(touched, reducer.axes, policy), torch.zeros(())
    if again:
        gaps = _correct(policy, microbatches, again, exact, guesses, reducer.axes, tokens)
        error = torch.stack(gaps).amax() if gaps else error
    else:
        finalise()
    extra_sum, gap = torch.stack([extra.double(), error.double().to(extra.device)]).tolist()
    return StepResult(-result.value, result.report, extra_sum, gap, exact, len(again) / len(microbatches))


class _Guesses:
    """Log-probs and coefficients of the micro-batches, as the first pass computes them."""

    def __init__(
        self,
        tokens: StepTokens,
        parts: Sequence[PartCells],
        hierarchy: Hierarchy,
        gating: RatioGating | None,
        use_min: bool,
    ):
        self._tokens, self._parts = tokens, parts
        self._objective = hierarchy, gating, use_min
        self._log_probs: dict[int, Tensor] = {}
        self.problem: str | None = None
        self.coefficients = [torch.zeros_like(old) for old in tokens.old_log_probs]

    def coefficients_of(self, index: int, log_probs: Tensor) -> Tensor:
        old = self._tokens.old_log_probs[index]
        misfit = shape_problem(index, log_probs, old)
        if misfit:  # reported to the other ranks by the first reduction, after Megatron's schedule
            self.problem = self.problem or misfit
            return torch.zeros_like(log_probs)
        self._log_probs[index] = log_probs
        log_ratio = (log_probs.to(old.device) - old).reshape(-1)
        weighted = self._tokens.weighted_advantage[index].reshape(-1)
        given = (log_ratio, weighted, self._parts[index], *self._objective, old.reshape(-1))
        self.coefficients[index] = optimistic_coefficients(*given).view(old.shape)
        return self.coefficients[index]

    def log_probs(self) -> list[Tensor]:
        """Of all micro-batches, on the last stage; an empty list on the others."""
        return [self._log_probs[index] for index in sorted(self._log_probs)]


def _touched(
    exact: Sequence[Tensor], guessed: Sequence[Tensor], tokens: StepTokens, reducer: Reducer
) -> list[list[bool]]:
    """Whether a coefficient differs in the micro-batches of every data-parallel rank: [rank][micro-batch]."""
    data = reducer.axes.axis("dp")
    own = [
        differs(new, old, weight.to(new.device)).any()
        for new, old, weight in zip(exact, guessed, tokens.weighted_advantage, strict=True)
    ]
    flags = torch.zeros(data.size, len(own), dtype=torch.float64, device=exact[0].device)
    flags[data.rank] = torch.stack(own)
    summed = reducer(flags.view(-1)).view(flags.shape)
    return [[bool(value) for value in row] for row in summed.tolist()]


def _chosen(touched: list[list[bool]], axes: TokenAxes, policy: Policy) -> list[int]:
    """The micro-batches of this rank's second pass: those that are touched, and others up to the largest number of any
    rank, since ranks wait for each other in collectives of the schedule."""
    own, number = touched[axes.axis("dp").rank], max(sum(row) for row in touched)
    if len(policy.chunks) > 1:  # interleaved stages take micro-batches by multiples of their number
        stages = axes.axis("pp").size
        number = min(len(own), -(-number // stages) * stages)
    return sorted(sorted(range(len(own)), key=lambda index: not own[index])[:number])


def _correct(
    policy: Policy,
    microbatches: Sequence[Any],
    again: Sequence[int],
    exact: Sequence[Tensor],
    guesses: _Guesses,
    axes: TokenAxes,
    tokens: StepTokens,
) -> list[Tensor]:
    """D; returns by how much log-probs of live tokens differ from those of the first pass, on the last stage."""
    before, gaps = guesses.log_probs(), []

    def coefficients_of(place: int, log_probs: Tensor) -> Tensor:
        index = again[place]
        gap = (log_probs - before[index]).abs()
        gaps.append(torch.where(tokens.mask[index].to(gap.device), gap, 0.0).amax().double())
        return exact[index].double() - guesses.coefficients[index].double()

    chosen = [microbatches[index] for index in again]
    with without_router_losses(policy):
        backward_pass(policy, chosen, coefficients_of, loss_scale(len(again), axes), None, balanced=False)
    return gaps


@contextlib.contextmanager
def without_gradient_sync(policy: Policy) -> Iterator[Callable[[], None]]:
    """Run the schedule so that gradients are only accumulated; yields what finalises them afterwards."""
    config = policy.config
    finalise: Any = getattr(config, "finalize_model_grads_func", None)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def finalise_now() -> None:
        for arguments, options in given:
            with contextlib.ExitStack() as waiting:
                for chunk in policy.chunks:
                    waiting.enter_context(_synchronous(chunk))
                finalise(*arguments, **options)

    with contextlib.ExitStack() as unsynced:
        unsynced.enter_context(without_sync_hooks(config))
        for chunk in policy.chunks:
            no_sync: Any = getattr(chunk, "no_sync", contextlib.nullcontext)
            unsynced.enter_context(no_sync())
        try:
            if finalise is not None:
                config.finalize_model_grads_func = lambda *arguments, **options: given.append((arguments, options))
            yield finalise_now
        finally:
            config.finalize_model_grads_func = finalise


@contextlib.contextmanager
def _synchronous(chunk: torch.nn.Module) -> Iterator[None]:
    """Megatron's DDP with `overlap_grad_reduce` expects reductions that a backward pass has begun; here none has."""
    ddp: Any = getattr(chunk, "ddp_config", None)
    before = getattr(ddp, "overlap_grad_reduce", False)
    if not before:
        yield
        return
    ddp.overlap_grad_reduce = False
    try:
        yield
    finally:
        ddp.overlap_grad_reduce = before
