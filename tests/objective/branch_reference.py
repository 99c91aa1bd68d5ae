"""Branches written out token by token from EQUATIONS 7.2: slow, obvious, no code of the package.

Every token carries what is left of its two channels. A vertex takes from each token the mean over the token's cell, and
nothing where the cell has fewer tokens than the vertex's floor.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.objective.reference import Dual, Level, aggregate_gate, clip, evaluated


def gated_log_ratios(
    ell: Sequence[float],
    live: Sequence[bool],
    chain: Sequence[Level],
    branches: Sequence[tuple[Level, int]],
    sweeps: int,
    eps: float,
) -> dict[int, Dual]:
    """L_i; a branch comes with the place in the chain of the stratum that it stands beside."""
    tokens = [i for i in range(len(ell)) if live[i]]
    left = {}
    for i in tokens:
        own = Dual(ell[i], {i: 1.0})
        left[i] = [own, Dual(0.0)] if ell[i] >= 0 else [Dual(0.0), own]
    vertices = [*chain, *(branch for branch, _ in branches)]
    drift = {(v, i): [Dual(0.0), Dual(0.0)] for v in range(len(vertices)) for i in tokens}

    # the sweep removes one vertex at a time: nested ones coarse to fine, (1 - P_fine)(1 - P_coarse) = 1 - P_fine
    order: list[int] = []
    first = 0
    for place in range(len(chain)):
        beside = [len(chain) + b for b, (_, at) in enumerate(branches) if at == place]
        if beside:
            order += [*range(first, place + 1), *beside] * sweeps
            first = place + 1
    order += range(first, len(chain))
    for v in order:
        cell = vertices[v].cell
        taken = {}
        for c in {cell[i] for i in tokens}:
            members = [i for i in tokens if cell[i] == c]
            for side in (0, 1):
                total = Dual(0.0)
                for i in members:
                    total = total + left[i][side]
                taken[c, side] = total / len(members) if len(members) >= vertices[v].floor else Dual(0.0)
        for i in tokens:
            for side in (0, 1):
                drift[v, i][side] = drift[v, i][side] + taken[cell[i], side]
                left[i][side] = left[i][side] - taken[cell[i], side]

    out = {}
    for i in tokens:
        total = Dual(0.0)
        for side in (0, 1):
            for v, vertex in enumerate(vertices):
                c = vertex.cell[i]
                count = sum(1 for j in tokens if vertex.cell[j] == c)
                total = total + aggregate_gate(drift[v, i][side], vertex.budget(c)[side], vertex.slope(c, count))
            total = total + clip(left[i][side], eps)
        out[i] = total
    return out


def objective(
    ell: Sequence[float],
    weight: Sequence[float],
    live: Sequence[bool],
    chain: Sequence[Level],
    branches: Sequence[tuple[Level, int]],
    sweeps: int,
    eps: float,
) -> tuple[float, list[float], list[float]]:
    """J, dJ/d ell and L for every token (0 where masked)."""
    return evaluated(gated_log_ratios(ell, live, chain, branches, sweeps, eps), weight)
