"""Forests by hand, their linear maps and transposes, sums by segment, dense labels, rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.forest import Forest, SegmentSum, dense_ids
from tests.objective.cases import F64, branched_case, expert_case, make_case, make_hierarchy, stratum, tree_case


def small() -> Forest:
    """Domains 0 and 1; a task 7 in domain 1 alone; trajectories 0 to 3, of which 2 has one token and is merged."""
    hierarchy = fpo.Hierarchy(
        (stratum("domain"), stratum("task", only={"domain": ["b"]}), stratum("trajectory", min_tokens=2)), 0.1
    )
    labels = {
        "domain": torch.tensor([0, 0, 1, 1, 1, 1, 1]),
        "task": torch.tensor([-1, -1, 7, 7, 7, 7, 7]),
        "trajectory": torch.tensor([0, 0, 1, 1, 2, 3, 3]),
    }
    (forest,) = hierarchy.cells(labels, names={"domain": ["a", "b"]}).shared.forests
    return forest


def test_a_forest_by_hand():
    # nodes: domains 0 1, task 2, trajectories 3 4 5; joint cells are the trajectories; 6 is no node
    forest = small()
    assert forest.slices == {0: slice(0, 2), 1: slice(2, 3), 2: slice(3, 6)}
    assert forest.parent_N.tolist() == [6, 6, 1, 0, 2, 2]
    assert forest.node_KJ.tolist() == [[0, 1, 1, 1], [6, 2, 2, 2], [3, 4, 6, 5]]
    assert forest.leaf_J.tolist() == [3, 4, 2, 5]
    assert forest.count_N.tolist() == [2.0, 5.0, 5.0, 2.0, 2.0, 2.0]
    assert forest.stratum_N.tolist() == [0, 0, 1, 2, 2, 2] and forest.label_N.tolist() == [0, 1, 7, 0, 1, 3]
    assert forest.owned_N.all() and forest.slots.total == 0
    joint = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=F64)
    assert forest.up(joint).tolist() == [1.0, 1110.0, 1110.0, 1.0, 10.0, 1000.0]
    assert forest.at_leaves(joint).tolist() == [0.0, 0.0, 100.0, 1.0, 10.0, 1000.0]
    node = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=F64)
    assert forest.at(node).tolist() == [8.0, 16.0, 4.0, 32.0]
    assert forest.path(node).tolist() == [9.0, 22.0, 6.0, 38.0]
    assert forest.minus_parent(node).tolist() == [1.0, 2.0, 2.0, 7.0, 12.0, 28.0]
    assert forest.minus_children(node).tolist() == [-7.0, -2.0, -44.0, 8.0, 16.0, 32.0]


def forests() -> dict[str, Forest]:
    cases = {
        "chain": make_case(4, 1),
        "tree": tree_case(1),
        "floors": expert_case("P2", 1, floor=4),
        "branches": branched_case("in two places", 1),
    }
    every = ((name, enumerate(case.cells.shared.forests)) for name, case in cases.items())
    return {f"{name} {at}": forest for name, listed in every for at, forest in listed} | {"small": small()}


FORESTS = forests()


@pytest.mark.parametrize("name", FORESTS)
def test_maps_and_their_transposes(name: str):
    forest, generator = FORESTS[name], torch.Generator().manual_seed(0)

    def matrix(function, size: int) -> Tensor:
        return function(torch.eye(size, dtype=F64)).T

    nodes, joints = len(forest.count_N), len(forest.leaf_J)
    up, path = matrix(forest.up, joints), matrix(forest.path, nodes)
    assert up.shape == (nodes, joints) and torch.equal(path, up.T)
    assert torch.equal(matrix(forest.at_leaves, joints), matrix(forest.at, nodes).T)
    minus_parent, minus_children = matrix(forest.minus_parent, nodes), matrix(forest.minus_children, nodes)
    assert torch.equal(minus_children, minus_parent.T)
    # along a path the differences telescope: the sum of v - v[parent] is v at the leaf
    value = torch.randn(2, nodes, generator=generator, dtype=F64)
    torch.testing.assert_close(forest.path(forest.minus_parent(value)), forest.at(value), rtol=0, atol=1e-14)
    # all that lies under a node lies at the leaves under it
    assert (up.sum(0) >= 1).all() or not nodes


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_sums_by_segment_are_those_of_index_add_and_leave_out_what_is_in_none(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 6, (50,), generator=generator)  # 5 is in none, 4 is empty
    index[index == 4] = 5
    value = torch.randn(*shape, 50, generator=generator, dtype=F64)
    expected = torch.zeros(*shape, 6, dtype=F64).index_add_(-1, index, value)[..., :5]
    got = SegmentSum(index, 5)(value)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)
    assert (got[..., 4] == 0).all()
    repeated = SegmentSum(index.view(2, 25), 5)(value[..., :25])
    again = torch.zeros(*shape, 6, dtype=F64).index_add_(-1, index, torch.cat([value[..., :25]] * 2, -1))[..., :5]
    torch.testing.assert_close(repeated, again, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("num", [0, 3])
def test_sums_by_segment_of_nothing(num: int):
    index = torch.full((4,), num)
    assert SegmentSum(index, num)(torch.ones(2, 4, dtype=F64)).tolist() == [[0.0] * num] * 2
    assert SegmentSum(index[:0], num)(torch.ones(2, 0, dtype=F64)).tolist() == [[0.0] * num] * 2


@pytest.mark.parametrize("labels", [[5, 3, 5, 9], [-(2**62), 2**62, 0, 0], [2**40, 1, 1, 7], []])
def test_dense_ids_of_any_labels(labels: list[int]):
    label_C, cell = dense_ids(torch.tensor(labels, dtype=torch.int64))
    assert label_C.tolist() == sorted(set(labels))
    assert label_C[cell].tolist() == labels


def test_dense_ids_give_the_number_of_labels_where_there_is_none():
    present = torch.tensor([True, False, True, False])
    label_C, cell = dense_ids(torch.tensor([5, 77, 3, -9]), present)
    assert label_C.tolist() == [3, 5] and cell.tolist() == [1, 2, 0, 2]


def test_rows_are_found_whatever_masked_labels_hold():
    hierarchy = make_hierarchy(2)
    row = torch.arange(6).repeat_interleave(64)
    labels = {"domain": row // 3, "prompt_group": row}
    mask = (torch.arange(64) % 50 > 3).repeat(6)
    mask[:64] = False  # a row without a live token
    noise = {name: torch.where(mask, label, 10**15 + torch.arange(384)) for name, label in labels.items()}
    for kept, given in ((None, labels), (mask, noise)):
        layout = hierarchy.cells(given, kept, shape=(6, 64)).layout
        assert layout.entries.token is None and layout.batch == (6, 64), "rows as they stand"
    assert layout.cell_P.tolist() == [5, 0, 1, 2, 3, 4], "row 0 has no live token, the others a cell each"
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    mixed = hierarchy.cells({name: label[order] for name, label in labels.items()}, shape=(6, 64)).layout
    assert mixed.entries.token is not None and mixed.entries.token.numel() == 384
    for piece, cell in zip(mixed.entries.token.tolist(), mixed.cell_P.tolist(), strict=True):
        assert set(row[order][piece].tolist()) == {cell}, "every piece lies in one joint cell"


def test_pieces_of_uneven_cells_hold_every_token_once():
    case = make_case(3, 1, num=300)
    layout = case.cells.layout
    live, token = layout.entries.live, layout.entries.token
    assert live is not None and live.sum() == case.mask.sum()
    assert live.numel() <= 1.25 * case.mask.sum()
    value = torch.arange(300.0, dtype=F64)
    assert torch.equal(layout.collect(layout.spread(value)), torch.where(case.mask, value, 0.0))
    assert token[live].sort().values.tolist() == case.mask.nonzero().squeeze(1).tolist()


def test_cells_serve_a_changed_hierarchy_with_the_same_strata():
    loose, tight = make_hierarchy(2, budget=10.0), make_hierarchy(2, budget=1e-6)
    labels = {"domain": torch.tensor([0, 0, 1, 1]), "prompt_group": torch.tensor([3, 3, 9, 8])}
    cells = loose.cells(labels)
    ell = torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=F64)
    results = [fpo.gated_log_ratio(ell, built, tight) for built in (cells, tight.cells(labels))]
    assert torch.equal(*results)
    assert not torch.equal(fpo.gated_log_ratio(ell, cells, loose), results[0])
    other_gate = replace(loose, strata=(loose.strata[0], replace(loose.strata[1], gate="soft")))
    assert not torch.equal(fpo.gated_log_ratio(ell, cells, other_gate), fpo.gated_log_ratio(ell, cells, loose))
