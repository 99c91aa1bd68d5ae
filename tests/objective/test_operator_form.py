"""Fiber bundle gating (4) and the fibration gating hierarchy (26) as operators, with explicit matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import make_case

F64 = torch.float64


def gate(x: Tensor, budget: Tensor, slope: Tensor) -> Tensor:
    """(10), one entry after the other."""
    out = []
    for value, c, k in zip(x.tolist(), budget.tolist(), slope.tolist(), strict=True):
        size = abs(value)
        gated = size if size <= c else max((k + 1) * c - k * size, 0.0)
        out.append(math.copysign(gated, value))
    return torch.tensor(out, dtype=F64)


def projection(fine: list[int], coarse_of: Callable[[int], int], coarse: list[int]) -> Tensor:
    """The pushforward along a map of labels: [coarse, fine], a 1 where `fine` lies over `coarse`."""
    out = torch.zeros(len(coarse), len(fine), dtype=F64)
    for column, label in enumerate(fine):
        out[coarse.index(coarse_of(label)), column] = 1.0
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", (0.01, 0.1, 0.4))
def test_equation_4_fiber_bundle_gating_in_operator_form(seed: int, scale: float):
    case = make_case(1, seed, scale)
    stratum, eps = case.hierarchy.active[0], case.hierarchy.token_clip
    label = case.labels[stratum.name][case.mask].tolist()
    ell = case.log_ratio[case.mask]
    cells = sorted(set(label))
    push = projection(list(range(len(ell))), lambda i: label[i], cells)
    length = push.sum(1)
    length_i = push.T @ length
    lift = push.T / length  # (K b)(i) = b(tau(i)) / T_tau
    torch.testing.assert_close(push @ lift, torch.eye(len(cells), dtype=F64))  # reflecting
    log_rhat = torch.zeros_like(ell)
    for side, budget in ((1, stratum.budget.pos), (-1, stratum.budget.neg)):
        density = (side * ell).clamp_min(0.0) / length_i  # F
        base = push @ density
        residual = density - lift @ base
        assert (push @ residual).abs().max() < 1e-15
        gated_base = gate(base, torch.full_like(base, budget), length)
        gated_fiber = (length_i * residual).clamp(-eps, eps) / length_i
        log_rhat += side * length_i * (lift @ gated_base + gated_fiber)  # log of R
    expected = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)[case.mask]
    torch.testing.assert_close(log_rhat, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("depth", (1, 2, 3, 4))
@pytest.mark.parametrize("slope", [None, 0.3])
@pytest.mark.parametrize("scale", (0.01, 0.1, 0.4))
def test_equation_26_fibration_gating_hierarchy_in_operator_form(depth: int, slope: float | None, scale: float):
    case = make_case(depth, 20 + depth, scale, slope=slope)
    labels = [case.labels[stratum.name][case.mask].tolist() for stratum in case.hierarchy.active]
    labels.append(list(range(len(labels[0]))))  # X_N: the tokens
    ell = case.log_ratio[case.mask]
    spaces = [sorted(set(label)) for label in labels]
    pairs = zip(labels, spaces, strict=True)
    counts = [torch.tensor([float(label.count(x)) for x in space], dtype=F64) for label, space in pairs]
    push, lift = [], []  # pi_n and K_n, n = 1 .. N
    for n in range(1, depth + 1):
        above = dict(zip(labels[n], labels[n - 1], strict=True))
        push.append(projection(spaces[n], above.__getitem__, spaces[n - 1]))
        lift.append(push[-1].T * counts[n][:, None] / counts[n - 1])  # (K_n b)(x) = N_x / N_above b(above)
        torch.testing.assert_close(push[-1] @ lift[-1], torch.eye(len(spaces[n - 1]), dtype=F64))
    log_rhat = torch.zeros_like(ell)
    for channel, side in ((0, 1), (1, -1)):
        densities = [(side * ell).clamp_min(0.0)]
        for matrix in reversed(push):
            densities.insert(0, matrix @ densities[0])  # (25)
        for n, density in enumerate(densities):
            residual = density if n == 0 else density - lift[n - 1] @ densities[n - 1]
            if n == depth:
                gated = residual.clamp(-case.hierarchy.token_clip, case.hierarchy.token_clip)
            else:
                pair = case.hierarchy.active[n].budget
                budget = torch.full_like(density, (pair.pos, pair.neg)[channel])
                chosen = counts[n] if slope is None else torch.full_like(density, slope)
                gated = counts[n] * gate(residual / counts[n], budget, chosen)
            for matrix in lift[n:]:
                gated = matrix @ gated  # (24)
            log_rhat += side * gated
    expected = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)[case.mask]
    torch.testing.assert_close(log_rhat, expected, rtol=0, atol=1e-13)
