"""The placements of expert partitions, hard and soft: section 8 by slow loops, J = I, degenerate cases, ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.expert_cases import (
    EPS,
    F64,
    NAMES,
    NUM,
    PLACEMENTS,
    Case,
    make_case,
)
from tests.objective.ranks import on_ranks

CONF = Path(__file__).parents[2] / "conf" / "hierarchy"
KINDS = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def held_to_the_reference(case: Case) -> None:
    value, coefficients, gated = case.reference()
    result = case.surrogate()
    assert result.value == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-12, atol=1e-12)
    leaf = case.log_ratio.clone().requires_grad_()
    out = fpo.gated_log_ratio(leaf, case.cells, case.hierarchy)
    torch.testing.assert_close(out.detach(), gated, rtol=0, atol=1e-12)
    torch.where(case.mask, case.weight * out.exp(), 0.0).sum().backward()
    torch.testing.assert_close(leaf.grad, coefficients, rtol=1e-12, atol=1e-12)


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scale", "slope"), [(0.01, 0.5), (0.04, 0.5), (0.15, None)])
def test_section_8_equals_the_slow_loops(placement: str, seed: int, scale: float, slope: float | None, soft: bool):
    held_to_the_reference(make_case(placement, seed, scale, soft, slope))


@KINDS
def test_the_cases_above_have_every_regime_in_strata_of_partitions(soft: bool):
    seen: dict[str, float] = {}
    for placement, (scale, slope) in [("P2", (0.04, 0.5)), ("P4", (0.04, 0.5)), ("P1", (0.15, None))]:
        for seed in range(3):
            report = make_case(placement, seed, scale, soft, slope).surrogate().report
            for channel, figures in report.strata[-1].channels.items():
                for regime in ("pass_through", "rollback", "zeroed"):
                    key = f"{channel} {regime}"
                    seen[key] = max(seen.get(key, 0.0), getattr(figures, regime))
            seen["clipped"] = max(seen.get("clipped", 0.0), report.clipped)
    assert len(seen) == 7 and all(share > 0 for share in seen.values()), seen


@KINDS
@pytest.mark.parametrize("floor", [None, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_on_policy_the_jacobian_is_the_identity(placement: str, floor: int | None, soft: bool):
    case = make_case(placement, 1, soft=soft, floor=floor)
    cells, ell = case.cells, torch.zeros(NUM, dtype=F64)
    coefficients = fpo.token_coefficients(ell, case.weight, cells, case.hierarchy)
    assert torch.equal(coefficients, fpo.on_policy_coefficients(case.weight, cells))
    jacobian = torch.autograd.functional.jacobian(lambda x: fpo.gated_log_ratio(x, cells, case.hierarchy), ell)
    assert torch.equal(jacobian, torch.diag(case.mask.to(F64)))
    small = make_case(placement, 1, scale=1e-6, soft=soft, floor=floor)
    out = fpo.gated_log_ratio(small.log_ratio, cells, small.hierarchy)
    torch.testing.assert_close(out, torch.where(small.mask, small.log_ratio, 0.0), rtol=0, atol=1e-20)


# strata of the chain that are left where there is one partition: a stratum that repeats its parent adds nothing
LEFT = {"P0": [0], "P1": [0, 1, 2], "P2": [0, 1, 2, 3], "P3": [0, 2, 3], "P3'": [0, 1, 3], "P4": [0, 1, 2]}


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_partition_is_no_partition(placement: str, soft: bool):
    """P0 is FiberPO, P1, P3 and P4 are FiberPO-Domain, P2 is FiberPO-Domain below one root."""
    case = make_case(placement, 2, 0.05, soft, parts=1)
    names = {"domain": NAMES["domain"], "expert_partition": ["all"]}
    cells = case.hierarchy.cells(case.given(), case.mask, names)
    result = fpo.surrogate(case.log_ratio, case.weight, cells, case.hierarchy)
    strata = [case.hierarchy.strata[at] for at in LEFT[placement]]
    plain = fpo.Hierarchy(tuple(replace(s, name=s.columns[0], join=()) for s in strata), EPS)
    labels = {**case.labels, "expert_partition": torch.zeros(NUM, dtype=torch.int64)}
    expected = fpo.surrogate(case.log_ratio, case.weight, plain.cells(labels, case.mask), plain)
    bound = 1e-14 if placement == "P4" else 0.0  # of a branch of one cell rounding is left
    assert result.value == pytest.approx(expected.value, abs=bound)
    torch.testing.assert_close(result.coefficients, expected.coefficients, rtol=0, atol=bound)


def split(case: Case, part_T: Tensor, world_size: int) -> tuple[list[Tensor], list[fpo.Cells]]:
    tokens = [(part_T == rank).nonzero().squeeze(1) for rank in range(world_size)]
    local = [case.hierarchy.cells(case.given(at), case.mask[at], NAMES) for at in tokens]
    censuses = [cells.census() for cells in local]
    return tokens, [cells.share(censuses, rank) for rank, cells in enumerate(local)]


@KINDS
@pytest.mark.parametrize("floor", [None, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_any_split_over_ranks_is_one_process(placement: str, floor: int | None, soft: bool):
    """Rank 2 has masked tokens alone, rank 3 none."""
    case = make_case(placement, 3, 0.06, soft, floor=floor)
    part_T = torch.where(case.mask, torch.randint(0, 2, (NUM,), generator=torch.Generator().manual_seed(0)), 2)
    tokens, cells = split(case, part_T, 4)
    one, ell, weight = case.surrogate(), case.log_ratio, case.weight
    results, meeting = on_ranks(
        4,
        lambda rank, reduce: fpo.surrogate(
            ell[tokens[rank]], weight[tokens[rank]], cells[rank], case.hierarchy, reduce
        ),
    )
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        assert result.value == results[0].value == pytest.approx(one.value, abs=1e-13)
        assert result.report == results[0].report
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)
    assert [len(sizes) for sizes in meeting.sizes] == 4 * [case.hierarchy.num_reductions]
    assert case.hierarchy.num_reductions == (4 if placement == "P4" else 2)

    def gated(rank, reduce):
        leaf = ell[tokens[rank]].clone().requires_grad_()
        out = fpo.gated_log_ratio(leaf, cells[rank], case.hierarchy, reduce)
        torch.where(case.mask[tokens[rank]], weight[tokens[rank]] * out.exp(), 0.0).sum().backward()
        return leaf.grad

    for rank, grad in enumerate(on_ranks(4, gated)[0]):
        torch.testing.assert_close(grad, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["expert_trajectory", "expert_coarsest", "expert_domain", "expert_branch"])
def test_the_shipped_placements_act_and_say_what_every_partition_does(name: str):
    hierarchy = fpo.load_hierarchy(CONF / f"{name}.yaml")
    case = make_case("P1", 0, 0.1)
    assert set(hierarchy.columns) == {*case.labels, "expert_partition"} and not hierarchy.optional_columns
    hierarchy.check_data(case.labels, names=NAMES)  # a data set without the labels of a rollout
    cells = hierarchy.cells(case.given(), case.mask, NAMES)
    cells = cells.share([cells.census()], 0)
    metrics = fpo.surrogate(case.log_ratio, case.weight, cells, hierarchy).report.metrics()
    live = case.mask.sum().item()
    for at, partition in enumerate(NAMES["expert_partition"]):
        member_T = case.mask & (case.share[:, at] > 0)
        entry = next(
            s.name for s in (*hierarchy.branches, *reversed(hierarchy.strata)) if "expert_partition" in s.columns
        )
        prefix = f"{entry}.{partition}" if entry == "expert_partition" else f"{entry}.expert_partition.{partition}"
        assert metrics[f"{prefix}/token_share"] == pytest.approx(member_T.sum().item() / live)
        if entry != "expert_partition":
            own = case.log_ratio[member_T].clamp_max(0.0).mean().abs().item()
            assert metrics[f"{prefix}/neg/drift"] == pytest.approx(own, abs=1e-15)
