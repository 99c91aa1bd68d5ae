"""Branches over the same tokens: sweeps and back-fitting against slow loops, J = I, ranks, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from nemo_fiberpo.objective.branches import BranchedCells, plan_visits
from nemo_fiberpo.objective.drift import measure
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.fibration import gate_cells
from nemo_fiberpo.objective.report import make_report, merge_parts
from tests.objective import branch_reference, cases, reference
from tests.objective.ranks import on_ranks

F64 = torch.float64
NUM = 40


def stratum(name: str, pos: float, **kwargs: Any) -> fpo.Stratum:
    return fpo.Stratum(name, fpo.Budget(pos, 0.7 * pos), **kwargs)


DOMAIN, GROUP, TRAJECTORY = stratum("domain", 0.03), stratum("prompt_group", 0.05), stratum("trajectory", 0.08)
# an expert per token, and a modality per prompt: the one is no function of the trajectory, the other is
EXPERT, MODALITY = stratum("expert", 0.02, slope=2.5), stratum("modality", 0.02)
FORMS = {
    "after": ((DOMAIN, GROUP, TRAJECTORY), (EXPERT,), 1),
    "after, swept three times": ((DOMAIN, TRAJECTORY), (EXPERT,), 3),
    "two after": ((DOMAIN, TRAJECTORY), (EXPERT, stratum("parity", 0.03)), 2),
    "beside the coarsest": ((DOMAIN, GROUP, TRAJECTORY), (replace(MODALITY, beside="domain"),), 1),
    "beside the coarsest, swept": ((DOMAIN, GROUP, TRAJECTORY), (replace(MODALITY, beside="domain"),), 3),
    "in two places": ((DOMAIN, GROUP, TRAJECTORY), (EXPERT, replace(MODALITY, beside="domain")), 2),
    "two classifications alone": ((DOMAIN,), (MODALITY,), 2),
    "a chain with a join": ((DOMAIN, stratum("both", 0.04, join=("domain", "modality")), TRAJECTORY), (EXPERT,), 1),
}


class Case(cases.Case):
    def reference(self) -> tuple[float, Tensor, Tensor]:
        """(J, coefficients, gated log-ratios) by the slow loops."""

        def level(stratum: fpo.Stratum) -> reference.Level:
            columns = [self.labels[name].tolist() for name in stratum.join or (stratum.name,)]
            known: dict[tuple[int, ...], int] = {}
            cell = [known.setdefault(entry, len(known)) for entry in zip(*columns, strict=True)]
            pair, slope = (stratum.budget.pos, stratum.budget.neg), stratum.slope
            return reference.Level(
                cell,
                lambda _: pair,
                lambda _, count: float(count if slope is None else slope),  # type: ignore[arg-type]
                stratum.min_tokens or 0,
            )

        chain = [level(stratum) for stratum in self.hierarchy.strata]
        names = [stratum.name for stratum in self.hierarchy.strata]
        branches = [(level(b), names.index(b.beside or names[-1])) for b in self.hierarchy.branches]
        value, coefficients, gated = branch_reference.objective(
            self.log_ratio.tolist(),
            self.weight.tolist(),
            self.mask.tolist(),
            chain,
            branches,
            self.hierarchy.sweeps,
            self.hierarchy.token_clip,
        )
        return value, torch.tensor(coefficients, dtype=F64), torch.tensor(gated, dtype=F64)


def make_case(form: str, seed: int, scale: float = 0.05, slope: float | None = 0.5) -> Case:
    """Scattered tokens, some masked, some at 0; trajectories, modalities and experts drift as wholes too."""
    generator = torch.Generator().manual_seed(seed)
    trajectory = torch.randint(0, 8, (NUM,), generator=generator)
    group = trajectory // 2
    labels = {
        "domain": group // 2,
        "prompt_group": group,
        "trajectory": trajectory,
        "modality": torch.tensor([0, 1, 1, 2])[group],
        "expert": torch.randint(0, 3, (NUM,), generator=generator),
        "parity": torch.arange(NUM) % 2,
    }
    ell = scale * torch.randn(NUM, generator=generator, dtype=F64)
    for name in ("trajectory", "modality", "expert"):
        ell += scale * torch.randn(8, generator=generator, dtype=F64)[labels[name]]
    ell[::9] = 0.0
    mask = torch.rand(NUM, generator=generator) > 0.2
    weight = torch.randn(NUM, generator=generator, dtype=F64)
    chain, branches, sweeps = FORMS[form]
    chain = tuple(replace(stratum, slope=stratum.slope or slope) for stratum in chain)
    return Case(labels, mask, ell, weight, fpo.Hierarchy(chain, 0.04, branches, sweeps))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scale", "slope"), [(0.01, 0.5), (0.05, 0.5), (0.15, None)])
def test_value_and_adjoint_equal_the_slow_loops(form: str, seed: int, scale: float, slope: float | None):
    case = make_case(form, seed, scale, slope)
    value, coefficients, gated = case.reference()
    result = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy)
    assert result.value == pytest.approx(value, abs=1e-13)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-12, atol=1e-12)
    leaf = case.log_ratio.clone().requires_grad_()
    out = fpo.gated_log_ratio(leaf, case.cells, case.hierarchy)
    torch.testing.assert_close(out.detach(), gated, rtol=0, atol=1e-14)
    torch.where(case.mask, case.weight * out.exp(), 0.0).sum().backward()
    torch.testing.assert_close(leaf.grad, coefficients, rtol=1e-12, atol=1e-12)


def test_the_cases_above_have_every_regime_and_every_clip():
    seen: dict[str, float] = {}
    for seed, (scale, slope) in itertools.product(range(3), [(0.05, 0.5), (0.15, None)]):
        case = make_case("in two places", seed, scale, slope)
        gates = gate_cells(measure(case.log_ratio, case.cells), case.cells, case.hierarchy)
        seen["the other channel's clip"] = max(seen.get("the other channel's clip", 0.0), float(gates.crossed))
        report = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy).report
        for entry in report.strata:
            kind = "branch" if entry.name in ("expert", "modality") else "chain"
            for channel, figures in entry.channels.items():
                for regime in ("pass_through", "rollback", "zeroed"):
                    key = f"{kind} {channel} {regime}"
                    seen[key] = max(seen.get(key, 0.0), getattr(figures, regime))
        seen["clipped"] = max(seen.get("clipped", 0.0), report.clipped)
    assert len(seen) == 14 and all(share > 0 for share in seen.values()), seen


@pytest.mark.parametrize("form", FORMS)
def test_on_policy_the_jacobian_is_the_identity_to_the_bit(form: str):
    case = make_case(form, 1)
    cells, ell = case.cells, torch.zeros(NUM, dtype=F64)
    coefficients = fpo.token_coefficients(ell, case.weight, cells, case.hierarchy)
    assert torch.equal(coefficients, fpo.on_policy_coefficients(case.weight, cells))
    jacobian = torch.autograd.functional.jacobian(lambda x: fpo.gated_log_ratio(x, cells, case.hierarchy), ell)
    assert torch.equal(jacobian, torch.diag(case.mask.to(F64)))


@pytest.mark.parametrize("form", FORMS)
def test_log_rhat_is_the_log_ratio_until_something_saturates(form: str):
    case = make_case(form, 2, 1e-4)
    gated = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)
    torch.testing.assert_close(gated, torch.where(case.mask, case.log_ratio, 0.0), rtol=0, atol=1e-17)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", (2, 3))
def test_any_split_over_ranks_gives_the_single_process_result(form: str, world_size: int):
    case = make_case(form, 5, 0.05)
    generator = torch.Generator().manual_seed(world_size)
    part = torch.randint(0, world_size, (NUM,), generator=generator)
    ranks = world_size + 1  # the last rank has no tokens
    tokens = [(part == rank).nonzero().squeeze(1) for rank in range(ranks)]
    local = [
        case.hierarchy.cells({name: label[at] for name, label in case.labels.items()}, case.mask[at]) for at in tokens
    ]
    censuses = [cells.census() for cells in local]
    shared = [cells.share(censuses, rank) for rank, cells in enumerate(local)]
    one = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy)

    def work(rank, reduce):
        at = tokens[rank]
        return fpo.surrogate(case.log_ratio[at], case.weight[at], shared[rank], case.hierarchy, reduce)

    results, meeting = on_ranks(ranks, work)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        assert result.value == results[0].value == pytest.approx(one.value, abs=1e-13)
        assert result.report == results[0].report
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)
    assert [len(sizes) for sizes in meeting.sizes] == [case.hierarchy.num_reductions] * ranks


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
    # chain 0 1 2, branch 3 beside 0, branch 4 beside 2
    assert plan_visits(3, [0, 2], 2) == tuple(
        range(*ends) for ends in [(0, 1), (3, 4), (0, 1), (3, 4), (1, 3), (4, 5), (1, 3), (4, 5)]
    )


def test_without_branches_nothing_changes_to_the_bit():
    case = make_case("after", 3, 0.1)
    plain = fpo.Hierarchy(case.hierarchy.strata, 0.04)
    off = fpo.Hierarchy(case.hierarchy.strata, 0.04, (replace(EXPERT, enabled=False),), 2)
    cells = plain.cells(case.labels, case.mask)
    assert type(cells) is fpo.Cells and type(off.cells(case.labels, case.mask)) is fpo.Cells
    expected = fpo.surrogate(case.log_ratio, case.weight, cells, plain)
    chain = replace(plain, branches=(replace(EXPERT, name="all", slope=None),))
    one_cell = chain.cells({**case.labels, "all": torch.zeros_like(case.labels["expert"])}, case.mask)
    assert isinstance(one_cell, BranchedCells)
    result = fpo.surrogate(case.log_ratio, case.weight, one_cell, chain)
    # a branch of one cell finds nothing left after the chain
    torch.testing.assert_close(result.coefficients, expected.coefficients, rtol=1e-12, atol=1e-14)
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
    case = make_case("after", 4)
    labels = {**case.labels, "expert": case.labels["domain"]}
    cells = case.hierarchy.cells(labels, case.mask)
    ell = torch.where(labels["domain"] == 0, 0.02, -0.01).to(F64)
    report = fpo.surrogate(ell, case.weight, cells, case.hierarchy).report
    by_name = {entry.name: entry for entry in report.strata}
    assert by_name["domain"].channels["pos"].drift_max == pytest.approx(0.02)
    assert by_name["expert"].channels["pos"].drift_max < 1e-16
    assert by_name["expert"].channels["neg"].drift_max < 1e-16
    assert report.clipped == 0.0


def leak(sweeps: int) -> float:
    """What is left of a drift that is the sum of one of domains and one of experts: 0 for a joint projection."""
    case = make_case("after, swept three times", 6)
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
    case = make_case("beside the coarsest", 7)
    cells = case.hierarchy.cells(case.labels)
    drift = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=F64).abs()[case.labels["trajectory"]]
    report = fpo.surrogate(drift, case.weight, cells, case.hierarchy).report
    assert report.clipped == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan, -7.0])
@pytest.mark.parametrize("rows", [False, True])
def test_masked_tokens_change_no_bit(bad: float, rows: bool):
    case = make_case("in two places", 8)
    labels, shape = dict(case.labels), None
    if rows:
        row = torch.arange(NUM) // 10
        labels = {"domain": row // 2, "prompt_group": row, "trajectory": row, "modality": row % 2, "expert": row // 3}
        shape = (4, 10)
    ell, weight = case.log_ratio.clone(), case.weight.clone()
    ell[~case.mask], weight[~case.mask] = bad, bad
    garbage = {name: torch.where(case.mask, label, -(2**62)) for name, label in labels.items()}
    clean = case.hierarchy.cells(labels, case.mask, shape=shape)
    dirty = case.hierarchy.cells(garbage, case.mask, shape=shape)
    expected = fpo.surrogate(case.log_ratio, case.weight, clean, case.hierarchy)
    result = fpo.surrogate(ell, weight, dirty, case.hierarchy)
    assert torch.equal(result.coefficients, expected.coefficients) and result.value == expected.value
    assert result.report == expected.report and (result.coefficients[~case.mask] == 0).all()
    assert torch.equal(dirty.cell_per_token("expert")[case.mask], clean.cell_per_token("expert")[case.mask])


def test_rows_of_one_cell_give_the_result_of_scattered_tokens():
    case = make_case("beside the coarsest, swept", 9)
    row = torch.arange(NUM) // 10
    labels = {"domain": row // 2, "prompt_group": row, "trajectory": row, "modality": row % 2}
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(0))
    scattered = case.hierarchy.cells({name: label[order] for name, label in labels.items()}, case.mask[order])
    cells = case.hierarchy.cells(labels, case.mask, shape=(4, 10))
    for name in labels:
        level = cells.level(name)
        assert torch.equal(level.label_C[cells.cell_per_token(name)][case.mask], labels[name][case.mask])
    one = fpo.token_coefficients(case.log_ratio, case.weight, cells, case.hierarchy)
    other = fpo.token_coefficients(case.log_ratio[order], case.weight[order], scattered, case.hierarchy)
    torch.testing.assert_close(one[order], other, rtol=1e-12, atol=1e-14)


def test_no_live_tokens_and_weights_of_trajectories():
    case = make_case("in two places", 10)
    nothing = case.hierarchy.cells(case.labels, torch.zeros(NUM, dtype=torch.bool))
    result = fpo.surrogate(case.log_ratio, case.weight, nothing, case.hierarchy)
    assert result.value == 0.0 and (result.coefficients == 0).all()
    plain = fpo.Hierarchy(case.hierarchy.strata, 0.04).cells(case.labels, case.mask)
    assert torch.equal(fpo.token_weights(case.cells), fpo.token_weights(plain))
    half = fpo.token_coefficients(case.log_ratio.half(), case.weight.half(), case.cells, case.hierarchy)
    assert half.dtype == torch.float16


def test_cells_of_another_order_of_extraction_are_refused():
    case = make_case("after", 1)
    swept = replace(case.hierarchy, sweeps=2)
    chain = fpo.Hierarchy((*case.hierarchy.strata, EXPERT), 0.04)
    for other in (swept, chain):
        with pytest.raises(ValueError, match="cells: built for a hierarchy with other branches"):
            fpo.surrogate(case.log_ratio, case.weight, case.cells, other)


def test_reports_of_parts_that_share_no_cell_merge_into_that_of_the_whole():
    case = make_case("in two places", 12)
    half = torch.arange(NUM) < NUM // 2
    labels = {name: label + 10 * half for name, label in case.labels.items()}
    whole = case.hierarchy.cells(labels, case.mask)
    one = fpo.surrogate(case.log_ratio, case.weight, whole, case.hierarchy)
    parts, coefficients = [], torch.zeros(NUM, dtype=F64)
    for at in (half, ~half):
        cells = case.hierarchy.cells({name: label[at] for name, label in labels.items()}, case.mask[at])
        result = fpo.surrogate(case.log_ratio[at], case.weight[at], cells, case.hierarchy)
        parts.append(result.parts)
        coefficients[at] = result.coefficients
    merged = make_report(merge_parts(parts, whole), whole)
    assert merged.metrics() == pytest.approx(one.report.metrics(), abs=1e-13)
    torch.testing.assert_close(coefficients, one.coefficients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("field", ["log_ratio", "weighted_advantage"])
def test_non_finite_input_is_refused_after_the_first_reduction(field: str):
    case = make_case("after", 11)
    value = (case.log_ratio if field == "log_ratio" else case.weight).clone()
    value[case.mask.nonzero()[3]] = math.nan
    given = {"log_ratio": case.log_ratio, "weighted_advantage": case.weight} | {field: value}
    local = case.cells
    cells = local.share([local.census()], 0)

    def work(rank, reduce):
        return fpo.surrogate(**given, cells=cells, hierarchy=case.hierarchy, reduce=reduce)

    results, meeting = on_ranks(1, work)
    assert isinstance(results[0], ValueError) and f"{field}: nan on a live token" in str(results[0])
    assert [len(sizes) for sizes in meeting.sizes] == [1]
