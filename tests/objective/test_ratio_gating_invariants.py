"""Invariants of every ratio-gating map: ranks, masked tokens, extreme and non-finite input, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import F64, make_hierarchy
from tests.objective.padded_batches import GATINGS, HIERARCHY, Batch, make_batch
from tests.objective.ranks import on_ranks


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("world_size", (1, 2, 4))
def test_any_split_of_tokens_over_ranks_gives_the_single_process_result(gating, world_size: int):
    batch = make_batch(5, 0.15)
    mask, ell = batch.mask.view(-1), batch.log_ratio.view(-1)
    weight = batch.advantage.repeat_interleave(batch.mask.shape[1]) / 50
    one = fpo.surrogate(ell, weight, batch.cells, HIERARCHY, gating=gating)
    part = torch.randint(0, world_size, (len(ell),), generator=torch.Generator().manual_seed(world_size))
    part[part == 3] = 1  # of four ranks the last has no token
    tokens = [(part == rank).nonzero().squeeze(1) for rank in range(world_size)]
    cells = [HIERARCHY.cells({name: label[at] for name, label in batch.labels.items()}, mask[at]) for at in tokens]
    censuses = [held.census() for held in cells]
    shared = [held.share(censuses, rank) for rank, held in enumerate(cells)]

    def work(rank, reduce):
        at = tokens[rank]
        result = fpo.surrogate(ell[at], weight[at], shared[rank], HIERARCHY, reduce, gating)
        return result, fpo.gated_ratio(ell[at], weight[at], shared[rank], gating, reduce)

    results, meeting = on_ranks(world_size, work)
    gated = fpo.gated_ratio(ell, weight, batch.cells, gating)
    for rank, (result, ratio) in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ratio, gated[tokens[rank]], rtol=1e-13, atol=0)
        assert result.value == results[0][0].value == pytest.approx(one.value, abs=1e-13)
        assert result.report == results[0][0].report
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)
    assert all(len(sizes) == 3 for sizes in meeting.sizes), "two for the objective, one for the ratios"


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_tokens_change_no_bit(gating, bad: float):
    batch = make_batch(6, 0.3)
    expected = batch.surrogate(gating, "trajectory_mean")
    dirty = Batch(batch.log_ratio.masked_fill(~batch.mask, bad), batch.advantage, batch.mask)
    result = dirty.surrogate(gating, "trajectory_mean")
    assert torch.equal(result.coefficients, expected.coefficients)
    assert result.value == expected.value and result.report == expected.report
    assert (result.coefficients[~batch.mask.view(-1)] == 0).all()


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("field", ["log_ratio", "weighted_advantage"])
def test_non_finite_live_tokens_are_refused_on_every_rank(gating, field: str):
    cells = [
        HIERARCHY.cells(dict.fromkeys(("domain", "prompt_group", "trajectory"), torch.zeros(3, dtype=torch.int64)))
    ]
    censuses = [cells[0].census(), cells[0].census()]

    def work(rank, reduce):
        ell, weight = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
        if rank:
            (ell if field == "log_ratio" else weight)[2] = math.nan
        return fpo.surrogate(ell, weight, cells[0].share(censuses, rank), HIERARCHY, reduce, gating)

    results, meeting = on_ranks(2, work)
    assert f"{field}: nan on a live token, token 2" in str(results[1])
    assert f"{field}: 1 live tokens on another rank" in str(results[0])
    assert [len(sizes) for sizes in meeting.sizes] == [1, 1]


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("nats", [200.0, -200.0, 3e4, -3e4, 3e38])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_huge_log_ratios_give_finite_results(gating, nats: float, dtype: torch.dtype):
    batch = make_batch(7, 0.1)
    ell = batch.log_ratio.clone()
    ell[::3, 0] = nats
    batch = Batch(ell.to(dtype), batch.advantage, batch.mask)
    result = batch.surrogate(gating, "trajectory_mean")
    assert math.isfinite(result.value) and torch.isfinite(result.coefficients).all()
    assert result.coefficients.dtype == dtype
    if isinstance(gating, fpo.Apc):
        assert result.coefficients.abs().max() < 1e3
    if nats == 200.0 and gating == fpo.PpoClip(0.2, 0.28) and dtype == F64:
        expected = verl_like(batch)
        torch.testing.assert_close(result.coefficients, expected, rtol=1e-12, atol=0)


def verl_like(batch: Batch) -> Tensor:
    """PPO's coefficients of GRPO's weights without a clamp on the log-ratio: unbounded where A < 0."""
    ratio, a = batch.log_ratio.exp(), batch.advantage[:, None]
    active = torch.where(a >= 0, ratio <= 1.28, ratio >= 0.8) & batch.mask
    weight = 1.0 / (len(batch.mask) * batch.mask.sum(-1, keepdim=True).double())
    return torch.where(active, weight * a * ratio, 0.0).view(-1)


def test_apc_with_one_token_of_200_nats_keeps_the_budget_of_the_others():
    # the others of the cell drift by 0.3 in all; what is left of B for the wild token must not be lost to rounding
    hierarchy = make_hierarchy(1)
    cells = hierarchy.cells({"domain": torch.zeros(4, dtype=torch.int64)})
    ell = torch.tensor([1.1, 1.1, 0.9, 1.0], dtype=F64).log()
    ell[3] = 200.0
    gating = fpo.Apc(0.1, stratum="domain")  # B = 0.8
    gated = fpo.gated_ratio(ell, torch.ones(4, dtype=F64), cells, gating)
    assert gated.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.5], abs=1e-15)
    coefficients = fpo.surrogate(ell, torch.ones(4, dtype=F64), cells, hierarchy, gating=gating).coefficients
    assert coefficients.tolist() == pytest.approx([-1.1, -1.1, 0.9, 0.0], abs=1e-15)


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_on_policy_the_coefficients_are_the_weighted_advantages(gating):
    batch = make_batch(8, 0.0)
    cells = batch.cells
    weighted = fpo.token_weights(cells) * batch.advantage.repeat_interleave(batch.mask.shape[1])
    result = fpo.surrogate(torch.zeros_like(weighted), weighted, cells, HIERARCHY, gating=gating)
    torch.testing.assert_close(result.coefficients, fpo.on_policy_coefficients(weighted, cells), rtol=1e-15, atol=0)
    assert result.value == pytest.approx(weighted.sum().item(), abs=1e-15)


def test_the_report_is_that_of_the_hierarchys_own_gates():
    batch = make_batch(9, 0.2)
    fiberpo = batch.surrogate(None, "trajectory_mean").report.metrics()
    grpo = batch.surrogate(fpo.PpoClip(0.2, 0.2), "trajectory_mean").report.metrics()
    assert fiberpo.pop("token/clipped") != grpo.pop("token/clipped")
    assert grpo == fiberpo


def test_all_tokens_masked_and_no_tokens_at_all():
    for num in (0, 3):
        labels = dict.fromkeys(("domain", "prompt_group", "trajectory"), torch.zeros(num, dtype=torch.int64))
        cells = HIERARCHY.cells(labels, torch.zeros(num, dtype=torch.bool))
        for gating in GATINGS:
            result = fpo.surrogate(torch.full((num,), math.nan), torch.zeros(num), cells, HIERARCHY, gating=gating)
            assert torch.equal(result.coefficients, torch.zeros(num)) and result.value == 0.0
            assert all(math.isfinite(value) for value in result.report.metrics().values())


@pytest.mark.parametrize("gating", [fpo.Gspo(0.1, 0.1), fpo.Apc(0.1), fpo.Apc(0.1, stratum="state")], ids=str)
def test_a_map_that_couples_tokens_needs_its_stratum(gating):
    hierarchy = make_hierarchy(2)
    cells = hierarchy.cells({name: torch.zeros(2, dtype=torch.int64) for name in ("domain", "prompt_group")})
    args = torch.zeros(2), torch.zeros(2), cells
    with pytest.raises(ValueError, match=rf"gating.stratum: \w+ acts on the cells of '{gating.stratum}', but .*domain"):
        fpo.surrogate(*args, hierarchy, gating=gating)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fpo.PpoClip(0.0, 0.2), "low: must be finite and greater than 0"),
        (lambda: fpo.PpoClip(0.2, math.inf), "high: must be finite"),
        (lambda: fpo.PpoClip(20, 0.2), "low: must be at most 1"),
        (lambda: fpo.PpoClip(0.2, 0.2, use_min=1), "use_min: must be true or false"),
        (lambda: fpo.Gspo(0.2, -1), "high: must be finite and greater than 0"),
        (lambda: fpo.Gspo(0.2, 0.2, stratum=""), "stratum: must be the name of a stratum"),
        (lambda: fpo.TrulyPpo(0.2, 0), "alpha: must be finite and greater than 0"),
        (lambda: fpo.Apc(0), "delta: must be finite and greater than 0"),
        (lambda: fpo.Apc(0.1, space="logs"), "space: must be ratio or log"),
    ],
)
def test_fields_are_refused_by_name(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_maps_that_couple_tokens_refuse_a_stratum_whose_cells_share_tokens():
    experts = fpo.Stratum("experts", fpo.Budget(0.1, 0.1), join=("trajectory", "expert_partition"))
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)), experts), 0.1)
    fpo.objective.check_gating(fpo.Gspo(0.1, 0.1, stratum="experts"), hierarchy)
    fpo.objective.check_gating(fpo.Gspo(0.1, 0.1), hierarchy, soft=("expert_partition",))
    with pytest.raises(ValueError, match=r"gating.stratum: 'experts' spreads a token.*membership: hard"):
        fpo.objective.check_gating(fpo.Gspo(0.1, 0.1, stratum="experts"), hierarchy, soft=("expert_partition",))
