"""Partitions of experts: what may be configured, labels and memberships from masses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_fiberpo.config import load_expert_partitions, load_hierarchy
from nemo_fiberpo.labelling.expert_partitions import MASS_UNIT, hard_labels, soft_membership
from nemo_fiberpo.objective import ExpertPartitions

BUDGET = {"pos": 0.1, "neg": 0.1}
TRAJECTORY = {"name": "trajectory", "budget": BUDGET}
INSIDE = {"name": "trajectory_expert", "join": ["trajectory", "expert_partition"], "budget": BUDGET}


def section(*strata: dict, **block: object) -> dict:
    return {"token_clip": 0.1, "strata": list(strata), "expert_partitions": block}


def test_partitions_are_blocks_single_experts_or_a_map() -> None:
    table, names = ExpertPartitions().table(6, 3)
    assert table.tolist() == [0, 0, 1, 1, 2, 2] and names == ("experts_0-1", "experts_2-3", "experts_4-5")
    table, names = ExpertPartitions("expert").table(3)
    assert table.tolist() == [0, 1, 2] and names == ("expert_0", "expert_1", "expert_2")
    table, names = ExpertPartitions({"hot": [2, 0], "cold": [1]}).table(3)
    assert table.tolist() == [0, 1, 0] and names == ("hot", "cold")
    assert table.dtype == torch.int64


@pytest.mark.parametrize(
    ("by", "experts", "ranks", "message"),
    [
        ("expert_parallel", 8, 1, "one partition of all experts where the expert-parallel size is 1; set by: expert,"),
        ("expert_parallel", 8, 3, "8 experts do not divide over 3"),
        ({"a": [0, 2], "b": [1]}, 5, 1, "experts 3, 4 are in no partition"),
        ({"a": [0], "b": [1]}, 3, 1, "expert 2 is in no partition"),
        ({"a": [0, 1], "b": [7]}, 3, 1, r"\.b: there is no expert 7; the model has experts 0 to 2"),
        ({"a": [0, 1]}, 2, 1, r"makes 1 partition\(s\)"),
    ],
)
def test_a_partition_that_does_not_fit_the_model_is_refused(by, experts: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^expert_partitions\.by.*{message}"):
        ExpertPartitions(by).table(experts, ranks)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"by": "expert_paralel"}, r"by: must be .*did you mean 'expert_parallel'"),
        ({"by": {"a": [0, 1], "b": [1]}}, r"by\.b: expert 1 is in 'a' already"),
        ({"by": {"a/b": [0], "c": [1]}}, r"by: 'a/b' is no name"),
        ({"by": {"a": [0, 0]}}, r"by\.a: expert 0 is named twice"),
        ({"by": {"a": []}}, r"by\.a: names no expert"),
        ({"by": {"a": 1}}, r"by\.a: must be a list of experts"),
        ({"layers": [1, 1]}, "layers: layer 1 is named twice"),
        ({"layers": [0]}, "layers: layers are numbered from 1"),
        ({"layers": []}, "layers: at least one layer"),
        ({"layers": "last"}, "layers: must be all"),
        ({"layers": [True]}, "layers: must be all"),
        ({"membership": "fuzzy"}, "membership: must be hard or soft"),
        ({"agreement": 1}, "agreement: must be true or false"),
        ({"layer": [1]}, "layer: unknown key; did you mean 'layers'"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(block: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^expert_partitions\.{message}"):
        load_expert_partitions(section(TRAJECTORY, INSIDE, **block))


def test_the_block_and_the_strata_need_each_other() -> None:
    with pytest.raises(ValueError, match=r"^expert_partitions: is required, because stratum 'trajectory_expert' needs"):
        load_expert_partitions({**section(TRAJECTORY, INSIDE), "expert_partitions": None})
    with pytest.raises(ValueError, match=r"^expert_partitions: no stratum is called 'expert_partition' or joins it"):
        load_expert_partitions(section(TRAJECTORY))
    assert load_expert_partitions({"token_clip": 0.1, "strata": [TRAJECTORY]}) is None
    assert load_expert_partitions(section(TRAJECTORY, INSIDE | {"enabled": False})) is None
    branch = {"name": "expert_partition", "beside": "trajectory", "budget": BUDGET}
    for cfg in (section(TRAJECTORY, INSIDE), section(TRAJECTORY) | {"branches": [branch]}):
        assert load_expert_partitions(cfg) == ExpertPartitions()
        assert load_hierarchy(cfg).columns == ("trajectory", "expert_partition")


def test_a_file_is_named_with_the_field(tmp_path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("token_clip: 0.1\nstrata: [{name: expert_partition, budget: {pos: 1, neg: 1}}]\n")
    with pytest.raises(ValueError, match=r"some\.yaml: expert_partitions: is required"):
        load_expert_partitions(path)


def test_a_label_is_the_largest_mass_and_the_lowest_of_equal_ones() -> None:
    masses = torch.tensor([[[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], [[0.2, 0.4, 0.4], [torch.nan] * 3]])
    assert hard_labels(masses).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(("number", "size"), [(2, 1), (256, 1), (257, 2), (512, 2)])
def test_a_label_takes_at_most_two_bytes(number: int, size: int) -> None:
    masses = torch.eye(number, dtype=torch.float64)
    labels = hard_labels(masses)
    assert labels.element_size() == size <= 2
    assert labels.tolist() == list(range(number))


def test_memberships_are_shares_of_255() -> None:
    """0.5, 0.3, 0.2 of 255 are 127.5, 76.5, 51; two units of the halves' are worth 1, which the first gets. Of three
    thirds each gets 85; of two halves the first gets the odd one; of 7 sevenths, 36 3/7 each, the first three do."""
    rows = [
        ([5, 3, 2, 0], [128, 76, 51, 0]),
        ([1, 1, 1], [85, 85, 85]),
        ([1, 1], [128, 127]),
        ([1] * 7, [37] * 3 + [36] * 4),
    ]
    for weights, expected in rows:
        units = torch.tensor(weights, dtype=torch.float64) * 10_000_000_000
        assert soft_membership(units * MASS_UNIT).tolist() == expected
    assert soft_membership(torch.full((3,), torch.nan)).tolist() == [255, 0, 0]


@given(st.lists(st.lists(st.integers(0, 1 << 40), min_size=4, max_size=4).filter(any), min_size=1, max_size=5))
def test_memberships_are_the_largest_remainders(units: list[list[int]]) -> None:
    found = soft_membership(torch.tensor(units, dtype=torch.float64) * MASS_UNIT)
    assert found.dtype == torch.uint8
    for row, got in zip(units, found.tolist(), strict=True):
        exact = [Fraction(255 * value, sum(row)) for value in row]
        floor = [int(value) for value in exact]
        order = sorted(range(4), key=lambda index: (floor[index] - exact[index], index))
        for index in order[: 255 - sum(floor)]:
            floor[index] += 1
        assert got == floor and sum(got) == 255
