"""Value and coefficients of an objective with a ratio-gating map: (2), in the two reductions of the exact step.

    1   counts of non-finite input, S+ and S- of the shared cells (for the report), and sums of the map's feature
    2   J, the report's sums, and what tokens give to their cells

SPMD: tokens are sharded over ranks; a cell of the map's stratum may have tokens on any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cells import Cells
from .drift import Drift, check_tokens, measure
from .fibration import Gates, TokenSums, gate_cells
from .hierarchy import Hierarchy
from .levels import Level
from .ratio_gating import Gated, RatioGating, check_gating
from .sharing import Reduce, exchange


def gated_ratio(
    log_ratio: Tensor, weighted_advantage: Tensor, cells: Cells, gating: RatioGating, reduce: Reduce | None = None
) -> Tensor:
    """G(r)_i of (2), float64 [T]; 1 at masked tokens. Arguments and errors as `surrogate`, of which this is the first
    reduction. SPMD: sharded like the tokens.
    """
    _, live = _first_reduction(gating, log_ratio, weighted_advantage, cells, reduce)
    out_T = torch.ones(cells.num_tokens, dtype=torch.float64, device=log_ratio.device)
    return out_T.index_copy_(0, live.at_L, live.gated.ratio_L)


def evaluate_gating(
    gating: RatioGating,
    log_ratio_T: Tensor,
    weighted_advantage_T: Tensor,
    cells: Cells,
    hierarchy: Hierarchy,
    reduce: Reduce | None,
    head: Callable[[Gates, TokenSums], Tensor],
) -> tuple[Tensor, Tensor]:
    """As `fibration.evaluate` for another map: coefficients [T] and the global sum of `head`, in two reductions.

    `head` is given the gates of the hierarchy as they would act on these log-ratios, J as the only sum over tokens, and
    as clipped tokens those whose own ratio `gating` has cut.
    """
    hierarchy.check_levels(cells)
    check_gating(gating, hierarchy)
    drift, live = _first_reduction(gating, log_ratio_T, weighted_advantage_T, cells, reduce)
    gated, y_L = live.gated, live.y_L
    sums = TokenSums(
        total_2C=(y_L * gated.ratio_L).sum().view(1, 1),
        saturated_2C=y_L.new_zeros(1, 1),
        clipped=gated.clipped_L.sum(dtype=torch.float64),
        largest=live.x_L.abs().max() if live.x_L.numel() else y_L.new_zeros(()),
    )
    adjoint = [level.count_C.new_zeros(2, level.count_C.numel()) for level in cells.levels]
    given_L = None if gated.give_L is None else y_L * gated.give_L
    if given_L is not None:
        assert live.level is not None and live.cell_L is not None
        at = cells.levels.index(live.level)
        adjoint[at][0].index_add_(0, live.cell_L, given_L)
    summed, adjoint = exchange(head(gate_cells(drift, cells, hierarchy), sums), adjoint, cells, reduce)
    coefficient_L = y_L * gated.own_L
    if given_L is not None:
        assert live.cell_L is not None and gated.take_L is not None
        pulled_L = adjoint[at][0][live.cell_L]
        # A token alone in its cell, or beyond the budget, gave all there is: the difference is exactly 0.
        coefficient_L += gated.take_L * (pulled_L - given_L if gated.others_only else pulled_L)
    limit = torch.finfo(log_ratio_T.dtype).max
    out_T = torch.zeros(cells.num_tokens, dtype=log_ratio_T.dtype, device=log_ratio_T.device)
    out_T.index_copy_(0, live.at_L, coefficient_L.clamp(-limit, limit).to(out_T.dtype))
    return out_T, summed


@dataclass(frozen=True, eq=False)
class _Live:
    """Live tokens of this rank: where they are, log-ratios, weighted advantages (float64), cells, and the map there."""

    at_L: Tensor
    x_L: Tensor
    y_L: Tensor
    level: Level | None
    cell_L: Tensor | None
    gated: Gated


@dataclass
class _Riding:
    """A reduction in whose first call one more vector rides, behind the one that is given to it."""

    reduce: Reduce
    passenger: Tensor
    arrived: bool = False

    def __call__(self, buffer: Tensor) -> Tensor:
        if self.arrived:
            return self.reduce(buffer)
        total = self.reduce(torch.cat([buffer, self.passenger]))
        self.passenger, self.arrived = total[buffer.numel() :], True
        return total[: buffer.numel()]


def _first_reduction(
    gating: RatioGating, log_ratio_T: Tensor, weighted_advantage_T: Tensor, cells: Cells, reduce: Reduce | None
) -> tuple[Drift, _Live]:
    """Drift of all cells, the sums of the map's feature over its cells, and the map at the live tokens.

    Only live tokens are looked at from here on: what masked ones hold can reach nothing.
    """
    check_tokens("log_ratio", log_ratio_T, cells)
    check_tokens("weighted_advantage", weighted_advantage_T, cells)
    log_ratio_T, weight_T = log_ratio_T.detach().contiguous(), weighted_advantage_T.detach().contiguous()
    mask_T = cells.layout.mask_T
    at_L = torch.arange(cells.num_tokens, device=log_ratio_T.device) if mask_T is None else mask_T.nonzero().squeeze(1)
    x_L, y_L = log_ratio_T[at_L].double(), weight_T[at_L].double()
    if gating.stratum is None:
        drift = measure(log_ratio_T, cells, reduce, weight_T)
        return drift, _Live(at_L, x_L, y_L, None, None, gating.gate(x_L, y_L >= 0, x_L, x_L))
    level = cells.level(gating.stratum)
    cell_L = cells.cell_per_token(gating.stratum)[at_L]
    count_L = level.count_C[cell_L]
    sum_C = torch.zeros_like(level.count_C).index_add_(0, cell_L, gating.feature(x_L, count_L))
    if reduce is None:
        drift = measure(log_ratio_T, cells, None, weight_T)
    else:
        riding = _Riding(reduce, sum_C.new_zeros(cells.num_shared).index_copy_(0, level.slot_C, sum_C[level.shared_C]))
        drift = measure(log_ratio_T, cells, riding, weight_T)
        sum_C[level.shared_C] = riding.passenger[level.slot_C]
    return drift, _Live(at_L, x_L, y_L, level, cell_L, gating.gate(x_L, y_L >= 0, sum_C[cell_L], count_L))
