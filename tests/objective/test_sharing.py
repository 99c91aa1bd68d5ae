"""Tokens split over ranks: the same objective, two reductions, errors on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import Case, make_case, make_hierarchy
from tests.objective.ranks import on_ranks


def split(
    case: Case, part_T: Tensor, world_size: int, names: dict | None = None
) -> tuple[list[Tensor], list[fpo.Cells]]:
    """Token indices and shared cells of every rank; `part_T` says which rank holds a token."""
    tokens = [(part_T == rank).nonzero().squeeze(1) for rank in range(world_size)]
    cells = [
        case.hierarchy.cells({name: label[at] for name, label in case.labels.items()}, case.mask[at], names=names)
        for at in tokens
    ]
    censuses = [held.census() for held in cells]
    return tokens, [held.share(censuses, rank) for rank, held in enumerate(cells)]


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("depth", (1, 3, 4))
@pytest.mark.parametrize("scale", (1e-3, 0.1, 0.5))
def test_any_split_of_tokens_over_ranks_gives_the_single_process_result(world_size: int, depth: int, scale: float):
    case = make_case(depth, 21, scale, num=60, slope=0.3)
    generator = torch.Generator().manual_seed(world_size)
    tokens, cells = split(case, torch.randint(0, world_size, (60,), generator=generator), world_size)
    one = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy)
    expected_gated = fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)

    def work(rank, reduce):
        at = tokens[rank]
        return fpo.surrogate(case.log_ratio[at], case.weight[at], cells[rank], case.hierarchy, reduce)

    results, meeting = on_ranks(world_size, work)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        assert result.value == results[0].value == pytest.approx(one.value, abs=1e-13)
        assert result.report == results[0].report
        for name, value in result.report.metrics().items():
            assert value == pytest.approx(one.report.metrics()[name], abs=1e-12), name
    assert all(len(sizes) == 2 for sizes in meeting.sizes)
    assert meeting.sizes[0][0] == 2 + 2 * cells[0].num_shared

    def gated(rank, reduce):
        leaf = case.log_ratio[tokens[rank]].clone().requires_grad_()
        out = fpo.gated_log_ratio(leaf, cells[rank], case.hierarchy, reduce)
        live, weight = case.mask[tokens[rank]], case.weight[tokens[rank]]
        torch.where(live, weight * out.exp(), 0.0).sum().backward()
        return out.detach(), leaf.grad

    results, meeting = on_ranks(world_size, gated)
    for rank, (out, grad) in enumerate(results):
        torch.testing.assert_close(out, expected_gated[tokens[rank]], rtol=0, atol=1e-13)
        torch.testing.assert_close(grad, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
    assert all(len(sizes) == 2 for sizes in meeting.sizes)


def test_ranks_without_live_tokens_or_without_tokens_join_both_reductions():
    case = make_case(2, 4, 0.2)
    part = torch.where(case.mask, 0, 1)  # rank 1 has masked tokens only, rank 2 none
    tokens, cells = split(case, part, 3)

    def work(rank, reduce):
        at = tokens[rank]
        return fpo.token_coefficients(case.log_ratio[at], case.weight[at], cells[rank], case.hierarchy, reduce)

    results, meeting = on_ranks(3, work)
    one = fpo.token_coefficients(case.log_ratio, case.weight, case.cells, case.hierarchy)
    assert [len(sizes) for sizes in meeting.sizes] == [2, 2, 2]
    torch.testing.assert_close(results[0], one[tokens[0]], rtol=1e-13, atol=1e-14)
    assert (results[1] == 0).all() and results[2].numel() == 0


@pytest.mark.parametrize("field", ["log_ratio", "weighted_advantage"])
def test_non_finite_input_raises_on_every_rank_after_the_first_reduction(field: str):
    case = make_case(2, 4, 0.2)
    tokens, cells = split(case, torch.arange(40) % 3, 3)
    live = case.mask[tokens[1]].nonzero()[2].item()

    def work(rank, reduce):
        ell, weight = case.log_ratio[tokens[rank]].clone(), case.weight[tokens[rank]].clone()
        if rank == 1:
            (ell if field == "log_ratio" else weight)[live] = math.nan
        return fpo.surrogate(ell, weight, cells[rank], case.hierarchy, reduce)

    results, meeting = on_ranks(3, work)
    assert all(isinstance(result, ValueError) for result in results)
    assert f"{field}: nan on a live token, token {live} of the flat batch" in str(results[1])
    assert f"{field}: 1 live tokens on another rank" in str(results[0])
    assert [len(sizes) for sizes in meeting.sizes] == [1, 1, 1]


def test_counts_slots_and_owners_by_hand():
    # domain 7 holds groups 1 (ranks 0 and 1) and 2 (rank 1 alone); rank 2 has domain 8 with group 3 alone
    hierarchy = make_hierarchy(2)
    labels = [([7, 7], [1, 1]), ([7, 7, 7], [1, 2, 2]), ([8], [3])]
    cells = [
        hierarchy.cells({"domain": torch.tensor(domain), "prompt_group": torch.tensor(group)})
        for domain, group in labels
    ]
    assert cells[1].census().tolist() == [[0, 7, -1, 3], [1, 1, 7, 1], [1, 2, 7, 2]]
    censuses = [held.census() for held in cells]
    shared = [held.share(censuses, rank) for rank, held in enumerate(cells)]
    assert [held.num_shared for held in shared] == [2, 2, 2]
    domain, group = shared[1].levels
    assert domain.count_C.tolist() == [5.0] and group.count_C.tolist() == [3.0, 2.0]
    assert domain.owned_C.tolist() == [False] and group.owned_C.tolist() == [False, True]
    assert domain.slot_C.tolist() == [0] and group.slot_C.tolist() == [1] and group.shared_C.tolist() == [0]
    assert shared[2].levels[0].shared_C.tolist() == [] and shared[2].levels[1].owned_C.tolist() == [True]
    assert [held.num_cells("prompt_group") for held in shared] == [3, 3, 3]
    assert shared[0].level("domain").num_tokens == 6


def test_cells_that_nest_differently_on_two_ranks_are_refused():
    hierarchy = make_hierarchy(2)
    names = {"domain": ["math", "code"]}
    cells = [
        hierarchy.cells({"domain": torch.tensor([d]), "prompt_group": torch.tensor([4])}, names=names) for d in (0, 1)
    ]
    censuses = [held.census() for held in cells]
    for rank in (0, 1):
        with pytest.raises(
            ValueError, match=r"labels\['prompt_group'\]: value 4 .* domain 0 \('math'\) and in domain 1 \('code'\)"
        ):
            cells[rank].share(censuses, rank)


def test_censuses_out_of_order_and_a_missing_reduction_are_refused():
    case = make_case(2, 4)
    tokens, cells = split(case, torch.arange(40) % 2, 2)
    censuses = [held.census() for held in cells]
    with pytest.raises(ValueError, match=r"censuses\[0\]: is not the census of these cells"):
        cells[1].share(censuses, 0)
    with pytest.raises(ValueError, match=r"rank: must be within the 2"):
        cells[1].share(censuses, 2)
    at = tokens[0]
    with pytest.raises(ValueError, match=r"reduce: these cells are shared by 2 ranks"):
        fpo.token_coefficients(case.log_ratio[at], case.weight[at], cells[0], case.hierarchy)


def test_weights_and_named_figures_are_global():
    case = make_case(3, 13, 0.1)
    names = {"domain": ["math", "code", "logic", "prose"]}
    tokens, cells = split(case, torch.arange(40) % 3, 3, names)
    whole = case.hierarchy.cells(case.labels, case.mask, names=names)
    for kind, length in (("trajectory_mean", None), ("token_mean", None), ("fixed_length_mean", 17)):
        expected = fpo.token_weights(whole, kind, length=length)
        for rank in range(3):
            assert torch.equal(fpo.token_weights(cells[rank], kind, length=length), expected[tokens[rank]])
    one = fpo.surrogate(case.log_ratio, case.weight, whole, case.hierarchy).report.metrics()
    results, _ = on_ranks(
        3,
        lambda rank, reduce: fpo.surrogate(
            case.log_ratio[tokens[rank]], case.weight[tokens[rank]], cells[rank], case.hierarchy, reduce
        ),
    )
    assert "domain.logic/neg/drift" in one
    assert results[2].report.metrics() == pytest.approx(one, abs=1e-12)
