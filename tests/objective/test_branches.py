"""Branches over the same tokens: sweeps and back-fitting against slow loops, J = I, ranks, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.report import empty_fields, make_report, merge
from tests.objective.cases import DOMAIN, EXPERT, F64, FORMS, TRAJECTORY, branched_case, stratum
from tests.objective.checks import (
    equals_the_slow_loops,
    ignores_masked_tokens,
    is_one_process_on_ranks,
    is_the_identity_on_policy,
)
from tests.objective.ranks import on_ranks

NUM = 40


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("seed", "scale", "slope"), [(0, 0.01, 0.5), (1, 0.05, 0.5), (2, 0.15, None)])
def test_value_and_adjoint_equal_the_slow_loops(form: str, seed: int, scale: float, slope: float | None):
    equals_the_slow_loops(branched_case(form, seed, scale, slope))


def test_the_cases_above_have_every_regime_and_every_clip():
    seen: dict[str, float] = {}
    for seed, (scale, slope) in itertools.product(range(3), [(0.05, 0.5), (0.15, None)]):
        case = branched_case("in two places", seed, scale, slope)
        report = case.surrogate().report
        for entry in report.strata:
            kind = "branch" if entry.name in ("expert", "modality") else "chain"
            for channel, figures in entry.channels.items():
                for regime in ("pass_through", "rollback", "zeroed"):
                    key = f"{kind} {channel} {regime}"
                    seen[key] = max(seen.get(key, 0.0), getattr(figures, regime))
        seen["clipped"] = max(seen.get("clipped", 0.0), report.clipped)
    assert len(seen) == 13 and all(share > 0 for share in seen.values()), seen


@pytest.mark.parametrize("form", FORMS)
def test_on_policy_the_jacobian_is_the_identity_to_the_bit(form: str):
    is_the_identity_on_policy(branched_case(form, 1))


@pytest.mark.parametrize("form", FORMS)
def test_log_rhat_is_the_log_ratio_until_something_saturates(form: str):
    case = branched_case(form, 2, 1e-4)
    gated = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)
    torch.testing.assert_close(gated, torch.where(case.mask, case.log_ratio, 0.0), rtol=0, atol=1e-17)


@pytest.mark.parametrize("form", FORMS)
def test_any_split_over_ranks_gives_the_single_process_result(form: str):
    """The last rank has no tokens."""
    rank_T = torch.randint(0, 2, (NUM,), generator=torch.Generator().manual_seed(3))
    is_one_process_on_ranks(branched_case(form, 5), rank_T, 3)


def test_the_number_of_reductions_by_hand():
    expected = {
        "after": 4,
        "after, swept three times": 12,
        "two after": 12,
        "beside the coarsest": 6,
        "beside the coarsest, swept": 14,
        "in two places": 16,
        "two classifications alone": 8,
        "a chain with a join": 4,
    }
    for form, (chain, branches, sweeps) in FORMS.items():
        assert fpo.Hierarchy(chain, 0.1, branches, sweeps).num_reductions == expected[form]
    assert fpo.Hierarchy((DOMAIN,), 0.1).num_reductions == 2
    assert fpo.Hierarchy((replace(DOMAIN, enabled=False),), 0.1).num_reductions == 2
    # chain 0 1 2, branch 3 beside 2, branch 4 beside 0; the part of the chain is extracted again before each sweep
    chain, branches, sweeps = FORMS["in two places"]
    stages = fpo.Hierarchy(chain, 0.1, branches, sweeps).stages
    visited = [stages.forests[visit] for visit in stages.visits]
    ends = [(0, 1), (4, 5), (0, 1), (4, 5), (1, 3), (3, 4), (1, 3), (3, 4)]
    assert visited == [range(*pair) for pair in ends]


def test_without_branches_nothing_changes_to_the_bit():
    case = branched_case("after", 3, 0.1)
    plain = replace(case, hierarchy=fpo.Hierarchy(case.hierarchy.strata, 0.04))
    off = replace(case, hierarchy=fpo.Hierarchy(case.hierarchy.strata, 0.04, (replace(EXPERT, enabled=False),), 2))
    one, other = plain.surrogate(), off.surrogate()
    assert one.value == other.value and torch.equal(one.coefficients, other.coefficients)
    # a branch of one cell finds nothing left after the chain
    of_one = replace(plain.hierarchy, branches=(replace(EXPERT, name="all", slope=None),))
    labels = {**case.labels, "all": torch.zeros(NUM, dtype=torch.int64)}
    result = replace(case, labels=labels, hierarchy=of_one).surrogate()
    torch.testing.assert_close(result.coefficients, one.coefficients, rtol=1e-12, atol=1e-14)
    assert result.report.strata[-1].channels["pos"].drift_max < 1e-16


def test_a_branch_by_hand():
    # domains {0, 1} and {2, 3}, modalities {0, 2} and {1, 3}; ell >= 0 throughout
    ell = torch.tensor([0.04, 0.0, 0.06, 0.02], dtype=F64)
    labels = {"domain": torch.tensor([0, 0, 1, 1]), "modality": torch.tensor([0, 1, 0, 1])}
    hierarchy = fpo.Hierarchy((stratum("domain", 1.0),), 1.0, (stratum("modality", 0.01, slope=1.0),))
    cells = hierarchy.cells(labels)
    report = fpo.surrogate(ell, torch.ones(4, dtype=F64), cells, hierarchy).report
    # domain means 0.02 and 0.04; left +-0.02 everywhere, which is the modalities' means: beyond 0.01, zeroed from 0.02
    assert [entry.channels["pos"].drift_max for entry in report.strata] == pytest.approx([0.04, 0.02])
    assert report.strata[1].channels["pos"].budget_used_max == pytest.approx(2.0)
    gated = fpo.gated_log_ratio(ell, cells, replace(hierarchy, branches=(stratum("modality", 0.015, slope=1.0),)))
    expected = torch.tensor([0.02 + 0.01, 0.02 - 0.01, 0.04 + 0.01, 0.04 - 0.01], dtype=F64)  # 2 C - |X| = 0.01
    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-16)


def test_drift_of_a_domain_that_coincides_with_a_partition_is_counted_once():
    case = branched_case("after", 4)
    case.labels["expert"] = case.labels["domain"]
    case.log_ratio = torch.where(case.labels["domain"] == 0, 0.02, -0.01).to(F64)
    report = case.surrogate().report
    by_name = {entry.name: entry for entry in report.strata}
    assert by_name["domain"].channels["pos"].drift_max == pytest.approx(0.02)
    assert by_name["expert"].channels["pos"].drift_max < 1e-16
    assert by_name["expert"].channels["neg"].drift_max < 1e-16
    assert report.clipped == 0.0


def leak(sweeps: int) -> float:
    """What is left of a drift that is the sum of one of domains and one of experts: 0 for a joint projection."""
    case = branched_case("after, swept three times", 6)
    drift = torch.tensor([0.03, 0.05], dtype=F64)[case.labels["domain"]]
    drift += torch.tensor([0.02, 0.05, 0.08], dtype=F64)[case.labels["expert"]]
    wide = [replace(s, budget=fpo.Budget(10, 10)) for s in (*case.hierarchy.strata, *case.hierarchy.branches)]
    # the token clip passes nothing, so L is the sum of what the strata have taken
    hierarchy = fpo.Hierarchy(tuple(wide[:-1]), 1e-300, tuple(wide[-1:]), sweeps)
    return float((drift - fpo.gated_log_ratio(drift, hierarchy.cells(case.labels), hierarchy)).abs().max())


def test_back_fitting_converges_geometrically_to_the_joint_projection():
    left = [leak(sweeps) for sweeps in (1, 2, 3, 4, 8, 40)]
    assert left[0] > 1e-3 and left[-1] < 1e-15
    rates = [after / before for before, after in itertools.pairwise(left[:4])]
    assert all(0.0 < rate < 0.7 for rate in rates) and left[4] < left[3] * 1.1 * rates[-1] ** 4


def test_finer_strata_leave_nothing_of_a_branch_beside_a_coarser_one():
    """Trajectories refine modalities, so the token clip acts beyond the trajectory's mean, with one sweep already."""
    case = branched_case("beside the coarsest", 7)
    drift = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=F64).abs()
    case.log_ratio, case.mask = drift[case.labels["trajectory"]], torch.ones(NUM, dtype=torch.bool)
    assert case.surrogate().report.clipped == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan, -7.0])
@pytest.mark.parametrize("rows", [False, True])
def test_masked_tokens_change_no_bit(bad: float, rows: bool):
    case = branched_case("in two places", 8)
    if rows:
        row = torch.arange(NUM) // 10
        labels = {"domain": row // 2, "prompt_group": row, "trajectory": row, "modality": row % 2, "expert": row // 3}
        case = replace(case, labels=labels)
    ignores_masked_tokens(case, bad, (4, 10) if rows else None)


def test_rows_of_one_cell_give_the_result_of_scattered_tokens():
    case = branched_case("beside the coarsest, swept", 9)
    row = torch.arange(NUM) // 10
    case.labels = {"domain": row // 2, "prompt_group": row, "trajectory": row, "modality": row % 2}
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(0))
    cells = case.hierarchy.cells(case.labels, case.mask, shape=(4, 10))
    for name, label in case.labels.items():
        level = cells.level(name)
        assert torch.equal(level.label_C[cells.cell_per_token(name)][case.mask], label[case.mask])
    one = fpo.token_coefficients(case.log_ratio, case.weight, cells, case.hierarchy)
    torch.testing.assert_close(case.part(order).surrogate().coefficients, one[order], rtol=1e-12, atol=1e-14)


def test_no_live_tokens_and_weights_of_trajectories():
    case = branched_case("in two places", 10)
    nothing = replace(case, mask=torch.zeros(NUM, dtype=torch.bool)).surrogate()
    assert nothing.value == 0.0 and (nothing.coefficients == 0).all()
    plain = fpo.Hierarchy(case.hierarchy.strata, 0.04).cells(case.labels, case.mask)
    assert torch.equal(fpo.token_weights(case.cells), fpo.token_weights(plain))
    half = fpo.token_coefficients(case.log_ratio.half(), case.weight.half(), case.cells, case.hierarchy)
    assert half.dtype == torch.float16


def test_cells_of_another_order_of_extraction_are_refused():
    case = branched_case("after, swept three times", 1)
    with pytest.raises(ValueError, match="cells: built for a hierarchy with other branches"):
        fpo.surrogate(case.log_ratio, case.weight, case.cells, replace(case.hierarchy, sweeps=2))
    nested = fpo.Hierarchy((DOMAIN, TRAJECTORY, stratum("expert")), 0.04)
    with pytest.raises(ValueError, match="cells: built for a hierarchy with other branches"):
        fpo.surrogate(case.log_ratio, case.weight, case.cells, nested)


def test_reports_of_parts_that_share_no_cell_merge_into_that_of_the_whole():
    case = branched_case("in two places", 12)
    half = torch.arange(NUM) < NUM // 2
    case.labels = {name: label + 10 * half for name, label in case.labels.items()}
    one, parts = case.surrogate(), [case.part(at).surrogate() for at in (half, ~half)]
    whole = case.cells.shared
    value, merged = make_report(merge([part.fields for part in parts], empty_fields(whole)), whole)
    assert value == pytest.approx(one.value, abs=1e-13)
    assert merged.metrics() == pytest.approx(one.report.metrics(), abs=1e-13)
    for at, part in zip((half, ~half), parts, strict=True):
        torch.testing.assert_close(part.coefficients, one.coefficients[at], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("field", ["log_ratio", "weighted_advantage"])
def test_non_finite_input_is_refused_after_the_first_reduction(field: str):
    case = branched_case("after", 11)
    value = (case.log_ratio if field == "log_ratio" else case.weight).clone()
    value[case.mask.nonzero()[3]] = math.nan
    given = {"log_ratio": case.log_ratio, "weighted_advantage": case.weight} | {field: value}

    def work(rank, reduce):
        return fpo.surrogate(**given, cells=case.cells, hierarchy=case.hierarchy, reduce=reduce)

    results, meeting = on_ranks(1, work)
    assert isinstance(results[0], ValueError) and f"{field}: nan on a live token" in str(results[0])
    assert [len(sizes) for sizes in meeting.sizes] == [1]
