"""Value and gradient against the token-by-token reference, and one trajectory worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.gates import aggregate_gate
from tests.objective.cases import Case, make_case

DEPTHS = (1, 2, 3, 4)
SCALES = (1e-3, 0.03, 0.1, 0.5)


def test_one_trajectory_by_hand():
    # T = 2, C+ = C- = 0.1, k = T = 2, eps = 0.2, ell = (0.26, -0.1), w A = (1, 2)
    # M+ = 0.13: rollback, g = 0.1 - 2 (0.13 - 0.1) = 0.04.   M- = -0.05: pass-through, g = -0.05
    # L_0 = 0.04 - 0.05 + (0.26 - 0.13) + 0.05 = 0.17;   L_1 = 0.04 - 0.05 + (-0.1 + 0.05) - 0.13 = -0.19
    # Z+ = (-2 - 1)(y_0 + y_1), Z- = 0;   c_0 = y_0 + Z+ / 2,  c_1 = y_1
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)),), 0.2)
    cells = hierarchy.cells({"trajectory": torch.tensor([5, 5])})
    ell, weight = torch.tensor([0.26, -0.1], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    gated = fpo.gated_log_ratio(ell, cells, hierarchy)
    torch.testing.assert_close(gated, torch.tensor([0.17, -0.19], dtype=torch.float64), rtol=0, atol=1e-15)
    y0, y1 = math.exp(0.17), 2 * math.exp(-0.19)
    expected = torch.tensor([y0 - 1.5 * (y0 + y1), y1], dtype=torch.float64)
    torch.testing.assert_close(fpo.token_coefficients(ell, weight, cells, hierarchy), expected, rtol=1e-14, atol=0)


def test_equations_81_and_82_in_the_notation_of_language_models():
    # prompts q with G_q responses o of |o| tokens: J = (1 / sum_q G_q) sum_q sum_o (1 / |o|) sum_t rhat_qot A_qo,
    # rhat_qot = w_qo r^res_qot, both of the response alone
    lengths = [[3, 5, 2], [4], [1, 6]]
    budget, eps, rng = fpo.Budget(0.1, 0.06), 0.05, torch.Generator().manual_seed(0)
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", budget),), eps)
    ell, advantage, label, total = [], [], [], 0.0
    for q, responses in enumerate(lengths):
        for o, length in enumerate(responses):
            x = (0.15 * torch.randn(length, generator=rng, dtype=torch.float64)).tolist()
            of_response = float(torch.randn((), generator=rng))
            mean = {side: sum(side * v for v in x if (v >= 0) == (side > 0)) / length for side in (1, -1)}
            weight = math.exp(gate(mean[1], budget.pos, length) - gate(mean[-1], budget.neg, length))
            for value in x:
                side = 1 if value >= 0 else -1
                own, other = value - side * mean[side], -side * mean[-side]
                residual = math.exp(min(max(own, -eps), eps) - min(max(other, -eps), eps))
                total += weight * residual * of_response / length
            ell += x
            advantage += [of_response] * length
            label += [10 * q + o] * length
    cells = hierarchy.cells({"trajectory": torch.tensor(label)})
    weighted = fpo.token_weights(cells) * torch.tensor(advantage, dtype=torch.float64)
    result = fpo.surrogate(torch.tensor(ell, dtype=torch.float64), weighted, cells, hierarchy)
    assert result.value == pytest.approx(total / sum(map(len, lengths)), abs=1e-14)
    assert result.report.clipped > 0


def gate(drift: float, budget: float, slope: float) -> float:
    """(10) of a drift that is not negative."""
    return drift if drift <= budget else max((slope + 1) * budget - slope * drift, 0.0)


def test_equation_10_regimes_and_edges():
    # C = 1/4, k = 4: C* = 5/16; all of it exact in binary
    drift = torch.tensor([0.0, 0.125, 0.25, 0.28125, 0.3125, 0.5, -0.25, -0.28125, -0.5], dtype=torch.float64)
    value, slope = aggregate_gate(
        drift, torch.tensor(0.25, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    )
    assert value.tolist() == [0.0, 0.125, 0.25, 0.125, 0.0, 0.0, -0.25, -0.125, 0.0]
    assert slope.tolist() == [1, 1, 1, -4, 0, 0, 1, -4, 0]


def test_equation_10_rollback_window_of_a_million_tokens_survives():
    budget, slope = torch.tensor(0.05, dtype=torch.float64), torch.tensor(1e6, dtype=torch.float64)
    drift = budget + torch.linspace(0, 5e-8, 101, dtype=torch.float64)  # the window is C / k = 5e-8 wide
    value, derivative = aggregate_gate(drift, budget, slope)
    torch.testing.assert_close(value, torch.linspace(0.05, 0, 101, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (derivative[1:-1] == -1e6).all()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slope", [None, 0.1])
def test_value_and_coefficients_match_the_reference(depth: int, scale: float, seed: int, slope: float | None):
    case = make_case(depth, seed, scale, budget=0.1 * scale, slope=slope)
    value, coefficients, gated = case.reference()
    cells = case.cells
    result = fpo.surrogate(case.log_ratio, case.weight, cells, case.hierarchy)
    torch.testing.assert_close(fpo.gated_log_ratio(case.log_ratio, cells, case.hierarchy), gated, rtol=0, atol=1e-13)
    assert result.value == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", [2.0, 0.5, fpo.SlopeCap(4)])
def test_rollback_slopes_by_number_and_by_cap(slope: object):
    case = make_case(3, 0, 0.1, budget=0.04, slope=slope)
    value, coefficients, _ = case.reference()
    result = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy)
    assert result.value == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-12, atol=1e-12)


def test_the_cases_reach_every_regime_in_every_stratum_and_channel():
    seen: dict[str, float] = {}  # over the very cases of the test above
    for seed in range(4):
        for scale in SCALES:
            for slope in (None, 0.1):
                case = make_case(3, seed, scale, budget=0.1 * scale, slope=slope)
                report = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy).report
                for name, value in report.metrics().items():
                    seen[name] = seen.get(name, 0.0) + value
    for stratum in ("domain", "prompt_group", "trajectory"):
        for channel in ("pos", "neg"):
            for regime in ("pass_through", "rollback", "zeroed"):
                assert seen[f"{stratum}/{channel}/{regime}"] > 0, f"{stratum}/{channel}/{regime}"
    assert seen["token/clipped"] > 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_coefficients_are_the_autograd_of_the_gated_log_ratio(depth: int):
    case = make_case(depth, 7, 0.1)
    cells = case.cells
    ell = case.log_ratio.clone().requires_grad_()
    gated = fpo.gated_log_ratio(ell, cells, case.hierarchy)
    torch.where(case.mask, case.weight * gated.exp(), 0.0).sum().backward()
    coefficients = fpo.token_coefficients(case.log_ratio, case.weight, cells, case.hierarchy)
    torch.testing.assert_close(ell.grad, coefficients, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("depth", DEPTHS)
def test_gated_log_ratio_passes_gradcheck(depth: int):
    case = make_case(depth, 3, 0.1, num=25)
    cells = case.cells
    away_from_ties = case.log_ratio + torch.where(case.log_ratio == 0, 1e-3, 0.0)
    leaf = away_from_ties.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fpo.gated_log_ratio(x, cells, case.hierarchy), [leaf], eps=1e-7)


def test_gated_log_ratio_refuses_a_second_derivative():
    case = make_case(1, 0)
    leaf = case.log_ratio.clone().requires_grad_()
    gated = fpo.gated_log_ratio(leaf, case.cells, case.hierarchy)
    (grad,) = torch.autograd.grad((gated**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        grad.sum().backward()


def test_a_stratum_switched_off_is_as_if_it_were_not_in_the_chain():
    case = make_case(3, 5)
    strata = case.hierarchy.strata
    off = fpo.Hierarchy((strata[0], fpo.Stratum("prompt_group", strata[1].budget, enabled=False), strata[2]), 0.04)
    short = fpo.Hierarchy((strata[0], strata[2]), 0.04)
    results = [
        fpo.token_coefficients(case.log_ratio, case.weight, h.cells(case.labels, case.mask), h) for h in (off, short)
    ]
    assert torch.equal(*results)
    _, coefficients, _ = Case(case.labels, case.mask, case.log_ratio, case.weight, off).reference()
    torch.testing.assert_close(results[0], coefficients, rtol=1e-12, atol=1e-12)


def test_all_strata_switched_off_leaves_the_token_clip():
    case = make_case(2, 1)
    off = fpo.Hierarchy(tuple(fpo.Stratum(s.name, s.budget, enabled=False) for s in case.hierarchy.strata), 0.04)
    cells = off.cells({}, case.mask)
    value, coefficients, gated = Case(case.labels, case.mask, case.log_ratio, case.weight, off).reference()
    result = fpo.surrogate(case.log_ratio, case.weight, cells, off)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(fpo.gated_log_ratio(case.log_ratio, cells, off), gated, rtol=0, atol=1e-15)
    assert result.value == pytest.approx(value, abs=1e-13)
    assert torch.equal(gated[case.mask], case.log_ratio[case.mask].clamp(-0.04, 0.04))


def test_a_single_token_cell_has_no_residual_and_only_the_aggregate_gate_acts():
    # T = 1: u = 0 and v = 0; C+ = 0.1, k = 1, ell = 0.15: g = 0.1 - (0.15 - 0.1) = 0.05, dL/d ell = -1
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)),), 1e-6)
    cells = hierarchy.cells({"trajectory": torch.tensor([0])})
    ell = torch.tensor([0.15], dtype=torch.float64, requires_grad=True)
    gated = fpo.gated_log_ratio(ell, cells, hierarchy)
    gated.sum().backward()
    assert gated.item() == pytest.approx(0.05, abs=1e-16)
    assert ell.grad is not None and ell.grad.item() == -1.0


def test_an_only_child_adds_exactly_nothing():
    case = make_case(1, 2, 0.1)
    strata = case.hierarchy.strata
    padded = fpo.Hierarchy((strata[0], fpo.Stratum("again", fpo.Budget(1e-9, 1e-9))), 0.04)
    labels = {"domain": case.labels["domain"], "again": case.labels["domain"] + 7}
    cells = padded.cells(labels, case.mask)
    one, two = (fpo.gated_log_ratio(case.log_ratio, *pair) for pair in ((case.cells, case.hierarchy), (cells, padded)))
    assert torch.equal(one, two)
    one = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy)
    two = fpo.token_coefficients(case.log_ratio, case.weight, cells, padded)
    torch.testing.assert_close(one, two, rtol=1e-14, atol=1e-15)


def test_property_5_3_trajectories_are_independent_with_one_stratum():
    case = make_case(1, 9, 0.2)
    changed = case.log_ratio.clone()
    other = case.labels["domain"] != case.labels["domain"][0]
    changed[other] *= 3.0
    cells = case.cells
    before, after = (fpo.token_coefficients(x, case.weight, cells, case.hierarchy) for x in (case.log_ratio, changed))
    assert torch.equal(before[~other], after[~other])
    assert not torch.equal(before[other], after[other])


def test_a_chain_is_block_diagonal_over_its_coarsest_cells():
    case = make_case(3, 9, 0.2)
    domain = case.labels["domain"]
    cells = case.cells
    one = torch.autograd.functional.jacobian(
        lambda x: fpo.gated_log_ratio(x, cells, case.hierarchy), case.log_ratio, vectorize=False
    )
    assert (one[domain[:, None] != domain[None, :]] == 0).all()
    group = case.labels["prompt_group"]
    coupled = (domain[:, None] == domain[None, :]) & (group[:, None] != group[None, :])
    assert (one[coupled] != 0).any()


def test_the_order_of_tokens_does_not_matter():
    case = make_case(3, 11, 0.2)
    order = torch.randperm(len(case.log_ratio), generator=torch.Generator().manual_seed(0))
    shuffled = {name: label[order] for name, label in case.labels.items()}
    cells = case.hierarchy.cells(shuffled, case.mask[order])
    expected = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy)[order]
    result = fpo.token_coefficients(case.log_ratio[order], case.weight[order], cells, case.hierarchy)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-14)


def test_budgets_can_be_overridden_for_a_named_cell():
    labels = {"domain": torch.tensor([0, 0, 1, 1])}
    ell = torch.tensor([0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    strata = (fpo.Stratum("domain", fpo.Budget(0.1, 0.1), budgets={"code": fpo.Budget(0.4, 0.4)}, slope=1.0),)
    hierarchy = fpo.Hierarchy(strata, 0.04)
    gated = fpo.gated_log_ratio(ell, hierarchy.cells(labels, names={"domain": ["math", "code"]}), hierarchy)
    # math: C* = 0.2 < 0.3, zeroed; code passes 0.3 through
    torch.testing.assert_close(gated, torch.tensor([0.0, 0.0, 0.3, 0.3], dtype=torch.float64), rtol=0, atol=1e-15)
