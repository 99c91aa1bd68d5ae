"""The coefficients of a micro-batch from its own tokens, right as long as no cell that it shares with others acts.

A cell is shared if it has tokens in another micro-batch or on another rank. While a shared cell and all its children
pass exactly, its mean cancels: with g(X) = X the terms of a path add up to the mean of the first cell below, which is
local, and the adjoint gives nothing back. The children of a finest shared cell are its tokens. So gates of shared cells
and of their children are taken to pass here; all other gates are as they are.

Whether that was right shows in the exact coefficients, once the reductions have given them: see `differs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fibration import Quiet, Tokens, coefficients, gate_cells, measure, narrowed, weigh
from .forest import read
from .hierarchy import Hierarchy
from .kernels import compute_dtype
from .ratio_gating import RatioGating
from .sharing import Cells, SharedCells
from .surrogate import feature_sums, given_up, map_coefficients, with_old

ROUNDING = 64.0  # units of rounding up to which two coefficients count as equal


@dataclass(frozen=True, eq=False)
class PartCells:
    """The cells of one micro-batch by itself, and the gates that are taken to pass in it."""

    cells: SharedCells
    quiet: Quiet

    @property
    def local(self) -> bool:
        """Whether nothing is shared, so that its coefficients are the exact ones."""
        return not any(bool(quiet.any()) for quiet in (*self.quiet.nodes, self.quiet.tokens_J))


def gates_can_pass(hierarchy: Hierarchy, gating: RatioGating | None) -> bool:
    """Whether every gate has drifts at which it passes exactly. With one such as `soft` every shared cell acts."""
    return gating is not None or all(hierarchy.gate_of(stratum).passes > 0 for stratum in hierarchy.active)


def part_cells(parts: Sequence[Cells], whole: SharedCells) -> list[PartCells]:
    """Of every micro-batch, from the cells of its tokens by themselves and those of the whole step on this rank."""
    return [PartCells(part.shared, _quiet(part.shared, whole)) for part in parts]


def _quiet(part: SharedCells, whole: SharedCells) -> Quiet:
    """The gates of shared cells and of their children. With branches, whose cells are measured from what others have
    left, all gates if any cell is shared."""
    shared = [
        own.count_C != level.count_C[torch.searchsorted(level.label_C, own.label_C)]
        for own, level in zip(part.levels, whole.levels, strict=True)
    ]
    nodes, tokens_J = [], torch.zeros_like(part.count_J, dtype=torch.bool)
    for forest in part.forests:
        shared_N = torch.cat([shared[index][part.levels[index].acting_C] for index in forest.slices])
        nodes.append(shared_N | read(shared_N, forest.parent_N))
        tokens_J = tokens_J | read(shared_N, forest.leaf_J)
    if len(nodes) > 1 and any(bool(shared_C.any()) for shared_C in shared):
        return Quiet(tuple(torch.ones_like(quiet_N) for quiet_N in nodes), torch.ones_like(tokens_J))
    return Quiet(tuple(nodes), tokens_J)


def optimistic_coefficients(
    log_ratio: Tensor,
    weighted_advantage: Tensor,
    part: PartCells,
    hierarchy: Hierarchy,
    gating: RatioGating | None = None,
    use_min: bool = False,
    old_log_probs: Tensor | None = None,
) -> Tensor:
    """c_j [T] of a micro-batch from its tokens; arguments as in `surrogate`.

    A map that couples no tokens, or only those of cells that are not shared, is exact. Values that are not finite are
    not looked for, so that the host reads nothing: the exact evaluation refuses them. SPMD: no reduction.
    """
    cells = part.cells
    tokens = Tokens.of(cells, log_ratio, weighted_advantage)
    if gating is not None:
        return _of_map(with_old(gating, old_log_probs, cells), tokens, cells)
    drift, _ = measure(tokens, cells, None, check=False)
    gates = gate_cells(drift, cells, hierarchy, part.quiet)
    weighed, tokens = weigh(tokens, cells, drift, gates, use_min=use_min), tokens.without_weights()
    return coefficients(tokens, weighed, cells, drift, gates, None, {})[0]


def _of_map(gating: RatioGating, tokens: Tokens, cells: SharedCells) -> Tensor:
    layout = cells.layout
    assert tokens.weight is not None
    x, y = layout.masked(tokens.log_ratio.double()), layout.masked(tokens.weight.double())
    if gating.stratum is None:
        gated, level, given_C = gating.gate(x, y >= 0, x, x), None, None
    else:
        level, count, sum_C = feature_sums(gating, x, y, cells)
        gated = gating.gate(x, y >= 0, layout.at_tokens(level.at(sum_C)), count)
        given_C = given_up(gated, y, level, layout)
    return narrowed(map_coefficients(gated, y, level, layout, given_C), tokens.log_ratio.dtype)


def differs(exact: Tensor, optimistic: Tensor, weighted_advantage: Tensor) -> Tensor:
    """Bool: coefficients that differ by more than rounding."""
    unit = torch.finfo(compute_dtype(exact)).eps
    size = exact.abs().double() + weighted_advantage.abs().double()
    near = (exact.double() - optimistic.double()).abs() <= ROUNDING * unit * size
    return ~(near | (exact == optimistic))  # so that what is not a number differs, but for a masked token's weight
