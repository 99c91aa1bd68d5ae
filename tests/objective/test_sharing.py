"""Tokens split over ranks: the same objective, its reductions, censuses, and errors on every rank."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import Riders
from tests.objective.cases import F64, make_case, make_hierarchy
from tests.objective.checks import is_one_process_on_ranks
from tests.objective.ranks import on_ranks


@pytest.mark.parametrize("world_size", (1, 2, 4))
@pytest.mark.parametrize(("depth", "scale"), [(1, 0.1), (3, 1e-3), (3, 0.1), (4, 0.5)])
def test_any_split_of_tokens_over_ranks_gives_the_single_process_result(world_size: int, depth: int, scale: float):
    case = make_case(depth, 21, scale, num=60, slope=0.3)
    rank_T = torch.randint(0, world_size, (60,), generator=torch.Generator().manual_seed(world_size))
    sizes = is_one_process_on_ranks(case, rank_T, world_size)
    held = case.split(rank_T, world_size)[1][0]
    shared = sum(level.slots.total for level in held.levels)
    # the first reduction: two counts of bad input, the number of ranks, both channels of every shared cell
    assert [of_rank[0] for of_rank in sizes] == [3 + 2 * shared] * world_size
    assert (shared > 0) == (world_size > 1)


def test_ranks_without_live_tokens_or_without_tokens_join_both_reductions():
    case = make_case(2, 4, 0.2)
    tokens, cells = case.split(torch.where(case.mask, 0, 1), 3)  # rank 1 has masked tokens only, rank 2 none

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
    tokens, cells = case.split(torch.arange(40) % 3, 3)
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
    # stratum, label, those of its parent, live tokens
    assert cells[1].census().tolist() == [[0, 7, -1, 0, 3], [1, 1, 0, 7, 1], [1, 2, 0, 7, 2]]
    assert cells[1].census().dtype == torch.int64
    censuses = [held.census() for held in cells]
    shared = [held.share(censuses, rank) for rank, held in enumerate(cells)]
    domain, group = shared[1].levels
    assert domain.count_C.tolist() == [5.0] and group.count_C.tolist() == [3.0, 2.0]
    assert domain.owned_C.tolist() == [False] and group.owned_C.tolist() == [False, True]
    for held in shared:
        assert [level.slots.total for level in held.levels] == [1, 1] and held.forests[0].slots.total == 2
    assert domain.slots.held.tolist() == [0] and domain.slots.place.tolist() == [0]
    assert group.slots.held.tolist() == [0] and group.slots.place.tolist() == [0]
    # in the forest domain 7 is node 0 in place 0, group 1 is node 1 in place 1
    assert shared[1].forests[0].slots.held.tolist() == [0, 1] and shared[1].forests[0].slots.place.tolist() == [0, 1]
    assert shared[2].levels[0].slots.held.tolist() == [] and shared[2].levels[1].owned_C.tolist() == [True]
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


def test_censuses_out_of_order_are_refused():
    case = make_case(2, 4)
    cells = [case.part(torch.arange(40) % 2 == rank).cells for rank in (0, 1)]
    censuses = [held.census() for held in cells]
    with pytest.raises(ValueError, match=r"censuses\[0\]: is not the census of these cells"):
        cells[1].share(censuses, 0)
    with pytest.raises(ValueError, match=r"rank: must be within the 2"):
        cells[1].share(censuses, 2)


def evaluations(case, tokens: list[Tensor], cells: list):
    """Every function that reduces, as a function of rank and reduction."""

    def given(rank):
        return case.log_ratio[tokens[rank]], case.weight[tokens[rank]], cells[rank]

    gating = fpo.PpoClip(0.1, 0.1)
    return {
        "surrogate": lambda rank, reduce: fpo.surrogate(*given(rank), case.hierarchy, reduce),
        "a map": lambda rank, reduce: fpo.surrogate(*given(rank), case.hierarchy, reduce, gating),
        "token_coefficients": lambda rank, reduce: fpo.token_coefficients(*given(rank), case.hierarchy, reduce),
        "gated_ratio": lambda rank, reduce: fpo.gated_ratio(*given(rank), gating, reduce),
        "gated_log_ratio": lambda rank, reduce: fpo.gated_log_ratio(
            given(rank)[0], cells[rank], case.hierarchy, reduce
        ),
    }


FUNCTIONS = ["surrogate", "a map", "token_coefficients", "gated_ratio", "gated_log_ratio"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_reduction_over_other_ranks_than_share_the_cells_is_refused_on_every_rank(name: str):
    case = make_case(2, 4)
    alone, two = torch.zeros(40, dtype=torch.int64), torch.arange(40) % 2
    tokens, cells = case.split(two, 2)
    (whole,), (one,) = case.split(alone, 1)
    # cells of one process, which two ranks evaluate together: each would count its tokens as all there are
    work = evaluations(case, [whole, whole], [case.cells, one])[name]
    results, meeting = on_ranks(2, work)
    for error in results:
        assert str(error) == ("reduce: sums over 2 rank(s), but the cells are shared by 1 rank(s); see `Cells.share`")
    assert [len(sizes) for sizes in meeting.sizes] == [1, 1]
    # cells of two ranks, reduced by each rank alone, or not at all
    work = evaluations(case, tokens, cells)[name]
    results, _ = on_ranks(1, work)
    assert "reduce: sums over 1 rank(s), but the cells are shared by 2 rank(s)" in str(results[0])
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r"^reduce: is required, but the cells are shared by 2 rank\(s\)"):
            work(rank, None)


def test_riders_are_summed_in_the_first_reduction_and_checked_before_anything_else():
    case = make_case(2, 4, 0.2)
    tokens, cells = case.split(torch.arange(40) % 3, 3)
    seen: list[list[float]] = [[], [], []]

    def work(rank, reduce, refuse=False, bad=False):
        def check(summed):
            seen[rank] = summed["mine"].tolist()
            if refuse:
                raise ValueError(f"rider: refused, {summed['mine'][0]:g}")

        riders = Riders({"mine": torch.tensor([1.0, 10.0 * rank], dtype=F64)}, check)
        ell, weight = case.log_ratio[tokens[rank]], case.weight[tokens[rank]]
        ell = torch.full_like(ell, math.nan) if bad else ell
        return fpo.surrogate(ell, weight, cells[rank], case.hierarchy, reduce, riders=riders)

    results, meeting = on_ranks(3, work)
    plain, without = on_ranks(3, lambda rank, reduce: evaluations(case, tokens, cells)["surrogate"](rank, reduce))
    assert seen == [[3.0, 30.0]] * 3
    assert [sizes[0] - other[0] for sizes, other in zip(meeting.sizes, without.sizes, strict=True)] == [2, 2, 2]
    assert [sizes[1:] for sizes in meeting.sizes] == [sizes[1:] for sizes in without.sizes]
    for one, other in zip(results, plain, strict=True):
        assert one.value == other.value and torch.equal(one.coefficients, other.coefficients)
    for bad in (False, True):  # also where tokens would be refused
        refused, meeting = on_ranks(3, lambda rank, reduce, bad=bad: work(rank, reduce, True, bad))
        assert [str(error) for error in refused] == ["rider: refused, 3"] * 3
        assert [len(sizes) for sizes in meeting.sizes] == [1, 1, 1]
    gating = fpo.Gspo(0.1, 0.1, stratum="domain")
    riders = Riders({"mine": torch.ones(1, dtype=F64)}, lambda summed: seen.append(summed["mine"].tolist()))
    case.surrogate(gating=gating, riders=riders)
    assert seen[-1] == [1.0], "they ride with other maps as well"


def test_weights_and_named_figures_are_global():
    case = replace(make_case(3, 13, 0.1), names={"domain": ["math", "code", "logic", "prose"]})
    rank_T = torch.arange(40) % 3
    tokens, cells = case.split(rank_T, 3)
    for kind, length in (("trajectory_mean", None), ("token_mean", None), ("fixed_length_mean", 17)):
        expected = fpo.token_weights(case.cells, kind, length=length)
        for rank in range(3):
            assert torch.equal(fpo.token_weights(cells[rank], kind, length=length), expected[tokens[rank]])
    is_one_process_on_ranks(case, rank_T, 3)
    assert "domain.logic/neg/drift" in case.surrogate().report.metrics()
