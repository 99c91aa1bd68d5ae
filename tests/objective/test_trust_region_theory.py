"""Sections 2 and D as experiments: APC-Obj retracts, has the update of TV-TRPO, and no radius without a discount.

Random problems in float64, each statement written out slowly. Numbers are the paper's.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.sampled_states import F64, Sampled, directions, generator, sample


@pytest.mark.parametrize("seed", range(6))
def test_theorem_d10_tv_trpo_and_apc_obj_give_the_same_update(seed: int):
    problem, gamma = sample(seed), 0.95
    unit, cbar = problem.unit()
    radius = problem.radius(gamma)
    best = radius * unit
    # TV-TRPO is concave, so that what no feasible direction improves is its maximum
    value = problem.tv_trpo(best, gamma)
    for direction in directions(problem, seed):
        for step in (1e-6, 1e-4, 1e-2):
            assert problem.tv_trpo(best + step * radius * direction, gamma) <= value + 1e-13
    # APC-Obj has it as its maximum, of value delta cbar, over ratios of any size
    assert problem.apc(best, radius * (1 + 1e-12)) == pytest.approx(radius * cbar, rel=1e-10)
    for direction in directions(problem, seed + 100):
        for scale in (0.1, 1.0, 5.0):
            assert problem.apc(best + scale * radius * direction, radius) < radius * cbar * (1 - 1e-9)
        assert problem.apc(0.2 * direction, radius) < radius * cbar


@pytest.mark.parametrize("seed", range(4))
def test_lemma_d9_censoring_retracts_into_the_ball(seed: int):
    problem, rng = sample(seed), generator(seed)
    outside = 0
    for _ in range(200):
        delta = problem.centred(torch.rand(problem.count.shape, generator=rng, dtype=F64) - 0.5)
        delta *= 1.2 * torch.rand((), generator=rng, dtype=F64)
        radius = 0.05 + 0.2 * float(torch.rand((), generator=rng))
        before = problem.tv(delta)
        after = problem.tv(problem.centred(problem.censored(delta, radius)))
        inside = before <= radius
        torch.testing.assert_close(after[inside], before[inside], rtol=1e-12, atol=1e-14)
        assert (after <= (2 * radius - before).clamp_min(0.0) + 1e-13)[~inside].all()
        assert (after < radius)[~inside].all(), "strict"
        outside += int((~inside).sum())
    assert 50 < outside < 750


def test_theorem_2_1_the_tv_radius_vanishes_without_discount():
    problem = sample(2)
    unit, _ = problem.unit()
    last = math.inf
    for gamma in (0.5, 0.9, 0.99, 0.999, 0.9999):
        # the radius that maximises (67) along its own maximiser, by golden section
        low, high, golden = 0.0, 1.0, (math.sqrt(5) - 1) / 2
        for _ in range(200):
            a, b = high - golden * (high - low), low + golden * (high - low)
            if problem.tv_trpo(a * unit, gamma) > problem.tv_trpo(b * unit, gamma):
                high = b
            else:
                low = a
        radius = problem.radius(gamma)
        # the top is flat: found to the square root of the rounding error
        assert radius == pytest.approx(low, rel=1e-5)
        assert radius <= (1 - gamma) / (4 * gamma), "(76)"
        assert radius < last
        last = radius
        # so nothing moves: the map of that radius is 1 but for 2 n_s delta
        delta = problem.centred(torch.rand(problem.count.shape, generator=generator(1), dtype=F64))
        moved = problem.censored(0.5 * delta, radius).abs()
        assert (moved <= 2 * problem.seen * radius * (1 + 1e-9)).all()
    assert last < 1e-4


def per_state(problem: Sampled, value: Tensor) -> Tensor:
    """Sums over the actions of each state, at its actions."""
    sums = torch.zeros(int(problem.state.max()) + 1, dtype=F64).index_add_(0, problem.state, value)
    return sums[problem.state]


def kl_of(problem: Sampled, ratio: Tensor) -> Tensor:
    """D_KL^(s) (40) of the state of each action."""
    return per_state(problem, -problem.count / problem.seen * ratio.log())


def kl_ball(problem: Sampled, kl: float) -> Tensor:
    """The ratios that maximise every state's gain where its divergence is `kl`: r_a = mu / (nu - A_a), with mu from
    (65) and nu by bisection, since the divergence falls as nu grows."""
    old = problem.count / problem.seen
    best = torch.stack([problem.advantage[problem.state == state].max() for state in problem.state])
    low, high = torch.full_like(best, 1e-9), torch.full_like(best, 1e9)  # nu above the best advantage
    for _ in range(60):
        middle = (low * high).sqrt()
        gap = middle + best - problem.advantage
        ratio = 1.0 / gap / per_state(problem, old / gap)
        wider = kl_of(problem, ratio) > kl
        low, high = torch.where(wider, middle, low), torch.where(wider, high, middle)
    return ratio


def on_kl_sphere(problem: Sampled, kl: float, seed: int) -> Tensor:
    """Random ratios of mean 1 with the divergence `kl` at every state."""
    direction = problem.centred(torch.randn(problem.count.shape, generator=generator(seed), dtype=F64))
    steepest = torch.stack([(-direction[problem.state == state]).max() for state in problem.state])
    low, high = torch.zeros_like(direction), 1.0 / steepest  # where a ratio of the state is 0
    for _ in range(60):
        middle = (low + high) / 2
        wider = kl_of(problem, 1.0 + middle * direction) > kl
        low, high = torch.where(wider, low, middle), torch.where(wider, middle, high)
    return 1.0 + low * direction


def kl_trpo(problem: Sampled, ratio: Tensor, gamma: float) -> float:
    """(67) with KL in place of TV: by (36) the penalty's (max TV)^2 is at most half of the largest divergence."""
    gain = (problem.count * (ratio - 1.0) * problem.advantage).sum() / problem.count.sum()
    penalty = 2 * gamma * problem.advantage.abs().max() / (1 - gamma) ** 2 * kl_of(problem, ratio).max()
    return float(gain / (1 - gamma) - penalty)


def test_theorem_2_1_the_kl_radius_vanishes_without_discount():
    problem = sample(2)
    _, cbar = problem.unit()
    last = math.inf
    for gamma in (0.5, 0.9, 0.99, 0.999):
        # gain <= cbar sqrt(kl / 2) / (1 - gamma) must pay for the penalty, which is linear in kl
        bound = ((1 - gamma) * cbar / (gamma * float(problem.advantage.abs().max()))) ** 2 / 8
        low, high, golden = 0.0, bound, (math.sqrt(5) - 1) / 2
        for _ in range(40):
            a, b = high - golden * (high - low), low + golden * (high - low)
            values = [kl_trpo(problem, kl_ball(problem, kl), gamma) for kl in (a, b)]
            low, high = (low, b) if values[0] > values[1] else (a, high)
        best, radius = kl_ball(problem, low), low
        value = kl_trpo(problem, best, gamma)
        assert value > 0.0
        for factor in (0.5, 0.9, 1.1, 2.0):
            assert kl_trpo(problem, kl_ball(problem, factor * radius), gamma) < value
        for seed in range(20):
            assert kl_trpo(problem, on_kl_sphere(problem, radius, seed), gamma) < value
        assert 0.0 < radius <= bound <= ((1 - gamma) / gamma) ** 2 / 2
        assert problem.tv(best - 1.0).max() <= (1 - gamma) / (2 * gamma), "and with it TV, by (36)"
        assert radius < last
        last = radius
    assert last < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_equations_58_and_64_apc_obj_in_rgf_form(seed: int):
    # w_i = 1 / N, G(r)_i = 1 + clip(r_i - 1, +-[c_i]_+), c_i = 2 n_s delta - sum of |r_j - 1| over the others at s
    problem, rng = sample(seed), generator(seed)
    state, advantage = (problem.tokens(value) for value in (problem.state, problem.advantage))
    ratio = 1.0 + 0.4 * (torch.rand(state.shape, generator=rng, dtype=F64) - 0.5)
    gating = fpo.Apc(0.045, stratum="state")
    expected = []
    for i in range(len(ratio)):
        members = [j for j in range(len(ratio)) if state[j] == state[i]]
        room = 2 * len(members) * 0.045 - sum(abs(float(ratio[j]) - 1) for j in members if j != i)
        expected.append(1 + min(max(float(ratio[i]) - 1, -max(room, 0.0)), max(room, 0.0)))
    gate = fpo.gated_ratio(ratio.log(), advantage, problem.cells, gating)
    torch.testing.assert_close(gate, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-14)
    assert (gate != ratio).any() and (gate != 1.0).any()
    weights = fpo.token_weights(problem.cells, "token_mean", stratum="state")
    value = fpo.surrogate(ratio.log(), weights * advantage, problem.cells, problem.hierarchy, gating=gating).value
    total = sum(g * a for g, a in zip(expected, advantage.tolist(), strict=True))
    assert value == pytest.approx(total / len(expected), abs=1e-14)
    # a ratio gate: G(1) = 1
    at_one = fpo.gated_ratio(torch.zeros_like(ratio), advantage, problem.cells, gating)
    assert torch.equal(at_one, torch.ones_like(ratio))
