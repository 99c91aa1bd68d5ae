"""The regimes of single cells: which gates of a cell act, and the token clips of which of its tokens.

Five of the nine combinations of a cell's two channels have a name. They follow each other as
the drift of a trajectory grows, if the falling channel reaches its budget first:

    G-I         both pass                       the gradient is the ordinary one
    G-II,r      neg rolls back, pos passes
    G-II        neg zeroed, pos passes          the base weight is s+ only
    G-III,r     neg zeroed, pos rolls back
    G-III       both zeroed                     the base weight is 1, only the tokens' residuals are left

In the other four pos comes first. Where the ratios of a trajectory average to 1, (65), the falling channel drifts at
least as much as the rising one, so that these four cannot occur with C-* <= C+; in a sample they can. By the token
clips of its tokens a cell is in L-I (no live token's own residual is clipped), L-II (some are), or L-III (all are).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objective.fibration import Tokens, gate_cells, measure, weigh
from ..objective.gates import GLOBAL_REGIMES, aggregate_gate, regimes, states
from ..objective.hierarchy import Hierarchy
from ..objective.inputs import checked
from ..objective.sharing import Cells, Reduce, SharedCells, sum_nodes

LOCAL_REGIMES = ("L-I", "L-II", "L-III")


def global_regimes(drift_2C: Tensor, budget_2C: Tensor, slope_C: Tensor) -> Tensor:
    """Index into GLOBAL_REGIMES of every cell under the gate (10), int64 [C], from its drift beyond the parent's, its
    budgets C and its slope k. Elementwise."""
    return regimes(states(drift_2C, budget_2C, aggregate_gate(drift_2C, budget_2C, slope_C)[1]))


@dataclass(frozen=True, eq=False)
class StratumRegimes:
    """The regimes of those cells of one stratum that this rank holds and that have a gate of their own: their labels,
    ascending; indices into GLOBAL_REGIMES and LOCAL_REGIMES; and whether this rank counts the cell. int64, bool [C]."""

    name: str
    label_C: Tensor
    global_C: Tensor
    local_C: Tensor
    owned_C: Tensor

    def counts(self) -> dict[str, int]:
        """Cells in each regime, by name. Those of several ranks add up to the cells of the whole batch."""
        index_C = torch.cat([self.global_C, self.local_C + len(GLOBAL_REGIMES)])[self.owned_C.repeat(2)]
        names = GLOBAL_REGIMES + LOCAL_REGIMES
        return dict(zip(names, torch.bincount(index_C, minlength=len(names)).tolist(), strict=True))


def named_regimes(
    log_ratio: Tensor, cells: Cells | SharedCells, hierarchy: Hierarchy, reduce: Reduce | None = None
) -> tuple[StratumRegimes, ...]:
    """The regimes of the cells of every active stratum, coarsest first, under the gates of `token_coefficients`.

    Args and errors as there; `reduce` is called as often as in its forward half (once without branches), and once more.
    SPMD: tokens are sharded; a cell has the same regimes on every rank.
    """
    cells = checked(cells, hierarchy, log_ratio=log_ratio)
    tokens = Tokens.of(cells, log_ratio, torch.ones_like(log_ratio))
    drift, _ = measure(tokens, cells, reduce)
    gates = gate_cells(drift, cells, hierarchy)
    clipped_J = cells.layout.cell_sums(weigh(tokens, cells, drift, gates, exponentiate=False).clipped)
    clipped, _ = sum_nodes([(forest.slots, forest.up(clipped_J)) for forest in cells.forests], reduce, {})
    out: dict[int, StratumRegimes] = {}
    for index, forest in enumerate(cells.forests):
        global_N = regimes(states(drift.drift[index], gates.budget[index], gates.slope[index]))
        some_N, all_N = clipped[index] > 1e-3, clipped[index] > forest.count_N - 1e-3  # a share is at least 1/255
        local_N = some_N.long() + all_N.long()
        for stratum, nodes in forest.slices.items():
            of_nodes = (value[nodes] for value in (forest.label_N, global_N, local_N, forest.owned_N))
            out[stratum] = StratumRegimes(cells.levels[stratum].name, *of_nodes)
    return tuple(out[stratum] for stratum in sorted(out))
