"""One optimizer step in one pass: exact where every cell lies inside one micro-batch of one rank, or of its CP group.

Then a micro-batch's forward pass already has all that its gates need: coefficients are made between its forward and its
backward pass, and the second forward pass of `exact_step` is saved. `one_pass_cells` proves that it is so for a step's
cells before anything runs; a cell that lies in two places is an error, never an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.megatron.exchange import gather_censuses
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes
from nemo_fiberpo.megatron.schedule import Policy, loss_scale, refuse_inexact
from nemo_fiberpo.megatron.step import StepResult, StepTokens, backward_pass, count_problem, shape_problem
from nemo_fiberpo.objective import Cells, Hierarchy, RatioGating, SharedCells, Surrogate, surrogate
from nemo_fiberpo.objective.report import empty_fields, make_report, merge, pack, unpack
from nemo_fiberpo.objective.sharing import all_reduce


def one_pass_cells(cells: Sequence[Cells], axes: TokenAxes, problem: str | None = None) -> list[SharedCells]:
    """The cells of every micro-batch of a step, each shared within its context-parallel group alone.

    Args
        cells    of each micro-batch on this rank by itself, built from local tokens; as many on every rank
        problem  what is wrong with this rank's data, as in `groups.exchange`

    Raises ValueError, with the same message on every rank, naming stratum, cell and the two places for a cell with
    tokens in two micro-batches or on two data-parallel ranks; and as `groups.exchange`.

    SPMD: every rank of `axes.group` calls this. One all_gather_object.
    """
    shards = gather_censuses(cells, axes, {"micro-batches per step": len(cells)}, problem)
    names = [axis.name for axis in axes.axes if axis.sharded]

    def apart(shard: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rank for rank, name in zip(shard, names, strict=True) if name != "cp")

    seen: dict[tuple[int, int], tuple[tuple[int, ...], int]] = {}
    for shard, censuses in shards.items():
        for index, census in enumerate(censuses):
            for level, label in census[:, :2].tolist():
                place = apart(shard), index
                first = seen.setdefault((level, label), place)
                if first != place:
                    raise _in_two_places(cells, level, label, first, place, names)
    group = [shard for shard in shards if apart(shard) == apart(axes.shard)]
    own = group.index(axes.shard)
    return [entry.share([shards[shard][index] for shard in group], own) for index, entry in enumerate(cells)]


def _in_two_places(
    cells: Sequence[Cells], level: int, label: int, first: tuple, second: tuple, names: list[str]
) -> ValueError:
    stratum = cells[0].stages.strata[level]
    rank_names = [name for name in names if name != "cp"]

    def said(place: tuple[tuple[int, ...], int]) -> str:
        where = "".join(f" of {name} rank {rank}" for name, rank in zip(rank_names, place[0], strict=True))
        return f"micro-batch {place[1]}{where}"

    cell = cells[0].columns[level].called(label)
    return ValueError(
        f"one pass: {stratum} {cell} has tokens in {said(first)} and in {said(second)}; put "
        f"every {stratum} into one micro-batch, or use two passes, which are exact for any split"
    )


def one_pass_step(
    policy: Policy,
    microbatches: Sequence[Any],
    tokens: StepTokens,
    parts: Sequence[SharedCells],
    hierarchy: Hierarchy,
    reducer: Reducer,
    *,
    gating: RatioGating | None = None,
    use_min: bool = False,
    extra_loss: Callable[[Tensor, Any], Tensor] | None = None,
) -> StepResult:
    """Accumulate the gradient of -J(global batch) (+ extra losses) with one forward and one backward pass.

    Arguments as `exact_step`; `parts` are what `one_pass_cells` returned, one entry per micro-batch, and `tokens.cells`
    those of the whole step for the report. A non-finite log-ratio or weighted advantage on a live token of any rank
    raises ValueError on every rank, after the backward pass: gradients must then be thrown away.

    SPMD: every rank calls this. One all-reduce over `reducer.axes.group`, for loss, report and errors; where the
    sequence is split over cp, per micro-batch as many more over that axis as `exact_step` has.
    """
    refuse_inexact(policy.config)
    problem = count_problem(len(microbatches), len(tokens.old_log_probs), len(parts))
    if problem is not None:
        raise ValueError(problem)
    within = _within_context_parallel(reducer.axes)
    results: list[Surrogate] = []
    coefficients = [torch.zeros_like(old) for old in tokens.old_log_probs]
    problems: list[str] = []

    def coefficients_of(index: int, log_probs: Tensor) -> Tensor:
        old = tokens.old_log_probs[index]
        misfit = shape_problem(index, log_probs, old)
        if misfit:  # it joins the reductions over cp all the same
            problems.append(misfit)
        try:
            log_ratio = (torch.zeros_like(old) if misfit else log_probs.to(old.device) - old).reshape(-1)
            weighted = tokens.weighted_advantage[index].reshape(-1)
            given = (log_ratio, weighted, parts[index], hierarchy, within, gating, use_min)
            result = surrogate(*given, old_log_probs=old.reshape(-1))
        except ValueError as error:
            # The other ranks are in the middle of Megatron's schedule: they are told at its end.
            problems.append(f"micro-batch {index}: {error}")
            return torch.zeros_like(log_probs)
        if misfit:
            return torch.zeros_like(log_probs)
        results.append(result)
        coefficients[index] = result.coefficients.view(old.shape)
        return coefficients[index]

    scale = loss_scale(len(microbatches), reducer.axes)
    extra = backward_pass(policy, microbatches, coefficients_of, scale, extra_loss)
    speaks = within is None or within.axes.axes[0].rank == 0
    fields = merge([result.fields for result in results] if speaks else [], empty_fields(tokens.cells))
    refused = fields["value"].new_tensor([float(bool(problems))])
    summed = all_reduce({"refused": refused, **pack(fields, tokens.cells)}, reducer)
    if problems or float(summed.pop("refused")):
        raise ValueError(problems[0] if problems else "one pass: another rank has refused its tokens; see its error")
    value, report = make_report(unpack(summed), tokens.cells)
    return StepResult(-value, report, float(extra), 0.0, coefficients)


def _within_context_parallel(axes: TokenAxes) -> Reducer | None:
    """The reducer over this rank's context-parallel group; None where no sequence is split."""
    split = [axis for axis in axes.axes if axis.name == "cp" and axis.sharded and axis.size > 1]
    return Reducer(TokenAxes((split[0],), split[0].group)) if split else None
