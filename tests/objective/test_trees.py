"""Trees whose branches miss levels, and joins of classifications."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.cases import F64, TREE_NAMES, stratum, tree_case, tree_labels
from tests.objective.checks import (
    equals_the_slow_loops,
    ignores_masked_tokens,
    is_one_process_on_ranks,
    is_the_identity_on_policy,
)

NAMES = TREE_NAMES
DOMAINS = {"domain": NAMES["domain"]}


@pytest.mark.parametrize(("seed", "scale"), [(0, 0.01), (1, 0.06), (2, 0.06), (3, 0.2)])
def test_a_tree_with_missing_levels_equals_the_slow_loops_over_each_tokens_own_path(seed: int, scale: float):
    """A domain with fewer levels is a chain of its own, in which the missing ones do not occur."""
    case = tree_case(seed, scale)
    result = equals_the_slow_loops(case)
    where = {"domain": [0, 1, 2], "topic": [0, 1], "prompt_group": [2], "trajectory": [1, 2]}
    for entry in result.report.strata:
        there = case.mask & torch.isin(case.labels["domain"], torch.tensor(where[entry.name]))
        assert entry.cells == case.labels[entry.name][there].unique().numel()
        assert entry.cells == case.cells.level(entry.name).label_C.numel(), "a level lists cells that exist"
        for figures in entry.channels.values():
            assert figures.pass_through + figures.rollback + figures.zeroed == pytest.approx(1.0)


@pytest.mark.parametrize("domain", range(3))
def test_each_domain_of_a_tree_is_a_chain_of_the_levels_that_it_has(domain: int):
    case = tree_case(4)
    names = (("domain", "topic"), ("domain", "topic", "trajectory"), ("domain", "prompt_group", "trajectory"))[domain]
    at = case.labels["domain"] == domain
    chain = tuple(replace(s, only={}) for s in case.hierarchy.strata if s.name in names)
    alone = replace(case.part(at), hierarchy=replace(case.hierarchy, strata=chain))
    expected = alone.surrogate()
    torch.testing.assert_close(case.surrogate().coefficients[at], expected.coefficients, rtol=1e-13, atol=1e-15)


def test_a_tree_on_policy_is_the_identity_to_the_bit_and_over_ranks_the_same():
    case = tree_case(1)
    is_the_identity_on_policy(case)
    sizes = is_one_process_on_ranks(case, torch.arange(60) % 3, 3)
    assert [len(of_rank) for of_rank in sizes] == [2, 2, 2]
    ignores_masked_tokens(case, float("nan"))


def test_a_level_that_is_missing_has_only_the_cells_that_exist():
    hierarchy = fpo.Hierarchy(
        (
            stratum("domain"),
            stratum("modality", only={"domain": ["math"]}, budgets={"text": fpo.Budget(1, 1)}),
            stratum("trajectory"),
        ),
        0.1,
    )
    labels = {
        "domain": torch.tensor([0, 1, 1, 2]),
        "modality": torch.tensor([-5, 1, 0, 9]),
        "trajectory": torch.tensor([3, 4, 5, 6]),
    }
    cells = hierarchy.cells(labels, names=NAMES)
    level = cells.level("modality")
    assert level.label_C.tolist() == [0, 1] and level.count_C.tolist() == [1.0, 1.0]
    assert level.num_cells == 2 and not level.everywhere and cells.level("trajectory").everywhere
    ell = torch.tensor([0.0, 0.04, 0.02, 0.0], dtype=F64)
    metrics = fpo.surrogate(ell, torch.ones(4, dtype=F64), cells, hierarchy).report.metrics()
    assert metrics["modality/cells"] == 2
    # math has M+ = 0.03, its modalities 0.01 from there: of 0.05, and of 1.0 for text
    assert metrics["modality.image/pos/budget_used"] == pytest.approx(0.2)
    assert metrics["modality.text/pos/budget_used"] == pytest.approx(0.01)
    # trajectories 3 and 6 hang from their domains, 4 and 5 from their modalities
    assert cells.census()[-4:].tolist() == [[2, 3, 0, 0, 1], [2, 4, 1, 1, 1], [2, 5, 1, 0, 1], [2, 6, 0, 2, 1]]


def test_labels_of_a_tree_are_checked_where_the_stratum_is_there():
    hierarchy = fpo.Hierarchy((stratum("domain"), stratum("topic", only={"domain": ["math"]})), 0.1)
    labels = {"domain": torch.tensor([0, 1]), "topic": torch.tensor([-1, -1])}
    with pytest.raises(ValueError, match=r"labels\['topic'\]: value -1: token 1 .*is in no cell; the stratum 'topic'"):
        hierarchy.cells(labels, names=DOMAINS)
    hierarchy.cells(labels, torch.tensor([True, False]), names=DOMAINS)
    with pytest.raises(ValueError, match=r"stratum 'topic', only.domain: goes by name, so names\['domain'\] must"):
        hierarchy.cells(labels)
    wrong = replace(hierarchy.strata[1], only={"domain": ["maths"]})
    with pytest.raises(ValueError, match=r"only\.domain: no cell of the data is called 'maths'; did you mean 'math'\?"):
        replace(hierarchy, strata=(hierarchy.strata[0], wrong)).cells(labels, names=DOMAINS)
    finer = fpo.Hierarchy((*hierarchy.strata, stratum("trajectory")), 0.1)
    labels = {"domain": torch.tensor([0, 1]), "topic": torch.tensor([0, 0]), "trajectory": torch.tensor([7, 7])}
    with pytest.raises(ValueError, match=r"value 7 has tokens in domain 0 \('code'\) and in topic 0; every traj"):
        finer.cells(labels, names=DOMAINS)


def test_negative_labels_are_labels_like_others_where_a_finer_level_is_missing():
    case = tree_case(2)
    moved = replace(case, labels=case.labels | {"trajectory": case.labels["trajectory"] - 1000})
    assert (moved.labels["trajectory"] < 0).all()
    coarse = replace(case.hierarchy.strata[3], only={})
    chain = (case.hierarchy.strata[0], coarse, stratum("segment", 0.02, only={"domain": ["code"]}))
    results = []
    for each in (case, moved):
        labels = each.labels | {"segment": case.labels["trajectory"]}
        results.append(replace(each, labels=labels, hierarchy=fpo.Hierarchy(chain, 0.04)).surrogate())
    assert results[0].value == results[1].value
    assert torch.equal(results[0].coefficients, results[1].coefficients)


def joined(*parts: str, name: str = "both") -> fpo.Stratum:
    return stratum(name, 0.03, *parts)


def test_a_join_has_the_intersections_as_cells_by_arithmetic_on_labels():
    hierarchy = fpo.Hierarchy((stratum("domain"), joined("domain", "modality"), stratum("trajectory")), 0.1)
    labels = tree_labels(50, 2)
    level = hierarchy.cells(labels, names=NAMES).level("both")
    assert set(level.label_C.tolist()) == set((2 * labels["domain"] + labels["modality"]).tolist())
    assert level.names == ("code/image", "code/text", "math/image", "math/text", "prose/image", "prose/text")
    without = hierarchy.cells(labels).level("both")
    assert set(without.label_C.tolist()) == set(((labels["domain"] << 31) + labels["modality"]).tolist())
    assert hierarchy.columns == ("domain", "modality", "trajectory")
    named = replace(hierarchy.strata[1], budgets={"math/text": fpo.Budget(1, 1)})
    hierarchy = replace(hierarchy, strata=(hierarchy.strata[0], named, hierarchy.strata[2]))
    ell = torch.full((50,), 0.01, dtype=F64)
    report = fpo.surrogate(ell, torch.ones(50, dtype=F64), hierarchy.cells(labels, names=NAMES), hierarchy).report
    assert {"domain.code/pos/drift", "both.math/text/pos/drift"} <= set(report.metrics())


def test_a_join_equals_the_chain_of_its_intersections():
    labels = tree_labels(50, 3)
    hierarchy = fpo.Hierarchy((stratum("domain"), joined("domain", "modality"), stratum("trajectory")), 0.04)
    plain = fpo.Hierarchy((stratum("domain"), stratum("both", 0.03), stratum("trajectory")), 0.04)
    by_hand = {**labels, "both": 10 * labels["domain"] + labels["modality"]}
    generator = torch.Generator().manual_seed(0)
    ell, weight = (0.1 * torch.randn(50, generator=generator, dtype=F64) for _ in range(2))
    one = fpo.token_coefficients(ell, weight, hierarchy.cells(labels), hierarchy)
    assert torch.equal(one, fpo.token_coefficients(ell, weight, plain.cells(by_hand), plain))


def test_labels_of_a_join_are_checked():
    hierarchy = fpo.Hierarchy((joined("domain", "modality"),), 0.1)
    labels = {"domain": torch.tensor([0, 1]), "modality": torch.tensor([-1, 2])}
    with pytest.raises(ValueError, match=r"labels: the join 'both' needs labels of 'modality' \(given: 'domain'\)"):
        hierarchy.cells({"domain": labels["domain"]})
    with pytest.raises(ValueError, match=r"labels\['modality'\]: value -1: token 0 .* is in no cell; the join 'both'"):
        hierarchy.cells(labels)
    with pytest.raises(ValueError, match=r"labels\['modality'\]: value 2: has no name; names\['modality'\] has 2"):
        hierarchy.cells(labels, torch.tensor([False, True]), NAMES)
    huge = {"domain": torch.tensor([0, 1]), "modality": torch.tensor([0, 1 << 31])}
    with pytest.raises(ValueError, match=r"labels without names must be below 2147483648 to be joined in 'both'"):
        hierarchy.cells(huge)
    with pytest.raises(ValueError, match=r"names\['both'\]: is a join, whose names are made"):
        hierarchy.cells(labels, names={"both": ["a"]})
    with pytest.raises(ValueError, match=r"join: 3 of its parts have no names"):
        fpo.Hierarchy((joined("a", "b", "c"),), 0.1).cells({n: torch.tensor([0]) for n in "abc"})
    with pytest.raises(ValueError, match=r"labels\['modality'\]: must be a tensor of torch.int64"):
        hierarchy.cells({"domain": torch.tensor([0]), "modality": torch.tensor([0.0])})


def test_a_chain_of_two_classifications_is_refused_with_a_way_out():
    hierarchy = fpo.Hierarchy((stratum("domain"), stratum("modality")), 0.1)
    with pytest.raises(ValueError, match=r"are no chain: use their `join`, or make one of them a branch"):
        hierarchy.cells(tree_labels(50, 2))


def test_a_token_in_no_cell_of_a_branch_is_refused():
    hierarchy = fpo.Hierarchy((stratum("domain"),), 0.1, (stratum("modality"),))
    labels = {"domain": torch.tensor([0, 1]), "modality": torch.tensor([0, -1])}
    with pytest.raises(ValueError, match=r"labels\['modality'\]: value -1: token 1 .* no cell; the branch 'modality'"):
        hierarchy.cells(labels)
    with pytest.raises(ValueError, match=r"labels: the active stratum 'modality' needs labels"):
        hierarchy.cells({"domain": labels["domain"]})


def test_describe_says_what_each_stratum_is():
    hierarchy = fpo.Hierarchy(
        (stratum("domain"), stratum("topic", only={"domain": ["code", "math"]}), joined("topic", "language")),
        0.1,
        (stratum("modality", beside="domain"),),
        2,
    )
    text = hierarchy.describe()
    for part in ("only in domain code, math", "join of topic, language", "branch beside domain, 2 x", "token"):
        assert part in text
