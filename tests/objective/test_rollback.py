"""The push of a rollback: where it restores and where it does not, for FiberPO and for Truly-PPO."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.cases import make_case

F64 = torch.float64


@pytest.mark.parametrize(("drift", "advantage"), itertools.product((1, -1), (1.0, -1.0)))
def test_rollback_restores_where_the_advantage_has_the_sign_of_the_drift(drift: int, advantage: float):
    # all tokens drift alike, so that u = v = 0 and L = g(M): c_j = -k y_j, against the gradient without the gate
    num, budget = 5, 0.1
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(budget, budget)),), 0.2)
    cells = hierarchy.cells({"trajectory": torch.zeros(num, dtype=torch.int64)})
    x = budget * (1 + 0.5 / num)
    ell, weight = torch.full((num,), drift * x, dtype=F64), torch.full((num,), advantage / num, dtype=F64)
    gated = drift * 0.5 * budget  # half of the window is used up
    coefficients = fpo.token_coefficients(ell, weight, cells, hierarchy)
    torch.testing.assert_close(coefficients, -num * weight * math.exp(gated), rtol=1e-12, atol=0)
    restores = torch.sign(coefficients[0]) == -drift
    assert bool(restores) == (advantage == drift)
    # beyond C* nothing of the common drift is left in the gradient
    zeroed = fpo.token_coefficients(2 * ell, weight, cells, hierarchy)
    assert zeroed.abs().max() < 1e-15


@pytest.mark.parametrize(("drift", "advantage"), itertools.product((1, -1), (1.0, -1.0)))
def test_truly_ppo_rolls_back_only_where_it_restores(drift: int, advantage: float):
    case = make_case(1, 0, num=1)
    ell, weight = torch.tensor([0.5 * drift], dtype=F64), torch.tensor([advantage], dtype=F64)
    result = fpo.surrogate(ell, weight, case.cells, case.hierarchy, gating=fpo.TrulyPpo(0.2, 0.3))
    factor = -0.3 if drift == advantage else 1.0
    assert result.coefficients.item() == pytest.approx(factor * advantage * math.exp(0.5 * drift), rel=1e-14)
    assert math.copysign(1, result.coefficients.item()) == -drift, "either way it pulls back"
