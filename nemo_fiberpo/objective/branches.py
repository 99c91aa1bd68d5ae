"""Branches: further classifications of the same tokens beside the chain, by sequential residualisation (Remark 6.5).

A branch does not nest with the chain (a partition of tokens over experts, or a second label of prompts), so the means
of the two overlap. They are therefore extracted one after the other, each from what those before it have left:
    O := 0;  for every stage in turn, for its levels n coarsest first, per channel l:
        m_n = P_n (a - O)                  mean over the cells of level n of what is left
        X_n += m_n - m_{n-1}               within the stage; m of the level above its first one is 0
    and then O += m of the stage's last level, read at every token.
A stage is a part of the chain, or one branch. The branches beside a stratum follow it; finer strata follow them. A part
of the chain and the branches beside it are swept `sweeps` times over (back-fitting), so that the sum of their X
converges to the joint orthogonal projection. Without branches there is one stage, and X_n = M_n - M_{n-1}.

Value and adjoint (a^l the channel of a token, P_n self-adjoint):
    L_i = sum_l [ sum_v g(X_v^l) + clip(a_i^l - O_i^l, +-eps) ],  so that log rhat = ell while nothing saturates (J = I)
    H_v^l(c) = sum over the tokens of c of y_i (G_v^l - chi_i^l),  chi = 1 where the clip of channel l passes
    Z := 0;  for every visit to a stage, last first, with D_n(c) = H_n(c) - sum over the tokens of c of Z:
        m*_n(c) = D_n(c) - sum of D_{n+1} over the children of c in the stage
        Z += sum over the stage's levels of m*_n / N_n of the token's cells
    c_j = chi_j^{l_j} y_j + Z_j^{l_j}
The terms of Z and chi cancel in m*_n except at the last level of a stage, and are left out.

A cell r of the chain that is merged into its parent p (`Stratum.min_tokens`) has m_r := m_p, and 0 at the first level
of a stage: it takes nothing. Its m* is added to that of p, or dropped, from the finest level of the stage up.

All of it is done on joint cells (_J): the distinct tuples of a finest cell of the chain and a cell of every branch
that hold tokens of this rank, with their local token counts. O and Z are constant on them, so tokens are read no more
often than without branches, and joint cells are never exchanged between ranks: sums over cells of strata are.

SPMD: one reduction for every visit to a stage, forward and backward, on every rank, with or without tokens. The first
one of either direction is there without branches too, and each further one carries sums of O or of Z over the cells
that ranks share. `Hierarchy.num_reductions` has their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .cells import Cells, check_arguments, climb, lay_out, pieces_of
from .levels import Level, Traits, build_levels, merge_into_parents
from .membership import Membership
from .pieces import dense_ids
from .sharing import Reduce, exchange


def plan_visits(num_chain: int, beside: Sequence[int], sweeps: int) -> tuple[range, ...]:
    """Stages in the order of their visits, as ranges of levels: the chain has 0 .. num_chain - 1, branches follow it.

    `beside` is the place in the chain of the stratum that each branch stands beside.
    """
    visits: list[range] = []
    first = 0
    for place in sorted(set(beside)):
        branches = [range(num_chain + index, num_chain + index + 1) for index, at in enumerate(beside) if at == place]
        visits += [range(first, place + 1), *branches] * sweeps
        first = place + 1
    return (*visits, range(first, num_chain)) if first < num_chain or not visits else tuple(visits)


@dataclass(frozen=True, eq=False)
class BranchedCells(Cells):
    """Cells of a chain and its branches: `levels` holds the chain, coarsest first, and then one level per branch.

    num_chain   levels of the chain
    visits      stages in the order of their visits, see `plan_visits`
    cell_NJ     per level the cell of every joint cell, int64 [J];  count_J: live tokens of this rank, float64

    The layout's finest cells are the joint cells, and so are the columns of `up`'s argument and of `down`'s result.
    """

    num_chain: int = 0
    visits: tuple[range, ...] = ()
    cell_NJ: tuple[Tensor, ...] = field(default=(), repr=False)
    count_J: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), repr=False)

    def cell_per_token(self, stratum: str) -> Tensor:
        """As `Cells.cell_per_token`."""
        self._refuse_soft(stratum)
        joint_T = self.layout.cell_per_token()
        cell_J = self.cell_NJ[self.levels.index(self.level(stratum))]
        return cell_J[joint_T] if cell_J.numel() else joint_T

    def up(self, finest_2C: Tensor) -> list[Tensor]:
        """Sums of joint cells, [2, J], as sums of every level."""
        ends = range(self.num_chain - 1, len(self.levels))
        sums = []
        for index in ends:
            empty = finest_2C.new_zeros(2, self.levels[index].label_C.numel())
            sums.append(empty.index_add_(1, self.cell_NJ[index], finest_2C))
        return climb(self.levels[: self.num_chain], sums[0]) + sums[1:]

    def down(self, values: list[Tensor]) -> Tensor:
        """Sum of all levels' [2, C], each read at the cells that hold a joint cell: [2, J]."""
        total = torch.zeros_like(values[0][:, self.cell_NJ[0]])
        for value, cell_J in zip(values, self.cell_NJ, strict=True):
            total += value[:, cell_J]
        return total


def build_branched_cells(
    chain: Sequence[str],
    branches: Sequence[str],
    visits: tuple[range, ...],
    labels: Mapping[str, Tensor],
    mask: Tensor | None,
    names: Mapping[str, Sequence[str]],
    shape: tuple[int, int] | None,
    traits: Mapping[str, Traits],
    soft: Membership | None = None,
) -> BranchedCells:
    """Cells of a chain (coarsest first) and its branches; arguments, errors and SPMD layout as in `build_cells`."""
    strata = [*branches, *chain]
    num_tokens, mask, chosen = check_arguments(strata, labels, mask, names, shape, soft)
    pieces = pieces_of([labels[name] for name in strata], mask, shape, soft)
    of_chain = replace(pieces, label_KP=pieces.label_KP[len(branches) :])
    levels, cell_P = build_levels(chain, of_chain, chosen, traits)
    cell_BP = []
    for name, label_P in zip(branches, pieces.label_KP, strict=False):
        branch, of_branch_P = build_levels([name], replace(pieces, label_KP=[label_P]), chosen, traits)
        levels += branch
        cell_BP.append(of_branch_P)
    joint_P, cell_NJ, count_J = _join(levels, len(chain), cell_P, cell_BP, pieces.count_P)
    count_J /= pieces.unit
    layout = lay_out(num_tokens, count_J.numel(), joint_P, mask, pieces, soft)
    return BranchedCells(
        levels, layout, shape, num_chain=len(chain), visits=visits, cell_NJ=tuple(cell_NJ), count_J=count_J
    )


def _join(
    levels: Sequence[Level], num_chain: int, cell_P: Tensor, cell_BP: Sequence[Tensor], count_P: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The joint cell of every piece, the cell of every joint cell per level, and the live tokens of joint cells."""
    joint_P, num = cell_P, levels[num_chain - 1].label_C.numel()
    for of_branch_P, level in zip(cell_BP, levels[num_chain:], strict=True):
        found_J, joint_P = dense_ids(joint_P * level.label_C.numel() + of_branch_P)
        num = found_J.numel()
    count_J = torch.zeros(num, dtype=torch.float64, device=cell_P.device).index_add_(0, joint_P, count_P.double())

    def of_joint(per_P: Tensor) -> Tensor:
        return torch.zeros(num, dtype=torch.int64, device=per_P.device).scatter_(0, joint_P, per_P)

    chain_NJ = [of_joint(cell_P)]
    for level in reversed(levels[1:num_chain]):
        chain_NJ.append(level.up_C[chain_NJ[-1]])
    return joint_P, chain_NJ[::-1] + [of_joint(per_P) for per_P in cell_BP], count_J


def _sums_of(table_2J: Tensor, cells: BranchedCells, reduce: Reduce | None, adjoint: bool = False) -> list[Tensor]:
    """Sums over the tokens of every cell, on all ranks, of a table that is constant on joint cells; one reduction.

    With `adjoint` those of the last level of every stage alone, and what merged cells have is their parents'.
    """
    sums = cells.up(cells.count_J * table_2J)
    if adjoint:
        last = {stage[-1] for stage in cells.visits}
        sums = [value if index in last else torch.zeros_like(value) for index, value in enumerate(sums)]
        for stage in set(cells.visits):
            merge_into_parents(sums, cells.levels, stage)
    return exchange(table_2J.new_zeros(0), sums, cells, reduce)[1]


def extract(sums: list[Tensor], cells: BranchedCells, reduce: Reduce | None) -> tuple[list[Tensor], Tensor]:
    """X of every level, [2, C], and O, [2, J], from the channels' sums of every level over all ranks.

    One reduction for every visit but the first, which needs no more than `sums`.
    """
    drift = [torch.zeros_like(sum_2C) for sum_2C in sums]
    taken_2J = torch.zeros(2, cells.count_J.numel(), dtype=torch.float64, device=cells.count_J.device)
    for visit, stage in enumerate(cells.visits):
        left = sums
        if visit:
            taken = _sums_of(taken_2J, cells, reduce)
            left = [sum_2C - taken_2C for sum_2C, taken_2C in zip(sums, taken, strict=True)]
        above_2C = None
        for index in stage:
            level = cells.levels[index]
            mean_2C = left[index] / level.count_C
            if level.small_C is not None:
                mean_2C[:, level.small_C] = 0.0 if above_2C is None else above_2C[:, level.up_C[level.small_C]]
            drift[index] += mean_2C if above_2C is None else mean_2C - above_2C[:, level.up_C]
            above_2C = mean_2C
        assert above_2C is not None
        taken_2J = taken_2J + above_2C[:, cells.cell_NJ[stage[-1]]]
    return drift, taken_2J


def stage_adjoint(slope: list[Tensor], y_2J: Tensor, blocked_2J: Tensor, cells: BranchedCells) -> list[Tensor]:
    """m*_n of every level, [2, C], but for the terms of Z: this rank's part, linear in its tokens.

    `slope` G per level; `y_2J` sums of y; `blocked_2J` per channel sums of y where that channel's clip is saturated.
    """
    total = [level_2C.sum(0) for level_2C in cells.up(y_2J)]
    blocked = cells.up(blocked_2J)
    last = {stage[-1] for stage in cells.visits}
    out = []
    for index, own in enumerate(slope):
        if index in last:
            out.append((own - 1.0) * total[index] + blocked[index])
            continue
        parent_C = cells.levels[index + 1].up_C
        terms = (own[:, parent_C] - slope[index + 1]) * total[index + 1]
        out.append(torch.zeros_like(own).index_add_(1, parent_C, terms))
    for stage in set(cells.visits):
        merge_into_parents(out, cells.levels, stage)
    return out


def joint_adjoint(adjoint: list[Tensor], cells: BranchedCells, reduce: Reduce | None) -> Tensor:
    """Z, [2, J], from m*_n of every level over all ranks (see `stage_adjoint`); one reduction per visit but one."""
    pulled_2J = torch.zeros(2, cells.count_J.numel(), dtype=torch.float64, device=cells.count_J.device)
    for visit, stage in enumerate(reversed(cells.visits)):
        through = _sums_of(pulled_2J, cells, reduce, adjoint=True) if visit else None
        for index in stage:
            value_2C = adjoint[index] if through is None else adjoint[index] - through[index]
            pulled_2J = pulled_2J + (value_2C / cells.levels[index].count_C)[:, cells.cell_NJ[index]]
    return pulled_2J
