"""The pessimism of PPO on top of a hierarchy: J = sum_i w_i min(r_i A_i, rhat_i A_i), and its gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.cases import F64, Case, branched_case, expert_case, make_case, tree_case
from tests.objective.checks import equals_the_slow_loops, ignores_masked_tokens, is_one_process_on_ranks

CASES = {
    "chain": lambda seed, scale: make_case(3, seed, scale),
    "tree": tree_case,
    "branches": lambda seed, scale: branched_case("in two places", seed, scale),
    "soft": lambda seed, scale: expert_case("P1", seed, scale, soft=True, floor=4),
}


def own_is_the_minimum(case: Case) -> torch.Tensor:
    """Bool [T]: live tokens with w r A < w rhat A."""
    gated = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)
    return case.mask & (case.weight * case.log_ratio.exp() < case.weight * gated.exp() - 1e-12)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("scale", (0.02, 0.2))
def test_value_and_gradient_equal_the_slow_loops(kind: str, scale: float):
    equals_the_slow_loops(CASES[kind](1, scale), use_min=True)


def test_two_tokens_by_hand():
    # one trajectory, M+ = 0.2, C = 0.3 passes, eps = 0.05: u = +-0.1, so that L = (0.25, 0.15) of ell = (0.3, 0.1)
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.3, 0.3)),), 0.05)
    cells = hierarchy.cells({"trajectory": torch.zeros(2, dtype=torch.int64)})
    ell, weight = torch.tensor([0.3, 0.1], dtype=F64), torch.tensor([1.0, 1.0], dtype=F64)
    result = fpo.surrogate(ell, weight, cells, hierarchy, use_min=True)
    # A > 0: min(e^.3, e^.25) + min(e^.1, e^.15); the first token's y = e^.25 is clipped and goes to the mean of both
    assert result.value == pytest.approx(math.exp(0.25) + math.exp(0.1), abs=1e-15)
    half = math.exp(0.25) / 2
    assert result.coefficients.tolist() == pytest.approx([half, half + math.exp(0.1)], abs=1e-15)
    # A < 0: the other of the two each time
    result = fpo.surrogate(ell, -weight, cells, hierarchy, use_min=True)
    assert result.value == pytest.approx(-math.exp(0.3) - math.exp(0.15), abs=1e-15)
    half = math.exp(0.15) / 2
    assert result.coefficients.tolist() == pytest.approx([-math.exp(0.3) - half, -half], abs=1e-15)


@pytest.mark.parametrize("kind", CASES)
def test_a_token_whose_own_ratio_is_the_minimum_takes_no_part_in_any_gate(kind: str):
    """Where it is so for all tokens that count, c = w A r to the bit, though every gate saturates."""
    case = CASES[kind](2, 0.2)
    own = own_is_the_minimum(case)
    assert own.any()
    case.weight = torch.where(own, case.weight, 0.0)  # what is left has no say but in the aggregates
    coefficients = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy, use_min=True)
    expected = torch.where(own, case.weight * case.log_ratio.exp(), 0.0)
    if kind == "soft":  # the shares of a token's entries are rounded
        torch.testing.assert_close(coefficients, expected, rtol=1e-15, atol=0)
    else:
        assert torch.equal(coefficients, expected)
    without = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy)
    assert (without[~own & case.mask] != 0).any(), "without the minimum they push others"


@pytest.mark.parametrize("kind", CASES)
def test_it_is_pessimistic(kind: str):
    for seed in range(3):
        case = CASES[kind](seed, 0.15)
        own = own_is_the_minimum(case)
        gated = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy).exp()
        ratio = torch.where(own, case.log_ratio.exp(), gated)
        result = case.surrogate(use_min=True)
        assert result.value == pytest.approx((case.weight * ratio)[case.mask].sum().item(), abs=1e-12)
        assert result.value < case.surrogate().value - 1e-3
        assert result.value <= (case.weight * case.log_ratio.exp())[case.mask].sum().item() + 1e-12


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_with_the_token_clip_alone_it_is_ppo_in_logarithms(sign: float):
    """Every stratum off: min(r A, clip(r, e^-eps, e^eps) A), whose gradient is w A r where the clip does not bind."""
    case = make_case(2, 3, 0.2)
    strata = tuple(replace(stratum, enabled=False) for stratum in case.hierarchy.strata)
    case.hierarchy, case.weight = replace(case.hierarchy, strata=strata), sign * case.weight.abs()
    leaf = case.log_ratio.clone().requires_grad_()
    ratio = leaf.exp()
    clipped = ratio.clamp(math.exp(-0.04), math.exp(0.04))
    value = torch.minimum(ratio * case.weight, clipped * case.weight)[case.mask].sum()
    value.backward()
    result = case.surrogate(use_min=True)
    assert result.value == pytest.approx(value.item(), abs=1e-12)
    torch.testing.assert_close(result.coefficients, leaf.grad, rtol=1e-14, atol=0)
    ppo = fpo.PpoClip(1 - math.exp(-0.04), math.exp(0.04) - 1)
    assert case.surrogate(gating=ppo).value == pytest.approx(value.item(), abs=1e-12)


def test_huge_budgets_leave_the_residual_of_a_trajectory_against_its_mean():
    """Gates pass, and the token clip acts on what a token has beyond its trajectory, which the minimum then binds."""
    case = make_case(1, 4, 0.2, budget=1e3)
    cell = case.labels["domain"]
    expected = torch.zeros_like(case.log_ratio)
    for label in cell[case.mask].unique():
        at = case.mask & (cell == label)
        ell = case.log_ratio[at]
        mean = {side: torch.where((ell >= 0) == side, ell, 0.0).mean() for side in (True, False)}
        own = torch.where(ell >= 0, mean[True], mean[False])
        other = torch.where(ell >= 0, mean[False], mean[True])
        gated = mean[True] + mean[False] + (ell - own).clamp(-0.04, 0.04) + (-other).clamp(-0.04, 0.04)
        expected[at] = torch.minimum(case.weight[at] * ell.exp(), case.weight[at] * gated.exp())
    assert case.surrogate(use_min=True).value == pytest.approx(expected.sum().item(), abs=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_any_split_over_ranks_is_one_process(kind: str):
    case = CASES[kind](5, 0.1)
    is_one_process_on_ranks(case, torch.arange(len(case.mask)) % 3, 4, use_min=True)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -7.0])
def test_masked_tokens_change_no_bit(kind: str, bad: float):
    ignores_masked_tokens(CASES[kind](6, 0.1), bad, use_min=True)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, -7.0])
def test_masked_tokens_of_rows_change_no_bit(bad: float):
    case = make_case(3, 6)
    row = torch.arange(40) // 10
    case.labels = {"domain": row // 4, "prompt_group": row // 2, "trajectory": row}
    ignores_masked_tokens(case, bad, (4, 10), use_min=True)


def test_huge_log_ratios_give_finite_results():
    case = make_case(3, 6)
    for nats in (200.0, -200.0, 3e4, -3e4):
        ell = case.log_ratio.clone()
        ell[1:20:3] = nats
        for dtype in (torch.float64, torch.float32):
            result = fpo.surrogate(ell.to(dtype), case.weight.to(dtype), case.cells, case.hierarchy, use_min=True)
            assert math.isfinite(result.value) and torch.isfinite(result.coefficients).all()
