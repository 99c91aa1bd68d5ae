"""Soft membership: shares of 0 and 1 are hard labels, exact counts, what is refused; other objectives beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.diagnostics.regimes import LOCAL_REGIMES, named_regimes
from nemo_fiberpo.megatron.step import StepTokens
from nemo_fiberpo.objective import build_cells
from tests.objective.cases import EXPERT_NAMES, F64, PLACEMENTS, expert_case, one_hot
from tests.objective.checks import ignores_masked_tokens

PARTITION = "expert_partition"


@pytest.mark.parametrize("floor", [None, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_shares_of_0_and_1_are_hard_labels(placement: str, floor: int | None):
    hard = expert_case(placement, 4, 0.07, floor=floor)
    soft = replace(hard, labels=hard.labels | {PARTITION: one_hot(hard.labels[PARTITION], 3)})
    one, other = hard.surrogate(), soft.surrogate()
    assert other.value == pytest.approx(one.value, abs=1e-13)
    torch.testing.assert_close(other.coefficients, one.coefficients, rtol=1e-12, atol=1e-13)
    assert other.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-13)
    pair = [named_regimes(case.log_ratio, case.cells, case.hierarchy) for case in (hard, soft)]
    assert [entry.counts() for entry in pair[0]] == [entry.counts() for entry in pair[1]]


def test_two_tokens_by_hand():
    # token 0 is half (128 / 255) in partition 0 and token 1 wholly; no stratum but partitions, k = 2, C = 0.1, eps = 1
    share = torch.tensor([[128, 127], [255, 0]], dtype=torch.uint8)
    expert = fpo.Stratum("expert_partition", fpo.Budget(0.1, 0.1), slope=2.0)
    hierarchy = fpo.Hierarchy((expert,), 1.0)
    cells = hierarchy.cells({"expert_partition": share}, names={"expert_partition": ["a", "b"]})
    q = 128 / 255
    level = cells.level("expert_partition")
    assert level.count_C.tolist() == pytest.approx([1 + q, 1 - q], abs=1e-15) and cells.num_tokens == 2
    ell = torch.tensor([0.3, 0.06], dtype=F64)
    # M_0 = (0.3 q + 0.06) / (1 + q) = 0.140: rollback, g = 0.1 - 2 (M_0 - 0.1);  M_1 = 0.3: zeroed
    mean = (0.3 * q + 0.06) / (1 + q)
    gate = 0.1 - 2 * (mean - 0.1)
    expected = [q * (gate + 0.3 - mean) + (1 - q) * 0.0, gate + 0.06 - mean]
    assert fpo.gated_log_ratio(ell, cells, hierarchy).tolist() == pytest.approx(expected, abs=1e-15)
    metrics = fpo.surrogate(ell, torch.ones(2, dtype=F64), cells, hierarchy).report.metrics()
    assert metrics["expert_partition.a/token_share"] == pytest.approx((1 + q) / 2)
    assert metrics["expert_partition.a/pos/drift"] == pytest.approx(mean)
    assert metrics["expert_partition.a/pos/regime"] == 1 and metrics["expert_partition.b/pos/regime"] == 2
    assert metrics["token/live"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype):
    case = expert_case("P2", 1, 0.06, soft=True)
    ell, weight = case.log_ratio.to(dtype), case.weight.to(dtype)
    wide = fpo.surrogate(ell.double(), weight.double(), case.cells, case.hierarchy)
    result = fpo.surrogate(ell, weight, case.cells, case.hierarchy)
    assert result.coefficients.dtype == dtype
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(result.coefficients.double(), wide.coefficients, rtol=bound, atol=bound)


@pytest.mark.parametrize("placement", ["P3", "P4"])
def test_masked_tokens_may_hold_anything(placement: str):
    case = expert_case(placement, 1, 0.06, soft=True)
    for bad in (float("nan"), float("inf"), -7.0):
        ignores_masked_tokens(case, bad)


def test_a_non_finite_value_is_said_of_the_token():
    case = expert_case("P1", 1, soft=True)
    cells = case.hierarchy.cells(case.labels, case.mask, case.names, shape=(6, 8))
    live = int(case.mask.nonzero()[9])
    case.log_ratio[live] = float("inf")
    with pytest.raises(ValueError, match=f"log_ratio: inf .*sample {live // 8}, token position {live % 8}; 1 such"):
        fpo.surrogate(case.log_ratio, case.weight, cells, case.hierarchy)


def test_counts_are_the_same_however_tokens_are_split():
    case = expert_case("P2", 2, soft=True)
    whole = case.cells.shared
    for world_size in (2, 3, 5):
        _, shared = case.split(torch.arange(48) % world_size, world_size)
        for cells in shared:
            for level, expected in zip(cells.levels, whole.levels, strict=True):
                at = torch.searchsorted(expected.label_C, level.label_C)
                assert torch.equal(level.count_C, expected.count_C[at]) and level.num_tokens == int(case.mask.sum())


def test_a_census_counts_in_units_of_shares():
    share = torch.tensor([[128, 127], [255, 0]], dtype=torch.uint8)
    cells = fpo.Hierarchy((fpo.Stratum(PARTITION, fpo.Budget(1, 1)),), 1.0).cells({PARTITION: share})
    assert cells.census().tolist() == [[0, 0, -1, 0, 383], [0, 1, -1, 0, 127]]


def test_strata_without_the_column_have_their_cells_and_counts():
    case = expert_case("P1", 3, 0.05, soft=True)
    plain = case.hierarchy.strata[:3]
    expected = fpo.Hierarchy(plain, 0.04).cells(case.labels, case.mask)
    for stratum in plain:
        level, other = case.cells.level(stratum.name), expected.level(stratum.name)
        assert torch.equal(level.label_C, other.label_C) and torch.equal(level.count_C, other.count_C)
        own, same = (cells.cell_per_token(stratum.name)[case.mask] for cells in (case.cells, expected))
        assert torch.equal(own, same)
    with pytest.raises(
        ValueError, match="a token lies in several cells of 'trajectory_expert', whose membership is soft"
    ):
        case.cells.cell_per_token("trajectory_expert")
    trajectories = build_cells(["trajectory"], {"trajectory": case.labels["trajectory"]}, case.mask)
    assert torch.equal(fpo.token_weights(case.cells), fpo.token_weights(trajectories))


@pytest.mark.parametrize("gating", [fpo.PpoClip(0.1, 0.1), fpo.Gspo(0.05, 0.05), fpo.Apc(0.05)])
@pytest.mark.parametrize("placement", ["P1", "P4"])
def test_other_objectives_do_not_see_the_partitions(placement: str, gating: fpo.RatioGating):
    case = expert_case(placement, 3, 0.1, soft=True)
    plain = replace(case, hierarchy=fpo.Hierarchy(case.hierarchy.strata[:3], 0.04), names={})
    result, expected = case.surrogate(gating=gating), plain.surrogate(gating=gating)
    assert result.value == pytest.approx(expected.value, abs=1e-14)
    torch.testing.assert_close(result.coefficients, expected.coefficients, rtol=1e-13, atol=1e-14)
    assert any("expert_partition.mid" in name for name in result.report.metrics())


def test_another_objective_over_cells_that_share_tokens_is_refused():
    case = expert_case("P1", 3, soft=True)
    with pytest.raises(ValueError, match="a token lies in several cells of 'trajectory_expert'"):
        case.surrogate(gating=fpo.Gspo(0.1, 0.1, stratum="trajectory_expert"))


def test_regimes_count_every_cell_once():
    case = expert_case("P2", 3, 0.1, soft=True)
    found = named_regimes(case.log_ratio, case.cells, case.hierarchy)
    seen: dict[str, int] = {}
    for entry, regimes in zip(case.surrogate().report.strata, found, strict=True):
        counts = regimes.counts()
        assert entry.cells == sum(counts[name] for name in LOCAL_REGIMES)
        seen |= {name: seen.get(name, 0) + counts[name] for name in LOCAL_REGIMES}
    assert all(seen.values()), seen


def test_a_step_takes_cells_of_as_many_tokens_as_its_micro_batches_have():
    case = expert_case("P1", 3, soft=True)
    columns = [[value.view(6, 8)] for value in (case.log_ratio, case.weight, case.mask)]
    StepTokens(*columns, case.cells.shared)
    with pytest.raises(ValueError, match="cells: made for 48 tokens, but the micro-batches have 40"):
        StepTokens(*([value[0][:5]] for value in columns), case.cells.shared)


def test_no_live_token_at_all():
    case = expert_case("P2", 3, soft=True)
    case.mask = torch.zeros(48, dtype=torch.bool)
    result = case.surrogate()
    assert result.value == 0.0 and torch.equal(result.coefficients, torch.zeros(48, dtype=F64))


def test_what_is_refused_names_the_column_and_the_token():
    case = expert_case("P2", 3, soft=True)
    live = int(case.mask.nonzero()[5])
    good, names = case.labels, EXPERT_NAMES
    off = good["expert_partition"].clone()
    off[live] = torch.tensor([100, 100, 54], dtype=torch.uint8)
    where = r"labels\['expert_partition'\]: "
    with pytest.raises(
        ValueError, match=where + rf"the shares of token {live} of the flat batch sum to 254; .* to 255"
    ):
        case.hierarchy.cells({**good, "expert_partition": off}, case.mask, names)
    with pytest.raises(ValueError, match=where + r"has shares in 3 values, but names\['expert_partition'\] has 2"):
        case.hierarchy.cells(good, case.mask, {"expert_partition": ["a", "b"]})
    with pytest.raises(ValueError, match=r"labels\['domain'\]: is soft, as 'expert_partition' is; one column at most"):
        case.hierarchy.cells({**good, "domain": good["expert_partition"]}, case.mask)
    with pytest.raises(ValueError, match="mask: must be a tensor of torch.bool, a value for each of the 48 tokens"):
        case.hierarchy.cells(good, case.mask[1:], names)
    with pytest.raises(ValueError, match=where + "must be a tensor of torch.int64, got torch.uint8"):
        case.hierarchy.cells({**good, "expert_partition": off[:, 0]}, case.mask)
    with pytest.raises(ValueError, match=r"labels\['domain'\]: has 47 tokens, but labels\['expert_partition'\] has 48"):
        case.hierarchy.cells({**good, "domain": good["domain"][1:]}, case.mask)
    with pytest.raises(ValueError, match="shape: 6 x 9 is not the number of tokens, 48"):
        case.hierarchy.cells(good, case.mask, names, shape=(6, 9))
    wrong = good["domain"].clone()
    wrong[live] = 5
    with pytest.raises(ValueError, match=r"labels\['domain'\]: value 5: has no name"):
        case.hierarchy.cells({**good, "domain": wrong}, case.mask, names)
    wrong[live] = -1
    with pytest.raises(
        ValueError, match=rf"labels\['domain'\]: value -1: token {live} of the flat batch is in no cell"
    ):
        case.hierarchy.cells({**good, "domain": wrong}, case.mask, names)
