"""Histograms of |X| / C, and the fields of the report: by hand, over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.report import BINS, HISTOGRAM_EDGES, empty_fields, make_report, merge, pack, unpack
from tests.objective.cases import F64, Case, branched_case, expert_case, make_case, make_hierarchy
from tests.objective.ranks import on_ranks


def test_bins_are_four_to_an_octave():
    assert len(HISTOGRAM_EDGES) == BINS - 1 == 65
    assert HISTOGRAM_EDGES[0] == 2.0**-8 and HISTOGRAM_EDGES[32] == 1.0 and HISTOGRAM_EDGES[-1] == 2.0**8
    for low, high in zip(HISTOGRAM_EDGES, HISTOGRAM_EDGES[4:], strict=False):
        assert high == pytest.approx(2.0 * low, rel=1e-15)


def test_every_cell_is_in_its_bin_by_hand():
    # trajectories of one token, C+ = 1/2, C- = 1/4: |X| / C is 2 |ell| or 4 |ell|, all exact in binary
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.5, 0.25)),), 1.0)
    ell = torch.tensor([0.0, 2.0**-9, 0.5, 0.51, 128.0, 200.0, -0.25, -0.3, -(2.0**-12), -100.0], dtype=F64)
    cells = hierarchy.cells({"trajectory": torch.arange(10)})
    found = fpo.surrogate(ell, torch.ones(10, dtype=F64), cells, hierarchy).report.histograms()
    assert list(found) == ["trajectory/pos/budget_used", "trajectory/neg/budget_used"]
    pos, neg = [0] * BINS, [0] * BINS
    # below 2^-8 or equal: 0 and 2^-8 and the four cells of the other channel; 1 itself is in the bin that it ends,
    # 2^8 as well, beyond it is the last
    pos[0], pos[32], pos[33], pos[64], pos[65] = 2 + 4, 1, 1, 1, 1
    # 1, 1.2 in the bin to 2^(1/4) = 1.189 and the next, 2^-10, 400
    neg[0], neg[32], neg[34], neg[65] = 6 + 1, 1, 1, 1
    assert found["trajectory/pos/budget_used"] == pos
    assert found["trajectory/neg/budget_used"] == neg


KINDS = {
    "chain": lambda: make_case(3, 1, 0.1),
    "branches": lambda: branched_case("in two places", 1, 0.1),
    "soft": lambda: expert_case("P2", 1, 0.1, soft=True, floor=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_histograms_sum_to_the_number_of_cells(kind: str):
    report = KINDS[kind]().surrogate().report
    spread = 0
    for stratum in report.strata:
        for channel in ("pos", "neg"):
            bins = report.histograms()[f"{stratum.name}/{channel}/budget_used"]
            assert len(bins) == BINS and sum(bins) == stratum.cells
            # the edge at 1 divides cells that pass from those that do not
            passing = stratum.channels[channel].pass_through * stratum.cells
            assert sum(bins[:33]) == pytest.approx(passing, abs=1e-9)
            spread = max(spread, sum(count > 0 for count in bins))
    assert spread > 3
    assert not any("histogram" in name for name in report.metrics()), "a metric is a number"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_have_the_histograms_of_the_whole_batch(kind: str):
    case = KINDS[kind]()
    tokens, cells = case.split(torch.arange(len(case.mask)) % 3, 4)

    def work(rank, reduce):
        at = tokens[rank]
        return fpo.surrogate(case.log_ratio[at], case.weight[at], cells[rank], case.hierarchy, reduce)

    expected = case.surrogate().report.histograms()
    for result in on_ranks(4, work)[0]:
        assert result.report.histograms() == expected


def by_group(case: Case) -> list[torch.Tensor]:
    """Micro-batches that share no cell."""
    domain = case.labels["domain"]
    return [domain == label for label in domain.unique()]


def test_micro_batches_add_up_to_the_report_of_the_whole():
    case = make_case(3, 2, 0.1)
    cells, whole = case.cells.shared, case.surrogate()
    fields = [case.part(at).surrogate().fields for at in by_group(case)]
    value, merged = make_report(merge(fields, empty_fields(cells)), cells)
    assert value == pytest.approx(whole.value, abs=1e-13)
    assert merged.histograms() == whole.report.histograms()
    assert merged.metrics() == pytest.approx(whole.report.metrics(), abs=1e-13)
    assert max(merged.strata[0].channels["pos"].histogram) > 0


def test_micro_batches_of_several_ranks_add_up_in_one_sum():
    """As in the one-pass step: each rank merges its own, and one reduction brings them together."""
    case = make_case(3, 2, 0.1)
    groups = by_group(case)
    parts = [groups[:2], groups[2:], []]  # of three ranks the last has no micro-batch
    tokens = [torch.stack(of_rank).any(0) if of_rank else torch.zeros(40, dtype=torch.bool) for of_rank in parts]
    censuses = [case.part(at).cells.census() for at in tokens]
    shared = [case.part(at).cells.share(censuses, rank) for rank, at in enumerate(tokens)]
    packed = []
    for cells, of_rank in zip(shared, parts, strict=True):
        fields = [case.part(at).surrogate().fields for at in of_rank]
        packed.append(pack(merge(fields, empty_fields(cells)), cells))
    summed = {name: sum(of_rank[name] for of_rank in packed) for name in packed[0]}
    value, report = make_report(unpack(summed), shared[0])
    whole = case.surrogate()
    assert value == pytest.approx(whole.value, abs=1e-13)
    assert report.histograms() == whole.report.histograms()
    assert report.metrics() == pytest.approx(whole.report.metrics(), abs=1e-13)


def test_fields_of_no_tokens_are_those_of_an_evaluation_without_tokens():
    for case in (make_case(2, 1), expert_case("P1", 1, soft=True), branched_case("after", 1)):
        nothing = replace(case, mask=torch.zeros_like(case.mask))
        cells = nothing.cells.shared
        fields, empty = nothing.surrogate().fields, empty_fields(cells)
        assert set(fields) == set(empty)
        for name, value in empty.items():
            assert fields[name].shape == value.shape and fields[name].dtype == torch.float64, name
        value, report = make_report(empty, cells)
        assert value == 0.0 and report.metrics() == nothing.surrogate().report.metrics()
        assert all(sum(bins) == 0 for bins in report.histograms().values())


def test_without_cells_there_are_no_histograms():
    hierarchy = make_hierarchy(1, enabled=False)
    cells = hierarchy.cells({}, shape=(1, 2))
    assert fpo.surrogate(torch.zeros(2), torch.zeros(2), cells, hierarchy).report.histograms() == {}
