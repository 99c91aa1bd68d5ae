"""The gating operator over a chain of strata (EQUATIONS, MASTER; (26), (31), (32)) and its adjoint (section 6).

Value, for a token i with label l_i and finest cell c:
    L_i = sum_l [ sum_n g(X_n^l; C_n^l, k_n) + clip(a_i^l - M_c^l, +-eps) ],    rhat_i = exp(L_i)
The gates and the clip of the channel that token i is not in depend on the cell and the label alone, so that
    L_i = offset^{l_i}(c) + clip(ell_i - M_c^{l_i}, +-eps)
    offset^l(c) = sum_{l',n} g(X_n^{l'}) + clip(-M_c^{-l}, +-eps)

Adjoint, for any y_i (y_i = w_i A_i rhat_i gives the gradient of the objective), with G = g'(X), Y^l the sum of the y_i
of label l in a cell, Y = Y^+ + Y^-, and sat^l the part of Y^l whose own clip is saturated:
    finest   Z_K^l(c) = (G_K^l - 1) Y + sat^l + 1[|M_c^l| > eps] Y^{-l}
    coarser  Z_n^l(c) = sum over the children c' of (G_n^l(c) - G_{n+1}^l(c')) Y(c')
    c_j = 1[own clip not saturated] y_j + sum_n Z_n^{l_j}(c_n(j)) / N_{c_n(j)}
This is Z_n^l(c) = sum_i y_i (G_n^l - G_{n+1}^l) with the terms that cancel left out: while nothing saturates every Z is
exactly 0, and c_j = y_j to the bit. Z is linear in sums over tokens, so sums of different ranks add up.

A cell r that is merged into its parent p (`Stratum.min_tokens`) has M_r := M_p, hence X_r = 0 and G_r = 1, so that
dM_r is dM_p: Z(r) is added to Z(p), from the finest level up, and then 0.

Where the tokens of cells are weighed by memberships q_ie (membership.py), L_ie is as above for token i in cell e, with
sums and counts weighed by q, and L_i = sum_e q_ie L_ie, c_j = sum_e q_je (chi_je y_j + sum_n Z_n(c_n(j, e)) / Q_n).

SPMD: token tensors are sharded over ranks, per-cell tensors hold the cells of this rank, with global values. `reduce`
is called exactly twice by each of `token_coefficients` and `gated_log_ratio` (forward and backward); with branches
`Hierarchy.num_reductions` times, half of them forward and half of them backward. What is said here of the finest cell
holds with branches for the joint cell, with the sum of all extractions in place of M_c (see branches.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .branches import BranchedCells, joint_adjoint, stage_adjoint
from .cells import Cells
from .drift import Drift, check_tokens, compute_dtype, measure
from .gates import aggregate_gate, log_clip
from .hierarchy import Hierarchy
from .levels import merge_into_parents
from .sharing import Reduce, exchange


@dataclass(frozen=True, eq=False)
class Gates:
    """Aggregate gates of all cells of this rank, per level, coarsest first, float64.

    `budget`, `value` and `slope` are [2, C] each; `mean_2C` and `offset_2C` are what tokens read from their finest
    cell. `crossed`: the mean of some finest cell is beyond the token clip, so that the other channel is clipped there.
    """

    drift: Drift
    budget: list[Tensor]
    value: list[Tensor]
    slope: list[Tensor]
    mean_2C: Tensor
    offset_2C: Tensor
    token_clip: float
    crossed: bool = False


@dataclass(frozen=True, eq=False)
class TokenSums:
    """Local sums over tokens, float64: y and its saturated part per finest cell [2, C]; clipped tokens; max |ell|.

    Where no mean of a cell is beyond the token clip, the channels of y are never read apart, and the first row of
    `total_2C` holds all of it.
    """

    total_2C: Tensor
    saturated_2C: Tensor
    clipped: Tensor
    largest: Tensor


def gate_cells(drift: Drift, cells: Cells, hierarchy: Hierarchy) -> Gates:
    """Gate the residual mean of every cell with the budgets and slopes that `hierarchy` gives it."""
    hierarchy.check_levels(cells)
    budgets, values, slopes = [], [], []
    for stratum, level, residual in zip(hierarchy.active, cells.levels, drift.residual, strict=True):
        budget_2C, slope_C = stratum.resolve(level)
        value, slope = aggregate_gate(residual, budget_2C, slope_C)
        budgets.append(budget_2C)
        values.append(value)
        slopes.append(slope)
    if not cells.levels:
        zeros = torch.zeros(2, 1, dtype=torch.float64, device=cells.layout.cell_P.device)
        return Gates(drift, [], [], [], zeros, zeros, hierarchy.token_clip)
    mean_2C = drift.mean[-1] if drift.reference_2C is None else drift.reference_2C
    offset_2C = cells.down(values).sum(0) + log_clip(-mean_2C.flip(0), hierarchy.token_clip)
    crossed = bool((mean_2C.abs() > hierarchy.token_clip).any())
    return Gates(drift, budgets, values, slopes, mean_2C, offset_2C, hierarchy.token_clip, crossed)


def weigh_tokens(
    log_ratio_T: Tensor, weight_T: Tensor, cells: Cells, gates: Gates, exponentiate: bool, counting: bool = False
) -> tuple[Tensor, TokenSums]:
    """y_j where a token's own clip is not saturated, else 0, as [T]; and the sums of y that the adjoint needs.

    y = weight * exp(L) with `exponentiate`, else the weight itself. `counting` also fills the figures of the report.
    """
    layout, dtype, eps = cells.layout, compute_dtype(log_ratio_T), gates.token_clip
    mean_2P, offset_2P = layout.spread(gates.mean_2C).to(dtype), layout.spread(gates.offset_2C).to(dtype)
    total_2P, saturated_2P = layout.zeros(), layout.zeros()
    make = torch.empty if layout.num_cells else torch.zeros
    out_T = make(cells.num_tokens, dtype=dtype, device=log_ratio_T.device)
    clipped, largest = total_2P.new_zeros(()), total_2P.new_zeros(())
    for block in layout.blocks():
        x = block.take(log_ratio_T, dtype, "x")
        neg = block.negative(x)
        residual = block.own(mean_2P, neg, "residual")
        torch.sub(x, residual, out=residual)
        clip = log_clip(residual, eps, out=block.buffer("clip", dtype))
        outside = residual.sub_(clip).ne_(0.0)
        y = block.take(weight_T, dtype, "y")
        if exponentiate:
            ratio = block.mixed(clip.add_(block.own(offset_2P, neg, "offset"))).exp_()
            y = torch.mul(y, ratio, out=ratio)
        if counting:
            clipped += block.total(outside)
            largest = torch.maximum(largest, x.abs().amax().double())
        if gates.crossed:
            block.add(total_2P, neg, y)
        else:
            block.add_undivided(total_2P, y)
        saturated = outside.mul_(y)
        block.write_rest(out_T, y, saturated)
        block.add(saturated_2P, neg, saturated)
    return out_T, TokenSums(layout.fold(total_2P), layout.fold(saturated_2P), clipped, largest)


def adjoint_sums(sums: TokenSums, cells: Cells, gates: Gates) -> list[Tensor]:
    """Z_n^l of every level, coarsest first, [2, C]: this rank's part, linear in its tokens."""
    if not cells.levels:
        return []
    y_2C = sums.total_2C
    crossed = (gates.mean_2C.abs() > gates.token_clip).to(y_2C.dtype)
    if isinstance(cells, BranchedCells):
        return stage_adjoint(gates.slope, y_2C, sums.saturated_2C + crossed * y_2C.flip(0), cells)
    finest = (gates.slope[-1] - 1.0) * y_2C.sum(0) + sums.saturated_2C + crossed * y_2C.flip(0)
    total = [level_2C.sum(0) for level_2C in cells.up(y_2C)]
    out = [finest]
    for index in range(len(cells.levels) - 1, 0, -1):
        parent_C = cells.levels[index].up_C
        above = gates.slope[index - 1]
        terms = (above[:, parent_C] - gates.slope[index]) * total[index]
        out.append(torch.zeros_like(above).index_add_(1, parent_C, terms))
    return merge_into_parents(out[::-1], cells.levels, range(len(out)))


def add_adjoint(
    out_T: Tensor, log_ratio_T: Tensor, adjoint: list[Tensor], cells: Cells, reduce: Reduce | None
) -> Tensor:
    """Add sum_n Z_n^{l_j} / N_n of the own cells to every live token, in place; `adjoint` is global."""
    if not cells.levels:
        return out_T
    if isinstance(cells, BranchedCells):
        per_token_2C = joint_adjoint(adjoint, cells, reduce)
    else:
        per_token_2C = cells.down([z_2C / level.count_C for z_2C, level in zip(adjoint, cells.levels, strict=True)])
    if not bool(per_token_2C.any()):
        return out_T
    table_2P = cells.layout.spread(per_token_2C).to(out_T.dtype)
    for block in cells.layout.blocks():
        neg = block.negative(block.take(log_ratio_T, out_T.dtype, "x"))
        block.accumulate(out_T, block.own(table_2P, neg, "own"))
    return out_T


def evaluate(
    log_ratio_T: Tensor,
    weighted_advantage_T: Tensor,
    cells: Cells,
    hierarchy: Hierarchy,
    reduce: Reduce | None,
    head: Callable[[Gates, TokenSums], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Coefficients [T] and the global sum of `head`, a float64 vector that rides in the second reduction."""
    hierarchy.check_levels(cells)
    check_tokens("log_ratio", log_ratio_T, cells)
    check_tokens("weighted_advantage", weighted_advantage_T, cells)
    log_ratio_T, weight_T = log_ratio_T.detach().contiguous(), weighted_advantage_T.detach().contiguous()
    gates = gate_cells(measure(log_ratio_T, cells, reduce, weight_T), cells, hierarchy)
    out_T, sums = weigh_tokens(log_ratio_T, weight_T, cells, gates, exponentiate=True, counting=head is not None)
    extra = sums.total_2C.new_zeros(0) if head is None else head(gates, sums)
    extra, adjoint = exchange(extra, adjoint_sums(sums, cells, gates), cells, reduce)
    return add_adjoint(out_T, log_ratio_T, adjoint, cells, reduce).to(log_ratio_T.dtype), extra


def token_coefficients(
    log_ratio: Tensor, weighted_advantage: Tensor, cells: Cells, hierarchy: Hierarchy, reduce: Reduce | None = None
) -> Tensor:
    """c_j = dJ/d ell_j of J = sum_i w_i A_i rhat_i in closed form: the exact gradient (19) of (18) and (30).

    Args
        log_ratio           [T], current minus old log-probability, nats; float16, bfloat16, float32 or float64
        weighted_advantage  [T], w_i A_i with global weights (see `token_weights`)
        cells, hierarchy    cells of the hierarchy's active strata; budgets and slopes come from the hierarchy
        reduce              sums a float64 vector over the ranks; called `hierarchy.num_reductions` times: exactly
                            twice without branches. None for one process

    Returns [T] in the dtype of `log_ratio`, without a gradient; exactly 0 at masked tokens, whatever they hold.
    Elementwise math is in that dtype (float32 for half types), sums over tokens and all per-cell math in float64.

    Raises ValueError for a non-finite value on a live token, naming sample and token position; on every rank, after the
    first reduction. SPMD: tokens sharded over ranks, the result likewise; independent of how they are split.
    """
    return evaluate(log_ratio, weighted_advantage, cells, hierarchy, reduce)[0]


class _GatedLogRatio(torch.autograd.Function):
    """L as a function of ell, with the adjoint as its derivative."""

    @staticmethod
    def forward(ctx: Any, log_ratio_T: Tensor, cells: Cells, hierarchy: Hierarchy, reduce: Reduce | None) -> Tensor:
        log_ratio_T = log_ratio_T.contiguous()
        gates = gate_cells(measure(log_ratio_T, cells, reduce), cells, hierarchy)
        ctx.save_for_backward(log_ratio_T)
        ctx.cells, ctx.gates, ctx.reduce = cells, gates, reduce
        dtype, layout = compute_dtype(log_ratio_T), cells.layout
        mean_2P, offset_2P = layout.spread(gates.mean_2C).to(dtype), layout.spread(gates.offset_2C).to(dtype)
        out_T = torch.zeros_like(log_ratio_T)
        for block in layout.blocks():
            x = block.take(log_ratio_T, dtype, "x")
            neg = block.negative(x)
            residual = block.own(mean_2P, neg, "residual")
            gated = log_clip(torch.sub(x, residual, out=residual), gates.token_clip, out=residual)
            gated += block.own(offset_2P, neg, "offset")
            block.write(out_T, gated)
        return out_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        (log_ratio_T,) = ctx.saved_tensors
        cells, gates = ctx.cells, ctx.gates
        out_T, sums = weigh_tokens(log_ratio_T, grad_T.contiguous(), cells, gates, exponentiate=False)
        none = sums.total_2C.new_zeros(0)
        _, adjoint = exchange(none, adjoint_sums(sums, cells, gates), cells, ctx.reduce)
        return add_adjoint(out_T, log_ratio_T, adjoint, cells, ctx.reduce).to(grad_T.dtype), None, None, None


def gated_log_ratio(log_ratio: Tensor, cells: Cells, hierarchy: Hierarchy, reduce: Reduce | None = None) -> Tensor:
    """L_i = log rhat_i (MASTER; (7) with (8)-(16), (31) and (32)), differentiable once in `log_ratio`.

    Arguments, dtype, errors and SPMD layout as `token_coefficients`; half of the calls of `reduce` (one, without
    branches) are made in the forward pass, half in the backward pass, which every rank must therefore run.
    With shared cells the derivative is that of the sum of all ranks' losses. The result is 0 at masked tokens, and what
    gradient arrives there is ignored.
    """
    hierarchy.check_levels(cells)
    check_tokens("log_ratio", log_ratio, cells)
    gated: Tensor = _GatedLogRatio.apply(log_ratio, cells, hierarchy, reduce)
    return gated
