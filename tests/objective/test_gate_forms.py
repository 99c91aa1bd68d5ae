"""The aggregate gate in its other forms: (10) as one clip, and the derivation (77)-(79) of E.5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_fiberpo.objective.gates import aggregate_gate, zeroed_from


def clip(x: Tensor, bound: Tensor) -> Tensor:
    """clip(x, +-[bound]_+)."""
    bound = bound.clamp_min(0.0)
    return torch.maximum(torch.minimum(x, bound), -bound)


def drifts() -> Tensor:
    return torch.linspace(-0.5, 0.5, 4001, dtype=torch.float64)


@pytest.mark.parametrize("slope", [0.5, 2.0, 32.0, 1000.0])
@pytest.mark.parametrize("budget", [0.05, 0.15])
def test_equation_10_is_one_clip(budget: float, slope: float):
    x = drifts()
    value, _ = aggregate_gate(x, *(torch.tensor(v, dtype=torch.float64) for v in (budget, slope)))
    expected = clip(x, (slope + 1.0) * budget - slope * x.abs())
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13 * slope)


@pytest.mark.parametrize("count", [1.0, 3.0, 40.0])
def test_equation_78_without_the_individual_term_is_the_gate_with_budget_c_t_over_t_plus_1(count: float):
    """clip(x, +-T [C - x]_+) = g(x; C T / (T + 1), T) for x >= 0, and what (78) adds to the bound is nonnegative."""
    total = torch.tensor(0.15, dtype=torch.float64)
    x, slope = drifts().clamp_min(0.0), torch.tensor(count, dtype=torch.float64)
    budget = total * count / (count + 1.0)
    value, _ = aggregate_gate(x, budget, slope)
    torch.testing.assert_close(value, clip(x, count * (total - x)), rtol=0, atol=1e-14 * count)
    assert zeroed_from(budget, slope).item() == pytest.approx(total.item(), abs=1e-16)
    individual = torch.tensor(0.03, dtype=torch.float64)
    assert (clip(x, count * (total - x) + individual) >= value - 1e-14 * count).all()


@pytest.mark.parametrize("slope", [2.0, 32.0])
def test_equation_10_is_continuous_and_odd(slope: float):
    budget, k = torch.tensor(0.15, dtype=torch.float64), torch.tensor(slope, dtype=torch.float64)
    x = drifts()
    value, _ = aggregate_gate(x, budget, k)
    assert torch.equal(value, -aggregate_gate(-x, budget, k)[0])
    for border in (budget, zeroed_from(budget, k)):
        near = border + torch.tensor([-1e-12, 0.0, 1e-12], dtype=torch.float64)
        out, _ = aggregate_gate(near, budget, k)
        assert out.max() - out.min() <= 2.1e-12 * (1.0 + slope)
