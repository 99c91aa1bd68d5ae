"""The named regimes of a cell: G-I to G-III by its two channel gates, L-I to L-III by its tokens' clips.

Either channel of a cell passes (|X| <= C), rolls back (C < |X| < C*) or is zeroed (|X| >= C*), C* = C (1 + 1/k), where
X is the cell's drift beyond its parent's. Five of the nine combinations have a name; they follow each other when the
whole drift of a trajectory grows, as long as the falling channel reaches its budget first:

    G-I         both pass                       the gradient is the ordinary one
    G-II,r      neg rolls back, pos passes
    G-II        neg zeroed, pos passes          the base weight is s+ alone
    G-III,r     neg zeroed, pos rolls back
    G-III       both zeroed                     the base weight is 1, only the tokens' residuals are left

The other four have pos first. They are called by what holds, "pos rollback, neg pass" and so on. Where the ratios of a
trajectory average to 1, (65), its falling channel has at least the drift of the rising one, so that these four cannot
occur with C-* <= C+; in a sample they can.

    L-I         no live token of the cell is beyond the token clip with its own residual, |u_i| > eps
    L-II        some are, some are not
    L-III       all are
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cells import Cells
from .drift import check_tokens, compute_dtype, measure
from .fibration import Gates, gate_cells
from .gates import aggregate_gate, log_clip
from .hierarchy import Hierarchy
from .sharing import Reduce, exchange

STATES = ("pass", "rollback", "zeroed")
GLOBAL_REGIMES = (
    "G-I",
    "G-II,r",
    "G-II",
    "G-III,r",
    "G-III",
    "pos rollback, neg pass",
    "pos zeroed, neg pass",
    "pos rollback, neg rollback",
    "pos zeroed, neg rollback",
)
LOCAL_REGIMES = ("L-I", "L-II", "L-III")
# by the state of pos (row) and of neg (column)
_INDEX = ((0, 1, 2), (5, 7, 3), (6, 8, 4))


@dataclass(frozen=True, eq=False)
class StratumRegimes:
    """The regimes of the cells of one stratum that this rank holds, in the order of `Level.label_C`.

    global_C, local_C   int64 [C], indices into GLOBAL_REGIMES and LOCAL_REGIMES
    owned_C             bool [C]: this rank counts the cell
    """

    name: str
    global_C: Tensor
    local_C: Tensor
    owned_C: Tensor

    def counts(self) -> dict[str, int]:
        """Cells in each regime, by name. Those of several ranks add up to the cells of the whole batch."""
        out: dict[str, int] = {}
        for names, index_C in ((GLOBAL_REGIMES, self.global_C), (LOCAL_REGIMES, self.local_C)):
            number = torch.bincount(index_C[self.owned_C], minlength=len(names)).tolist()
            out |= dict(zip(names, number, strict=True))
        return out


def zeroed_from(budget: Tensor, slope: Tensor) -> Tensor:
    """C* = C (1 + 1/k), the drift from which the gate (10) is 0."""
    return budget * (1.0 + 1.0 / slope)


def global_regimes(drift_2C: Tensor, budget_2C: Tensor, slope_C: Tensor) -> Tensor:
    """Index into GLOBAL_REGIMES for every cell, int64 [C].

    `drift_2C` holds the drift of either channel beyond the parent's, row 0 pos, row 1 neg, of any sign; `budget_2C` and
    `slope_C` the budgets C and slopes k, as `Stratum.resolve` gives them. Pure and elementwise.
    """
    return by_slope(aggregate_gate(drift_2C, budget_2C, slope_C)[1])


def named_regimes(
    log_ratio: Tensor, cells: Cells, hierarchy: Hierarchy, reduce: Reduce | None = None
) -> tuple[StratumRegimes, ...]:
    """The regimes of all cells of every active stratum, coarsest first: those that `token_coefficients` acts by.

    Args and errors as `token_coefficients`; `reduce` is called as often as in the forward half of that function (once
    without branches) for the sums of the channels, and once for the clipped tokens.
    SPMD: tokens are sharded; a cell of several ranks has the same regimes on each of them.
    """
    hierarchy.check_levels(cells)
    check_tokens("log_ratio", log_ratio, cells)
    log_ratio = log_ratio.detach()
    gates = gate_cells(measure(log_ratio, cells, reduce), cells, hierarchy)
    if not cells.levels:
        return ()
    clipped = cells.up(_clipped_tokens(log_ratio, cells, gates))
    _, clipped = exchange(gates.mean_2C.new_zeros(0), clipped, cells, reduce)
    out = []
    for level, slope, number_2C in zip(cells.levels, gates.slope, clipped, strict=True):
        number_C = number_2C.sum(0)
        # of shares of tokens, sums are rounded: two numbers of units are told apart all the same
        local_C = (number_C > 0).long() + (number_C > level.count_C - 0.5 / level.unit).long()
        out.append(StratumRegimes(level.name, by_slope(slope), local_C, level.owned_C))
    return tuple(out)


def by_slope(derivative_2C: Tensor) -> Tensor:
    """Regimes from the derivatives of both gates: 1 passes, below 0 rolls back, 0 is zeroed."""
    state_2C = (derivative_2C <= 0.0).long() + (derivative_2C == 0.0).long()
    table = torch.tensor(_INDEX, device=derivative_2C.device)
    return table[state_2C[0], state_2C[1]]


def _clipped_tokens(log_ratio_T: Tensor, cells: Cells, gates: Gates) -> Tensor:
    """Live tokens whose own residual is beyond the token clip, by channel and finest (joint) cell: float64 [2, C]."""
    layout, dtype = cells.layout, compute_dtype(log_ratio_T)
    mean_2P, sums_2P = layout.spread(gates.mean_2C).to(dtype), layout.zeros()
    for block in layout.blocks():
        x = block.take(log_ratio_T, dtype, "x")
        neg = block.negative(x)
        residual = x - block.own(mean_2P, neg, "residual")
        outside = residual != log_clip(residual, gates.token_clip)
        block.add(sums_2P, neg, block.clear_masked(outside.to(dtype)))
    return layout.fold(sums_2P)
