"""Cells below `min_tokens` are merged into their parents: values and gradients, by hand, ranks, report, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.diagnostics.regimes import LOCAL_REGIMES, named_regimes
from nemo_fiberpo.objective.report import empty_fields, make_report, merge
from tests.objective.cases import F64, PLACEMENTS, Case, branched_case, expert_case, with_floor
from tests.objective.checks import equals_the_slow_loops, is_one_process_on_ranks, is_the_identity_on_policy

KINDS = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
FLOORED = [name for name in PLACEMENTS if name != "P0"]


@KINDS
@pytest.mark.parametrize("placement", FLOORED)
@pytest.mark.parametrize(("seed", "floor", "scale", "slope"), [(0, 3, 0.06, 0.5), (2, 9, 0.15, None)])
def test_small_cells_equal_the_slow_loops(
    placement: str, seed: int, floor: int, scale: float, slope: float | None, soft: bool
):
    """Parents have merged children beside others, and merged cells have finer ones, merged and not."""
    equals_the_slow_loops(expert_case(placement, seed, scale, soft, slope, floor))


def test_the_cases_above_merge_some_cells_of_every_depth():
    for placement in FLOORED:
        reports = [expert_case(placement, seed, floor=floor).surrogate().report for seed, floor in ((0, 3), (2, 9))]
        merged = [[entry.merged for entry in report.strata] for report in reports]
        for at in range(1, len(merged[0]) - (placement == "P4")):
            assert any(0.0 < of_report[at][1] < 1.0 for of_report in merged), (placement, at)
        assert all(of_report[0] is None for of_report in merged)


def test_the_gradient_is_that_of_finite_differences():
    case = expert_case("P2", 1, 0.06, floor=4)
    cells = case.cells
    result = case.surrogate()
    for at in case.mask.nonzero().squeeze(1).tolist()[::4]:
        step = torch.zeros_like(case.log_ratio).index_fill(0, torch.tensor([at]), 1e-7)
        if case.log_ratio[at] == 0.0:
            continue  # between the channels
        up, down = (
            fpo.surrogate(case.log_ratio + sign * step, case.weight, cells, case.hierarchy).value for sign in (1, -1)
        )
        assert result.coefficients[at].item() == pytest.approx((up - down) / 2e-7, abs=1e-6)


FORMS = [
    "after",
    "after, swept three times",
    "beside the coarsest",
    "beside the coarsest, swept",
    "in two places",
    "a chain with a join",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("seed", "floor", "scale", "slope"), [(0, 4, 0.02, 0.5), (2, 7, 0.15, None)])
def test_small_cells_beside_branches_equal_the_slow_loops(
    form: str, seed: int, floor: int, scale: float, slope: float | None
):
    """A small cell takes nothing, so that what follows is measured from what its parent and branches have left."""
    case = branched_case(form, seed, scale, slope)
    case.hierarchy = with_floor(case.hierarchy, floor)
    result = equals_the_slow_loops(case)
    assert any(entry.merged and entry.merged[0] for entry in result.report.strata)


@pytest.mark.parametrize("form", FORMS)
def test_small_cells_beside_branches_on_policy_and_over_ranks(form: str):
    case = branched_case(form, 1)
    case.hierarchy = with_floor(case.hierarchy, 4)
    is_the_identity_on_policy(case)
    is_one_process_on_ranks(case, torch.arange(len(case.mask)) % 3, 3)


@KINDS
@pytest.mark.parametrize(("floor", "finest"), [(4, 4), (7, 7), (7, None)])
def test_a_stratum_missing_in_a_domain_may_have_a_floor_as_well(floor: int, finest: int | None, soft: bool):
    """Where the finest stratum is missing, and the trajectory is merged, it follows the trajectory's parent."""
    case = expert_case("P1", 4, 0.06, soft, floor=floor)
    strata = list(case.hierarchy.strata)
    strata[1] = replace(strata[1], only={"domain": ["math"]})
    strata[3] = replace(strata[3], only={"domain": ["code"]}, min_tokens=finest)
    case.hierarchy = replace(case.hierarchy, strata=tuple(strata))
    result = equals_the_slow_loops(case)
    assert [entry.merged is None for entry in result.report.strata] == [True, False, False, finest is None]
    of_trajectory = case.labels["trajectory"][case.mask & (case.labels["domain"] == 1)].unique(return_counts=True)[1]
    assert (floor == 7) == bool((of_trajectory < floor).any()), "no merged trajectory without a finer stratum"


def two_partitions(**kwargs: Any) -> fpo.Hierarchy:
    trajectory = fpo.Stratum("trajectory", fpo.Budget(0.3, 0.3), slope=2.0)
    both = fpo.Stratum("both", fpo.Budget(0.1, 0.1), join=("trajectory", "expert_partition"), slope=2.0, **kwargs)
    return fpo.Hierarchy((trajectory, both), 0.04)


def test_a_merged_token_by_hand():
    # One trajectory, partitions 0, 0, 0, 1; M+ = 0.2, M- = 0. Cell 0: M+ = 0.18, X+ = -0.02. The token of partition 1
    # has 0.26: alone in its cell it has X+ = 0.06 and no residual, L = 0.2 + 0.06; merged, a residual of 0.06, clipped
    # at 0.04
    labels = {"trajectory": torch.zeros(4, dtype=torch.int64), "expert_partition": torch.tensor([0, 0, 0, 1])}
    ell = torch.tensor([0.18, 0.18, 0.18, 0.26], dtype=F64)
    for floor, expected in ((None, 0.26), (2, 0.24)):
        hierarchy = two_partitions(min_tokens=floor)
        cells = hierarchy.cells(labels)
        out = fpo.gated_log_ratio(ell, cells, hierarchy)
        assert out.tolist() == pytest.approx([0.18, 0.18, 0.18, expected], abs=1e-15)
    metrics = fpo.surrogate(ell, torch.ones(4, dtype=F64), cells, hierarchy).report.metrics()
    assert metrics["both/cells"] == metrics["both/merged_cells"] == 1 and metrics["both/merged_tokens"] == 0.25
    assert metrics["both/pos/drift_mean"] == metrics["both/pos/drift_max"] == pytest.approx(0.02)
    assert "trajectory/merged_cells" not in metrics
    # c = 1/4 of what the merged token's saturated clip leaves out goes to the trajectory: y = exp(L)
    y = torch.tensor([0.18, 0.18, 0.18, 0.24], dtype=F64).exp()
    c = fpo.token_coefficients(ell, torch.ones(4, dtype=F64), cells, hierarchy)
    assert c.tolist() == pytest.approx([*(y[:3] + y[3] / 4).tolist(), (y[3] / 4).item()], abs=1e-14)


def test_small_is_what_is_small_over_all_ranks():
    hierarchy = two_partitions(min_tokens=4)
    labels = [([0, 0, 0, 1], [0, 0, 1, 0]), ([0, 0], [0, 0]), ([], [])]
    local = [
        hierarchy.cells({"trajectory": torch.tensor(t).long(), "expert_partition": torch.tensor(e).long()})
        for t, e in labels
    ]
    censuses = [held.census() for held in local]
    levels = [held.share(censuses, rank).level("both") for rank, held in enumerate(local)]
    # (0, 0) has 2 + 2 tokens; (0, 1) and (1, 0) have one each and are merged
    assert [level.acting_C.tolist() for level in levels] == [[True, False, False], [True], []]
    assert [level.owned_C.tolist() for level in levels] == [[True, False, False], [False], []]
    assert all(level.merged == (2, 2.0) and level.num_cells == 3 and level.num_acting == 1 for level in levels)
    # one process by itself counts its own tokens: no cell of (0, 0) with 4
    assert local[0].level("both").merged == (3, 4.0) and local[0].level("both").acting_C.sum() == 0
    with pytest.raises(ValueError, match="stratum 'both' was built with min_tokens 4, but it is 2"):
        fpo.gated_log_ratio(torch.zeros(4), local[0], two_partitions(min_tokens=2))


@KINDS
@pytest.mark.parametrize("placement", FLOORED)
def test_a_floor_that_nothing_is_below_changes_nothing(placement: str, soft: bool):
    case = expert_case(placement, 5, 0.06, soft)
    case.labels |= {name: case.labels[name] // 4 for name in ("domain", "prompt_group", "trajectory")}
    assert min(float(level.count_C.min()) for level in case.cells.shared.levels) >= 2.0
    one, other = case.surrogate(), replace(case, hierarchy=with_floor(case.hierarchy, 2)).surrogate()
    assert other.value == one.value and torch.equal(other.coefficients, one.coefficients)
    assert all(entry.merged in (None, (0, 0.0)) for entry in other.report.strata)


@KINDS
@pytest.mark.parametrize("placement", FLOORED)
def test_a_floor_above_all_cells_is_a_stratum_switched_off(placement: str, soft: bool):
    case = expert_case(placement, 6, 0.06, soft)
    *coarser, finest = case.hierarchy.strata
    one, other = (
        replace(case, hierarchy=replace(case.hierarchy, strata=(*coarser, changed))).surrogate()
        for changed in (replace(finest, min_tokens=len(case.mask) + 1), replace(finest, enabled=False))
    )
    assert one.value == pytest.approx(other.value, abs=1e-14)
    torch.testing.assert_close(one.coefficients, other.coefficients, rtol=1e-13, atol=1e-14)
    entry = next(entry for entry in one.report.strata if entry.name == finest.name)
    assert entry.cells == 0 and entry.merged is not None and entry.merged[1] == 1.0
    assert all(value == 0.0 for value in (*entry.regimes.values(), *entry.divergence.values()))


@KINDS
def test_parts_of_a_step_that_share_no_cell_merge_into_the_report_of_the_whole(soft: bool):
    """What the one-pass step does with its micro-batches; a domain is in one of them, so all its cells are."""
    case = expert_case("P1", 7, 0.08, soft, floor=4)
    case.labels["domain"] = case.labels["trajectory"] // 4
    whole, fields = case.surrogate(), []
    for domain in (0, 1):
        at = (case.labels["domain"] == domain).nonzero().squeeze(1)
        result = case.part(at).surrogate()
        fields.append(result.fields)
        torch.testing.assert_close(result.coefficients, whole.coefficients[at], rtol=1e-12, atol=1e-13)
    cells = case.cells.shared
    value, merged = make_report(merge(fields, empty_fields(cells)), cells)
    assert value == pytest.approx(whole.value, abs=1e-13)
    assert merged.metrics() == pytest.approx(whole.report.metrics(), abs=1e-12)


@KINDS
def test_regimes_leave_merged_cells_out_and_other_objectives_do_not_see_the_floor(soft: bool):
    case, plain = (expert_case("P1", 3, 0.1, soft, floor=floor) for floor in (4, None))
    entries = case.surrogate().report.strata
    for entry, regimes in zip(entries, named_regimes(case.log_ratio, case.cells, case.hierarchy), strict=True):
        assert entry.cells == sum(regimes.counts()[name] for name in LOCAL_REGIMES)
    gating = fpo.Gspo(0.05, 0.05)
    one, other = case.surrogate(gating=gating), plain.surrogate(gating=gating)
    assert one.value == other.value and torch.equal(one.coefficients, other.coefficients)
    weights = [fpo.token_weights(c.cells) for c in (case, plain)]
    assert torch.equal(*weights)


REFUSALS = [
    ("strata", 0, r"strata\[0\]\.min_tokens: 'domain' is the coarsest active stratum"),
    ("branches", 0, r"branches\[0\]\.min_tokens: a branch has no parent"),
]


@pytest.mark.parametrize(("kind", "at", "message"), REFUSALS)
def test_a_floor_without_a_parent_is_refused(kind: str, at: int, message: str):
    hierarchy = expert_case("P4", 0).hierarchy
    entries = list(getattr(hierarchy, kind))
    entries[at] = replace(entries[at], min_tokens=4)
    with pytest.raises(ValueError, match=message):
        replace(hierarchy, **{kind: tuple(entries)})


def test_a_floor_is_refused_where_switching_off_makes_its_stratum_the_coarsest():
    case: Case = expert_case("P1", 0, floor=4)
    first, *finer = case.hierarchy.strata
    with pytest.raises(ValueError, match=r"strata\[1\]\.min_tokens: 'prompt_group' is the coarsest active stratum"):
        replace(case.hierarchy, strata=(replace(first, enabled=False), *finer))
    replace(case.hierarchy, strata=(first, replace(finer[0], enabled=False), *finer[1:]))


@pytest.mark.parametrize("floor", [1, 0, -3, 2.5, True, "4"])
def test_a_floor_is_a_whole_number_of_at_least_2(floor: Any):
    with pytest.raises(ValueError, match=r"^min_tokens: must be a whole number of at least 2, got "):
        two_partitions(min_tokens=floor)


def test_describe_says_what_is_merged():
    assert "cells below 16 tokens merged" in two_partitions(min_tokens=16).describe()
