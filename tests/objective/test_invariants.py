"""The invariants: identity on-policy, masked tokens, extreme and non-finite input, precision, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_fiberpo as fpo
from tests.objective.cases import F64, make_case, make_hierarchy
from tests.objective.checks import ignores_masked_tokens, is_the_identity_on_policy


@pytest.mark.parametrize("depth", (1, 2, 3, 4))
def test_on_policy_the_jacobian_is_the_identity_to_the_bit(depth: int):
    case = make_case(depth, 1)
    is_the_identity_on_policy(case)
    minus_zero = fpo.token_coefficients(torch.full_like(case.weight, -0.0), case.weight, case.cells, case.hierarchy)
    assert torch.equal(minus_zero, fpo.on_policy_coefficients(case.weight, case.cells))


@pytest.mark.parametrize("depth", (1, 3))
def test_log_rhat_equals_the_log_ratio_until_something_saturates(depth: int):
    case = make_case(depth, 2, 1e-3, budget=0.2)
    cells = case.cells
    gated = fpo.gated_log_ratio(case.log_ratio, cells, case.hierarchy)
    expected = torch.where(case.mask, case.log_ratio, 0.0)
    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-16)
    coefficients = fpo.token_coefficients(case.log_ratio, case.weight, cells, case.hierarchy)
    torch.testing.assert_close(
        coefficients, torch.where(case.mask, case.weight * expected.exp(), 0.0), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30, -7.0])
@pytest.mark.parametrize("shape", [None, (4, 10)])
def test_masked_tokens_change_no_bit(bad: float, shape: tuple[int, int] | None):
    case = make_case(3, 4)
    if shape:
        row = torch.arange(40) // 10
        case.labels = {"domain": row // 4, "prompt_group": row // 2, "trajectory": row}
    ignores_masked_tokens(case, bad, shape)


def test_masked_labels_may_break_the_nesting():
    hierarchy = make_hierarchy(2)
    labels = {"domain": torch.tensor([0, 0, 1]), "prompt_group": torch.tensor([5, 5, 5])}
    cells = hierarchy.cells(labels, torch.tensor([True, True, False]))
    assert cells.num_cells("domain") == 1


def test_all_tokens_masked_and_no_tokens_at_all():
    hierarchy = make_hierarchy(2)
    for num in (0, 3):
        labels = {name: torch.zeros(num, dtype=torch.int64) for name in ("domain", "prompt_group")}
        cells = hierarchy.cells(labels, torch.zeros(num, dtype=torch.bool))
        result = fpo.surrogate(torch.full((num,), math.nan), torch.full((num,), math.inf), cells, hierarchy)
        assert torch.equal(result.coefficients, torch.zeros(num)) and result.value == 0.0
        assert all(math.isfinite(value) for value in result.report.metrics().values())
        assert fpo.token_weights(cells, stratum="domain").tolist() == [0.0] * num


@pytest.mark.parametrize("huge", [1e4, -1e4, 3e38, -3e38])
@pytest.mark.parametrize("depth", (1, 3))
def test_huge_log_ratios_give_finite_results(huge: float, depth: int):
    case = make_case(depth, 6)
    ell = case.log_ratio.float()
    ell[1:20:3] = huge
    result = fpo.surrogate(ell, case.weight.float(), case.cells, case.hierarchy)
    assert math.isfinite(result.value) and torch.isfinite(result.coefficients).all()
    leaf = ell.clone().requires_grad_()
    gated = fpo.gated_log_ratio(leaf, case.cells, case.hierarchy)
    gated.sum().backward()
    assert torch.isfinite(gated).all() and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("field", ["log_ratio", "weighted_advantage"])
@pytest.mark.parametrize("half", [False, True])
def test_non_finite_live_tokens_are_refused_by_sample_and_position(bad: float, field: str, half: bool):
    hierarchy = make_hierarchy(1)
    ell, weight = torch.zeros(2, 12), torch.zeros(2, 12)
    (ell if field == "log_ratio" else weight)[1, 2] = bad
    if half:
        ell, weight = ell.bfloat16(), weight.bfloat16()
    labels = {"domain": torch.arange(2).repeat_interleave(12)}
    args = ell.view(-1), weight.view(-1)
    with pytest.raises(ValueError, match=rf"{field}: .* live token, sample 1, token position 2; 1 such"):
        fpo.surrogate(*args, hierarchy.cells(labels, shape=(2, 12)), hierarchy)
    with pytest.raises(ValueError, match=rf"{field}: .* live token, token 14 of the flat batch"):
        fpo.token_coefficients(*args, hierarchy.cells(labels), hierarchy)
    if field == "log_ratio":
        with pytest.raises(ValueError, match=r"log_ratio: .* sample 1, token position 2"):
            fpo.gated_log_ratio(args[0], hierarchy.cells(labels, shape=(2, 12)), hierarchy)
    else:
        with pytest.raises(ValueError, match=r"weighted_advantage: .* sample 1, token position 2"):
            fpo.on_policy_coefficients(args[1], hierarchy.cells(labels, shape=(2, 12)))


def test_non_finite_is_refused_where_no_stratum_is_active():
    hierarchy = fpo.Hierarchy((fpo.Stratum("domain", fpo.Budget(1, 1), enabled=False),), 0.1)
    cells = hierarchy.cells({}, shape=(1, 2))
    with pytest.raises(ValueError, match=r"log_ratio: nan on a live token, sample 0, token position 1"):
        fpo.token_coefficients(torch.tensor([0.0, math.nan]), torch.zeros(2), cells, hierarchy)


def test_wrong_tensors_are_refused_by_name():
    case = make_case(2, 0)
    cells, ell, weight = case.cells, case.log_ratio, case.weight
    with pytest.raises(ValueError, match=r"log_ratio: must have shape \[40\]"):
        fpo.token_coefficients(ell[:-1], weight, cells, case.hierarchy)
    with pytest.raises(ValueError, match=r"weighted_advantage: must have shape \[40\]"):
        fpo.token_coefficients(ell, weight.view(4, 10), cells, case.hierarchy)
    with pytest.raises(ValueError, match=r"log_ratio: must be a floating-point tensor"):
        fpo.gated_log_ratio(ell.long(), cells, case.hierarchy)
    with pytest.raises(ValueError, match=r"cells: built for the strata .*'prompt_group'"):
        fpo.gated_log_ratio(ell, cells, make_hierarchy(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_float64_and_keeps_its_dtype(dtype: torch.dtype):
    case = make_case(3, 8, 0.1)
    ell, weight = case.log_ratio.to(dtype), case.weight.to(dtype)
    result = fpo.token_coefficients(ell, weight, case.cells, case.hierarchy)
    exact = fpo.token_coefficients(ell.double(), weight.double(), case.cells, case.hierarchy)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


def test_float32_input_resolves_the_rollback_window_of_a_slope_of_a_million():
    # C = 0.05, k = 1e6: the window is 5e-8 wide, about 13 float32 ulps; float64 aggregates place a cell inside it
    hierarchy = fpo.Hierarchy((fpo.Stratum("domain", fpo.Budget(0.05, 0.05), slope=1e6),), 0.5)
    cells = hierarchy.cells({"domain": torch.zeros(4096, dtype=torch.int64)})
    ell = 0.05 + 0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    ell = ell.clamp_min(1e-3)
    ell += (0.05 + 2.5e-8 - ell.double().mean()).float()
    for _ in range(20):  # single tokens move the mean by their float32 rounding over 4096
        ell[0] += ((0.05 + 2.5e-8 - ell.double().mean()) * 4096).float()
    drift = float(ell.double().mean())
    assert 0.05 < drift < 0.05 + 5e-8
    report = fpo.surrogate(ell, torch.ones(4096), cells, hierarchy).report.metrics()
    assert report["domain/pos/rollback"] == 1.0
    gated = fpo.gated_log_ratio(ell, cells, hierarchy).double()
    base = (gated - (ell.double() - drift)).mean()
    assert float(base) == pytest.approx(0.05 - 1e6 * (drift - 0.05), abs=1e-6)


def test_inputs_are_left_alone_and_outputs_carry_no_graph():
    case = make_case(2, 3)
    cells = case.hierarchy.cells(case.labels)
    ell, weight = case.log_ratio.clone().requires_grad_(), case.weight.clone()
    coefficients = fpo.surrogate(ell, weight, cells, case.hierarchy).coefficients
    assert torch.equal(ell, case.log_ratio) and torch.equal(weight, case.weight)
    assert not coefficients.requires_grad
    incoming = torch.randn(40, dtype=F64)
    kept = incoming.clone()
    fpo.gated_log_ratio(ell, cells, case.hierarchy).backward(incoming)
    assert torch.equal(incoming, kept) and torch.equal(ell, case.log_ratio)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    depth=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1e-4, 0.02, 0.1, 1.0]),
    rows=st.integers(1, 6),
    length=st.sampled_from([1, 3, 32, 50]),
    masked=st.booleans(),
)
def test_rows_and_scattered_tokens_give_one_answer(
    depth: int, seed: int, scale: float, rows: int, length: int, masked: bool
):
    generator = torch.Generator().manual_seed(seed)
    trajectory_R = torch.randint(0, rows, (rows,), generator=generator)
    names = ("domain", "prompt_group", "trajectory", "segment")[:depth]
    labels = {n: (trajectory_R // 2 ** (depth - 1 - i)).repeat_interleave(length) for i, n in enumerate(names)}
    num = rows * length
    mask = torch.rand(num, generator=generator) > 0.4 if masked else None
    ell = scale * torch.randn(num, generator=generator, dtype=F64)
    weight = torch.randn(num, generator=generator, dtype=F64)
    hierarchy = make_hierarchy(depth)
    order = torch.randperm(num, generator=generator)
    scattered = hierarchy.cells({n: v[order] for n, v in labels.items()}, None if mask is None else mask[order])
    expected = fpo.surrogate(ell[order], weight[order], scattered, hierarchy)
    for shape in ((rows, length), None):
        cells = hierarchy.cells(labels, mask, shape=shape)
        result = fpo.surrogate(ell, weight, cells, hierarchy)
        torch.testing.assert_close(result.coefficients[order], expected.coefficients, rtol=1e-10, atol=1e-12)
        assert result.value == pytest.approx(expected.value, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("shape", [None, (2, 3)])
def test_a_rank_whose_tokens_are_all_masked_has_coefficients_of_zero(shape):
    hierarchy = fpo.load_hierarchy(
        {
            "token_clip": 0.1,
            "strata": [{"name": name, "budget": {"pos": 1, "neg": 1}} for name in ("domain", "trajectory")],
        }
    )
    labels = {"domain": torch.zeros(6, dtype=torch.int64), "trajectory": torch.arange(6) // 3}
    cells = hierarchy.cells(labels, torch.zeros(6, dtype=torch.bool), shape=shape)
    log_ratio = torch.full((6,), float("nan"), dtype=torch.float64)
    assert fpo.token_coefficients(log_ratio, log_ratio, cells, hierarchy).tolist() == [0.0] * 6
    assert fpo.gated_log_ratio(log_ratio, cells, hierarchy).tolist() == [0.0] * 6
