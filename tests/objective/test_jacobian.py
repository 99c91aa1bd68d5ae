"""The gradient (19) and the Jacobian (20) of FiberPO-Trajectory, entry by entry, and their scales (Property 5.5)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.sampled_states import F64, generator

REGIMES = ("pass_through", "rollback", "zeroed")


def sigma(x: Tensor, budget: float, slope: float) -> Tensor:
    """g^agg (10) in its compact form: clip(x, +-[(k + 1) C - k |x|]_+), with autograd."""
    room = torch.relu((slope + 1) * budget - slope * x.abs())
    return torch.where(x.abs() <= budget, x, x.sign() * torch.minimum(x.abs(), room))


def sigma_slope(x: float, budget: float, slope: float) -> float:
    return 1.0 if abs(x) <= budget else -slope if abs(x) < budget * (1 + 1 / slope) else 0.0


def fiberpo_trajectory(ell: Tensor, budgets: tuple[float, float], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rhat_i = w^base r^res_i of one trajectory, (7)-(12), and u_i, v_i (14), (15)."""
    num = len(ell)
    label = torch.where(ell >= 0, 1.0, -1.0).to(F64)
    log_s = {side: (side * ell * (label == side)).sum() / num for side in (1, -1)}  # (9)
    base = torch.exp(sigma(log_s[1], budgets[0], num)) / torch.exp(sigma(log_s[-1], budgets[1], num))  # (8)
    own = torch.where(label > 0, log_s[1], log_s[-1])
    other = torch.where(label > 0, log_s[-1], log_s[1])
    low, high = math.exp(-eps), math.exp(eps)
    numerator = (torch.exp(ell) / torch.exp(own) ** label).clamp(low, high)  # (11), (12)
    denominator = (torch.exp(other) ** -label).clamp(low, high)
    return base * numerator / denominator, ell - label * own, -label * other


def equation_20(ell: Tensor, budgets: tuple[float, float], eps: float) -> Tensor:
    """d rhat_i / d r_j (20), entry by entry."""
    rhat, u, v = fiberpo_trajectory(ell, budgets, eps)
    num = len(ell)
    out = torch.zeros(num, num, dtype=F64)
    for i, j in itertools.product(range(num), repeat=2):
        label_i, label_j = (1 if ell[t] >= 0 else -1 for t in (i, j))
        log_s = sum(max(label_j * float(x), 0.0) for x in ell) / num
        inside_u, inside_v = float(abs(u[i]) <= eps), float(abs(v[i]) <= eps)
        shared = sigma_slope(log_s, budgets[0] if label_j > 0 else budgets[1], num)
        shared -= inside_u if label_i == label_j else inside_v
        out[i, j] = rhat[i] / math.exp(ell[j]) * (float(i == j) * inside_u + shared / num)
    return out


@pytest.mark.parametrize("eps", (0.02, 0.1, 0.5))
@pytest.mark.parametrize("regime", itertools.product(REGIMES, REGIMES), ids="-".join)
def test_equation_20_in_all_nine_regimes(regime: tuple[str, str], eps: float):
    budgets, num = (0.15, 0.09), 7
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(*budgets)),), eps)
    drift = [
        {"pass_through": 0.6 * c, "rollback": c * (1 + 0.4 / num), "zeroed": 1.5 * c}[name]
        for c, name in zip(budgets, regime, strict=True)
    ]
    rng = generator(3)
    size = 0.1 + torch.rand(num, generator=rng, dtype=F64)
    pos, neg = size[:4] / size[:4].sum(), size[4:] / size[4:].sum()
    ell = num * torch.cat([drift[0] * pos, -drift[1] * neg])
    other = 0.3 * torch.randn(5, generator=rng, dtype=F64)
    both = torch.cat([ell, other])
    cells = hierarchy.cells({"trajectory": torch.tensor([0] * num + [1] * 5)})
    alone = hierarchy.cells({"trajectory": torch.zeros(num, dtype=torch.int64)})
    report = fpo.surrogate(ell, torch.ones(num, dtype=F64), alone, hierarchy).report.metrics()
    for channel, name in zip(("pos", "neg"), regime, strict=True):
        assert report[f"trajectory/{channel}/{name}"] == 1.0

    expected = equation_20(ell, budgets, eps)
    by_autograd = torch.autograd.functional.jacobian(
        lambda r: fiberpo_trajectory(r.log(), budgets, eps)[0], ell.exp(), vectorize=False
    )
    torch.testing.assert_close(by_autograd, expected, rtol=1e-12, atol=1e-13)

    def rhat(ratio: Tensor) -> Tensor:
        return fpo.gated_log_ratio(ratio.log(), cells, hierarchy).exp()

    package = torch.autograd.functional.jacobian(rhat, both.exp())
    torch.testing.assert_close(package[:num, :num], expected, rtol=1e-12, atol=1e-13)
    assert (package[:num, num:] == 0).all() and (package[num:, :num] == 0).all(), "trajectories are independent"


def relative_row(ell: Tensor, row: int, hierarchy: fpo.Hierarchy) -> Tensor:
    """(r_j / rhat_i) d rhat_i / d r_j for all j: the derivative of log rhat_i by every ell_j, one trajectory."""
    cells = hierarchy.cells({"trajectory": torch.zeros(len(ell), dtype=torch.int64)})
    unit = torch.zeros_like(ell)
    unit[row] = 1.0
    rhat = fpo.gated_log_ratio(ell, cells, hierarchy)[row].exp()
    return fpo.token_coefficients(ell, unit, cells, hierarchy) / rhat


def drifting(num: int, pos: float, neg: float, seed: int) -> Tensor:
    """`num` log-ratios, half of them above 0, with the aggregates P = pos and N = neg."""
    size = 0.2 + torch.rand(num, generator=generator(seed), dtype=F64)
    half = num // 2
    return num * torch.cat([pos * size[:half] / size[:half].sum(), -neg * size[half:] / size[half:].sum()])


LEVELS = {"pass_through": 0.6, "zeroed": 2.5}  # of the budget, for k >= 1


@pytest.mark.parametrize("num", (10, 100, 1000))
@pytest.mark.parametrize("regime", itertools.product(LEVELS, LEVELS), ids="-".join)
def test_property_5_5_scale_separation_outside_rollback(regime: tuple[str, str], num: int):
    # (20): what a token does to itself is O(1), what it does to another token of the trajectory at most 1 / T
    budgets, eps = (0.15, 0.09), 0.1
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(*budgets)),), eps)
    ell = drifting(num, *(LEVELS[name] * c for name, c in zip(regime, budgets, strict=True)), seed=1)
    own_mean = torch.where(ell >= 0, ell.clamp_min(0.0).mean(), ell.clamp_max(0.0).mean())
    inside = ((ell - own_mean).abs() <= eps).double()
    assert 0 < inside.sum() < num
    largest = 0.0
    for i in (0, int(inside.argmax()), int(inside.argmin()), num // 2, num - 1):
        row = relative_row(ell, i, hierarchy)
        coupling = row.clone()
        coupling[i] -= inside[i]
        assert coupling.abs().max() <= (1.0 + 1e-12) / num
        largest = max(largest, float(row[torch.arange(num) != i].abs().max()))
    assert largest == pytest.approx(1.0 / num) or regime == ("pass_through", "pass_through")


@pytest.mark.parametrize("channel", (0, 1))
@pytest.mark.parametrize("num", (10, 100, 1000))
def test_property_5_5_does_not_hold_inside_rollback_where_k_is_the_token_count(num: int, channel: int):
    budgets, drift = (0.15, 0.09), [0.05, 0.05]
    drift[channel] = budgets[channel] * (1 + 0.5 / num)  # the middle of the window C / k
    ell = drifting(num, *drift, seed=2)
    of_channel = (ell < 0).nonzero().squeeze(1) if channel else (ell >= 0).nonzero().squeeze(1)
    i = int(of_channel[0])
    others = of_channel[of_channel != i]
    # slope k = T: every other token of the channel moves log rhat_i by -1 or -1 - 1/T, however long the trajectory
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(*budgets)),), 0.1)
    coupling = relative_row(ell, i, hierarchy)[others]
    assert (coupling <= -1.0 + 1e-9).all() and (coupling >= -1.0 - 1.0 / num - 1e-9).all()
    # the tokens of the other channel, which passes, are coupled by at most 1/T all the same
    rest = torch.ones(num, dtype=torch.bool)
    rest[of_channel] = False
    assert relative_row(ell, i, hierarchy)[rest].abs().max() <= (1.0 + 1e-9) / num
    # with a fixed k it is at most (k + 1) / T
    fixed = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(*budgets), slope=4.0),), 0.1)
    coupling = relative_row(ell, i, fixed)[others]
    assert (coupling <= -4.0 / num * (1 - 1e-9)).all() and (coupling >= -5.0 / num * (1 + 1e-9)).all()


@pytest.mark.parametrize("scale", (0.02, 0.2))
def test_equation_19_in_logit_space(scale: float):
    # grad J by the logits z of a table of states and actions:
    # sum_i w_i A_i sum_j (d rhat_i / d r_j) r_j (1[s = s_j, b = a_j] - 1[s = s_j] pi(b | s_j))
    rng, states, actions, num = generator(4), 5, 4, 12
    state, action = (torch.randint(0, high, (num,), generator=rng) for high in (states, actions))
    old = torch.randn(states, actions, generator=rng, dtype=F64)
    logits = (old + scale * torch.randn(states, actions, generator=rng, dtype=F64)).requires_grad_()
    weighted = torch.randn(num, generator=rng, dtype=F64) / num
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.05, 0.03)),), 0.04)
    cells = hierarchy.cells({"trajectory": torch.arange(num) // 6})

    log_prob = logits.log_softmax(1)[state, action]
    log_ratio = log_prob - old.log_softmax(1)[state, action]
    (weighted * fpo.gated_log_ratio(log_ratio, cells, hierarchy).exp()).sum().backward()

    ratio = log_ratio.detach().exp()
    by_ratio = torch.autograd.functional.jacobian(lambda r: fpo.gated_log_ratio(r.log(), cells, hierarchy).exp(), ratio)
    coefficients = fpo.token_coefficients(log_ratio.detach(), weighted, cells, hierarchy)
    torch.testing.assert_close((weighted @ by_ratio) * ratio, coefficients, rtol=1e-12, atol=1e-14)
    expected, policy = torch.zeros(states, actions, dtype=F64), logits.detach().softmax(1)
    for i, j in itertools.product(range(num), repeat=2):
        for b in range(actions):
            score = float(b == action[j]) - policy[state[j], b]
            expected[state[j], b] += weighted[i] * by_ratio[i, j] * ratio[j] * score
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(expected.sum(1), torch.zeros(states, dtype=F64), rtol=0, atol=1e-14)
