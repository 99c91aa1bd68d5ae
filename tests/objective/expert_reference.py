"""Strata of expert partitions written out from EQUATIONS, section 8, entry by entry: slow, no code of the package.

An entry is a token i in a partition e, with share q_ie; with hard labels a token has one entry, of share 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from tests.objective.reference import Dual, aggregate_gate, clip, evaluated


@dataclass
class Level:
    """A stratum: the cell of token i in partition e (None where it is missing), (C+, C-), k (None for Q, the cell's
    tokens), and its floor."""

    cell: Callable[[int, int], Hashable | None]
    budget: tuple[float, float]
    slope: float | None = None
    floor: int = 0


def gated_log_ratios(
    ell: Sequence[float],
    live: Sequence[bool],
    share: Sequence[Sequence[float]],
    chain: Sequence[Level],
    branch: Level | None,
    eps: float,
) -> dict[int, Dual]:
    """L_i = sum_e q_ie sum_l [ sum_n g(X_n) + clip(a_i - M) ]. A cell below the floor has its parent's mean, so X = 0.

    P4: a branch is charged with Delta_e = sum_i q_ie (a_i - M) / Q_e, and the clip acts on a_i - M - Delta_e.
    """
    entries = [(i, e) for i in range(len(ell)) if live[i] for e in range(len(share[i])) if share[i][e] > 0]
    own = {i: Dual(ell[i], {i: 1.0}) for i, _ in entries}
    left = {i: (own[i], Dual(0.0)) if ell[i] >= 0 else (Dual(0.0), own[i]) for i in own}
    out = {i: Dual(0.0) for i in own}
    above = {(i, e): (Dual(0.0), Dual(0.0)) for i, e in entries}  # the mean of the cell that holds the entry
    gates = {(i, e): Dual(0.0) for i, e in entries}
    for level in chain:
        masses, means = averages(level, entries, share, {(i, e): left[i] for i, e in entries})
        for i, e in entries:
            cell = level.cell(i, e)
            if cell is None or masses[cell] < level.floor - 1e-9:  # the mass is a rounded sum of shares
                continue
            for side in (0, 1):
                x, k = means[cell][side] - above[i, e][side], level.slope or masses[cell]
                gates[i, e] = gates[i, e] + aggregate_gate(x, level.budget[side], k)
            above[i, e] = means[cell]
    rest = {(i, e): tuple(left[i][side] - above[i, e][side] for side in (0, 1)) for i, e in entries}
    if branch is not None:
        masses, means = averages(branch, entries, share, rest)
        for i, e in entries:
            cell = branch.cell(i, e)
            for side in (0, 1):
                k = branch.slope or masses[cell]
                gates[i, e] = gates[i, e] + aggregate_gate(means[cell][side], branch.budget[side], k)
            rest[i, e] = tuple(rest[i, e][side] - means[cell][side] for side in (0, 1))
    for i, e in entries:
        out[i] = out[i] + (gates[i, e] + clip(rest[i, e][0], eps) + clip(rest[i, e][1], eps)) * share[i][e]
    return out


def averages(level, entries, share, channels) -> tuple[dict, dict]:
    """Q and the means of both channels of every cell, each entry weighed by its share."""
    masses: dict[Hashable, float] = {}
    sums: dict[Hashable, list[Dual]] = {}
    for i, e in entries:
        cell, q = level.cell(i, e), share[i][e]
        masses[cell] = masses.get(cell, 0.0) + q
        held = sums.setdefault(cell, [Dual(0.0), Dual(0.0)])
        sums[cell] = [held[side] + channels[i, e][side] * q for side in (0, 1)]
    return masses, {cell: tuple(total / masses[cell] for total in both) for cell, both in sums.items()}


def objective(ell, weight, live, share, chain, branch, eps) -> tuple[float, list[float], list[float]]:
    """J = sum_i w_i A_i exp(L_i), dJ/d ell, and L (0 where masked)."""
    return evaluated(gated_log_ratios(ell, live, share, chain, branch, eps), weight)
