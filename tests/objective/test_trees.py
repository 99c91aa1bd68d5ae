"""Joins, trees whose branches miss levels, and the refusal of what double counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective import reference
from tests.objective.ranks import on_ranks

F64 = torch.float64
NAMES = {"domain": ["code", "math", "prose"], "modality": ["image", "text"]}
DOMAINS = {"domain": NAMES["domain"]}


def stratum(name: str, pos: float = 0.05, **kwargs: Any) -> fpo.Stratum:
    return fpo.Stratum(name, fpo.Budget(pos, 0.7 * pos), **kwargs)


def labels_of(num: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trajectory = torch.randint(0, 12, (num,), generator=generator)
    group = trajectory // 2
    return {
        "domain": group // 2,
        "modality": torch.tensor([0, 1, 1, 1, 0, 1])[group],
        "topic": torch.tensor([4, 5, 6, 6, -1, -1])[group],
        "prompt_group": group,
        "trajectory": trajectory,
    }


def tree(**kwargs: Any) -> fpo.Hierarchy:
    """topics in code and math alone, groups in prose alone, trajectories in math and prose alone."""
    return fpo.Hierarchy(
        (
            stratum("domain", 0.02, slope=0.5),
            stratum("topic", 0.03, slope=0.5, only={"domain": ["code", "math"]}),
            stratum("prompt_group", 0.03, slope=0.5, only={"domain": ["prose"]}),
            stratum("trajectory", 0.04, slope=0.5, only={"domain": ["prose", "math"]}, **kwargs),
        ),
        0.04,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", (0.01, 0.06))
def test_a_tree_with_missing_levels_equals_the_slow_loops_over_each_tokens_own_path(seed: int, scale: float):
    """Reading A of 7.1: a domain with fewer levels is a chain of its own, in which the missing ones do not occur."""
    num, hierarchy, labels = 60, tree(), labels_of(60, seed)
    generator = torch.Generator().manual_seed(seed)
    ell = scale * torch.randn(num, generator=generator, dtype=F64)
    ell += scale * torch.randn(12, generator=generator, dtype=F64)[labels["trajectory"]]
    weight, mask = torch.randn(num, generator=generator, dtype=F64), torch.rand(num, generator=generator) > 0.2
    cells = hierarchy.cells(labels, mask, names=NAMES)
    result = fpo.surrogate(ell, weight, cells, hierarchy)
    value, coefficients = 0.0, torch.zeros(num, dtype=F64)
    for domain, names in enumerate((("topic",), ("topic", "trajectory"), ("prompt_group", "trajectory"))):
        path = [s for s in hierarchy.strata if s.name in ("domain", *names)]
        levels = [
            reference.Level(labels[s.name].tolist(), lambda _, s=s: (s.budget.pos, s.budget.neg), lambda *_: 0.5)
            for s in path
        ]
        live = (mask & (labels["domain"] == domain)).tolist()
        part = reference.objective(ell.tolist(), weight.tolist(), live, levels, 0.04)
        value += part[0]
        coefficients += torch.tensor(part[1], dtype=F64)
    assert result.value == pytest.approx(value, abs=1e-13)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-12, atol=1e-12)
    leaf = ell.clone().requires_grad_()
    torch.where(mask, weight * fpo.gated_log_ratio(leaf, cells, hierarchy).exp(), 0.0).sum().backward()
    torch.testing.assert_close(leaf.grad, coefficients, rtol=1e-12, atol=1e-12)
    # cells that repeat their parents are in no figure of the report
    counted = {entry.name: entry.cells for entry in result.report.strata}
    live_of = {name: labels[name][mask & torch.isin(labels["domain"], torch.tensor(where))].unique().numel()
               for name, where in (("domain", [0, 1, 2]), ("topic", [0, 1]), ("prompt_group", [2]), ("trajectory", [1, 2]))}  # fmt: skip # noqa: E501
    assert counted == live_of
    for entry in result.report.strata:
        for figures in entry.channels.values():
            assert figures.pass_through + figures.rollback + figures.zeroed == pytest.approx(1.0)


def test_a_tree_on_policy_is_the_identity_to_the_bit_and_over_ranks_the_same():
    num, hierarchy, labels = 60, tree(), labels_of(60, 1)
    cells = hierarchy.cells(labels, names=NAMES)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: fpo.gated_log_ratio(x, cells, hierarchy), torch.zeros(num, dtype=F64)
    )
    assert torch.equal(jacobian, torch.eye(num, dtype=F64))
    generator = torch.Generator().manual_seed(0)
    ell, weight = (torch.randn(num, generator=generator, dtype=F64) for _ in range(2))
    tokens = [(torch.arange(num) % 3 == rank).nonzero().squeeze(1) for rank in range(3)]
    local = [hierarchy.cells({name: label[at] for name, label in labels.items()}, names=NAMES) for at in tokens]
    censuses = [held.census() for held in local]
    one = fpo.surrogate(0.05 * ell, weight, cells, hierarchy)

    def work(rank, reduce):
        shared, at = local[rank].share(censuses, rank), tokens[rank]
        return fpo.surrogate(0.05 * ell[at], weight[at], shared, hierarchy, reduce)

    results, meeting = on_ranks(3, work)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)
    assert [len(sizes) for sizes in meeting.sizes] == [2, 2, 2]


def test_padded_cells_by_hand_and_overrides_beside_them():
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
    level = hierarchy.cells(labels, names=NAMES).level("modality")
    # -1 - (label * 3 + place): domain 0 and domain 2, both at place 0
    assert level.label_C.tolist() == [-7, -1, 0, 1] and level.owned_C.tolist() == [False, False, True, True]
    assert level.num_cells == 2 and level.called(-7) == "none (the stratum is missing there)"
    budget_2C, _ = hierarchy.strata[1].resolve(level)
    assert budget_2C[0, 2:].tolist() == [0.05, 1.0]


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
    negative = {"domain": torch.tensor([-3, 1]), "topic": torch.tensor([0, 0])}
    with pytest.raises(ValueError, match=r"labels\['domain'\]: value -3: must be within 0 \.\. \d+ where 'topic' is"):
        hierarchy.cells(negative, names=DOMAINS)
    finer = fpo.Hierarchy((*hierarchy.strata, stratum("trajectory")), 0.1)
    labels = {"domain": torch.tensor([0, 1]), "topic": torch.tensor([0, 0]), "trajectory": torch.tensor([7, 7])}
    with pytest.raises(ValueError, match=r"tokens in topic none \(the stratum is missing there\) and in topic 0"):
        finer.cells(labels, names=DOMAINS)


def joined(*parts: str, name: str = "both") -> fpo.Stratum:
    return stratum(name, 0.03, join=parts)


def test_a_join_has_the_intersections_as_cells_by_arithmetic_on_labels():
    hierarchy = fpo.Hierarchy((stratum("domain"), joined("domain", "modality"), stratum("trajectory")), 0.1)
    labels = labels_of(50, 2)
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
    labels = labels_of(50, 3)
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
        hierarchy.cells(labels_of(50, 2))


def test_a_token_in_no_cell_of_a_branch_is_refused():
    hierarchy = fpo.Hierarchy((stratum("domain"),), 0.1, (stratum("modality"),))
    labels = {"domain": torch.tensor([0, 1]), "modality": torch.tensor([0, -1])}
    with pytest.raises(ValueError, match=r"labels\['modality'\]: value -1: token 1 .* no cell; the branch 'modality'"):
        hierarchy.cells(labels)
    with pytest.raises(ValueError, match=r"labels: the active stratum 'modality' needs labels"):
        hierarchy.cells({"domain": labels["domain"]})


DOMAIN, TRAJECTORY, EXPERT = stratum("domain"), stratum("trajectory"), stratum("expert")
CHAIN = (DOMAIN, stratum("prompt_group"), TRAJECTORY)
OFF = stratum("domain", enabled=False)
REFUSALS: list[tuple[str, tuple[Any, ...], tuple[Any, ...], str]] = [
    ("the chain's name", CHAIN, (DOMAIN,), r"branches\[0\]\.name: 'domain' is already .*would count its drift twice"),
    ("two of a name", CHAIN, (EXPERT, EXPERT), r"branches\[1\]\.name: 'expert' is already the name of branches\[0\]"),
    ("a join with itself", (joined("domain", "domain"),), (), r"strata\[0\]\.join: names 'domain' twice"),
    ("a join of one", (joined("domain"),), (), r"strata\[0\]\.join: must name two or more"),
    ("a join named as its part", (joined("both", "x"),), (), r"strata\[0\]\.join: names 'both' itself"),
    (
        "a join of nested strata",
        (*CHAIN, joined("prompt_group", "domain")),
        (),
        r"strata\[3\]\.join: every prompt_group lies in one domain, .* their join is prompt_group itself",
    ),
    ("a coarser part below", (joined("domain", "modality"), DOMAIN), (), r"strata\[0\]\.join: 'domain' is coarser"),
    (
        "a join of a join",
        (joined("domain", "modality"), joined("both", "task", name="all")),
        (),
        r"strata\[1\]\.join: 'both' is a join; name its parts instead: \['domain', 'modality'\]",
    ),
    (
        "a join twice",
        (joined("domain", "modality"), joined("modality", "domain", name="again")),
        (),
        r"strata\[1\]\.join: strata\[0\] \('both'\) is the join of the same classifications",
    ),
    (
        "a branch that a join refines",
        (DOMAIN, joined("domain", "modality"), TRAJECTORY),
        (stratum("modality"),),
        r"branches\[0\]: every trajectory lies in one modality, .*nothing would be left for the budget of modality",
    ),
    (
        "a branch that is a part of another",
        CHAIN,
        (joined("expert", "layer"), EXPERT),
        r"branches\[1\]: every both lies in one expert.*Put expert before both",
    ),
    (
        "a branch that refines the finest",
        CHAIN,
        (joined("trajectory", "expert"),),
        r"branches\[0\]: every both lies in one trajectory.* belongs into `strata`, after trajectory",
    ),
    ("only in a branch", CHAIN, (stratum("expert", only={"domain": ["a"]}),), r"branches\[0\]\.only: .*cover every"),
    ("beside nothing", CHAIN, (stratum("x", beside="domian"),), r"branches\[0\]\.beside: .*did you mean 'domain'\?"),
    ("beside one off", (OFF, TRAJECTORY), (stratum("x", beside="domain"),), r"branches\[0\]\.beside: .* switched off"),
    ("no chain", (OFF,), (EXPERT,), r"branches\[0\]: a branch stands beside a chain"),
    ("beside in the chain", (stratum("a", beside="b"),), (), r"strata\[0\]\.beside: is for branches"),
    ("only of a finer one", (stratum("x", only={"domain": ["a"]}), DOMAIN), (), r"only\.domain: is not coarser"),
    ("only of nothing", (DOMAIN, stratum("x", only={"domian": ["a"]})), (), r"only\.domian: is no .*'domain'\?"),
    ("only of one off", (OFF, TRAJECTORY, stratum("x", only={"domain": ["a"]})), (), r"only\.domain: is switched off"),
]


@pytest.mark.parametrize(("strata", "branches", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_double_counts_is_refused(strata: tuple[Any, ...], branches: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        fpo.Hierarchy(strata, 0.1, branches)


def test_what_does_not_double_count_is_taken():
    fpo.Hierarchy((DOMAIN, joined("domain", "modality"), TRAJECTORY), 0.1, (stratum("modality", beside="domain"),))
    fpo.Hierarchy(CHAIN, 0.1, (joined("domain", "expert"), stratum("expert", beside="domain")))
    fpo.Hierarchy((joined("domain", "modality"), TRAJECTORY), 0.1, (EXPERT, replace(EXPERT, name="layer")))


def data(**labels: list[int]) -> dict[str, Tensor]:
    """Four prompts; a rollout has trajectories only."""
    return {"prompt_group": torch.arange(4), **{name: torch.tensor(values) for name, values in labels.items()}}


def test_what_double_counts_in_a_data_set_is_refused():
    crossed = data(domain=[0, 0, 1, 1], modality=[0, 1, 0, 1])
    beside = stratum("modality", beside="domain")
    good = fpo.Hierarchy(CHAIN, 0.1, (beside,))
    good.check_data(crossed)
    fpo.Hierarchy((DOMAIN, joined("domain", "modality"), TRAJECTORY), 0.1).check_data(crossed)
    fpo.Hierarchy(CHAIN, 0.1, (EXPERT,)).check_data(crossed)  # labels of the rollout
    everything = {**crossed, "trajectory": torch.arange(4)}
    with pytest.raises(ValueError, match=r"branch 'modality': in this data every trajectory lies in one modality"):
        fpo.Hierarchy(CHAIN, 0.1, (stratum("modality"),)).check_data(everything)
    with pytest.raises(ValueError, match=r"branch 'modality': in this data every domain lies in one modality"):
        good.check_data(data(domain=[0, 0, 1, 1], modality=[0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"branch 'modality': in this data .* belongs into `strata`, after domain"):
        good.check_data(data(domain=[0, 0, 1, 1], modality=[0, 1, 2, 2]))
    with pytest.raises(ValueError, match=r"branch 'b': in this data every modality lies in one b"):
        same = {**crossed, "b": crossed["modality"]}
        replace(good, branches=(beside, stratum("b", beside="domain"))).check_data(same)
    with pytest.raises(ValueError, match=r"stratum 'both', join: in this data every modality lies in one domain"):
        fpo.Hierarchy((DOMAIN, joined("domain", "modality")), 0.1).check_data(
            data(domain=[0, 0, 1, 1], modality=[0, 1, 2, 2])
        )
    # masked tokens are not looked at
    good.check_data({**crossed, "modality": torch.tensor([0, 1, 0, -1])}, torch.tensor([True, True, True, False]))


def test_describe_says_what_each_stratum_is():
    hierarchy = fpo.Hierarchy(
        (DOMAIN, stratum("topic", only={"domain": ["code", "math"]}), joined("topic", "language")),
        0.1,
        (stratum("modality", beside="domain"),),
        2,
    )
    text = hierarchy.describe()
    for part in ("only in domain code, math", "join of topic, language", "branch beside domain, 2 x", "token"):
        assert part in text
