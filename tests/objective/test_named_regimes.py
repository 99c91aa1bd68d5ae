"""Named regimes: borders by hand, all nine combinations, the concentric regimes of Figure 3, counts, ranks."""

from __future__ import annotations

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.diagnostics.regimes import GLOBAL_REGIMES, LOCAL_REGIMES, global_regimes, named_regimes
from nemo_fiberpo.objective.gates import zeroed_from
from tests.objective.cases import branched_case, make_case
from tests.objective.ranks import on_ranks

FIGURE_3 = fpo.Budget(pos=0.15, neg=0.09)


def names_of(pos: list[float], neg: list[float], budget: fpo.Budget, slope: float) -> list[str]:
    """Regimes by name from the drifts of both channels, which are given as magnitudes."""
    drift = torch.tensor([pos, [-x for x in neg]], dtype=torch.float64)
    budgets = torch.tensor([[budget.pos], [budget.neg]], dtype=torch.float64)
    index = global_regimes(drift, budgets, torch.tensor([slope], dtype=torch.float64))
    return [GLOBAL_REGIMES[at] for at in index.tolist()]


def test_zeroed_from_by_hand():
    # 0.12 (1 + 1/3) = 0.16;  0.5 (1 + 1/1) = 1
    out = zeroed_from(torch.tensor([0.12, 0.5], dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert out.tolist() == pytest.approx([0.16, 1.0], abs=1e-16)


def test_borders_by_hand():
    # k = 2, C+ = 1/4, C- = 1/8: C+* = 3/8, C-* = 3/16, all exact in binary; C itself passes, C* itself is zeroed
    budget = fpo.Budget(pos=0.25, neg=0.125)
    below = 1e-12
    neg = [0.125, 0.125 + below, 0.1875 - below, 0.1875, 0.5, 0.5, 0.5, 0.5]
    pos = [0.125, 0.125, 0.125, 0.125, 0.25, 0.25 + below, 0.375 - below, 0.375]
    expected = ["G-I", "G-II,r", "G-II,r", "G-II", "G-II", "G-III,r", "G-III,r", "G-III"]
    assert names_of(pos, neg, budget, 2.0) == expected


def test_all_nine_combinations_have_a_name_of_their_own():
    level = {"pass": 0.5, "rollback": 1.2, "zeroed": 2.0}  # budgets 1, k = 2, so C* = 1.5
    got = {
        (pos, neg): names_of([level[pos]], [level[neg]], fpo.Budget(1.0, 1.0), 2.0)[0] for pos in level for neg in level
    }
    assert got == {
        ("pass", "pass"): "G-I",
        ("pass", "rollback"): "G-II,r",
        ("pass", "zeroed"): "G-II",
        ("rollback", "zeroed"): "G-III,r",
        ("zeroed", "zeroed"): "G-III",
        ("rollback", "pass"): "pos rollback, neg pass",
        ("zeroed", "pass"): "pos zeroed, neg pass",
        ("rollback", "rollback"): "pos rollback, neg rollback",
        ("zeroed", "rollback"): "pos zeroed, neg rollback",
    }
    assert set(got.values()) == set(GLOBAL_REGIMES)


def test_one_trajectory_of_each_regime_counted_by_hand():
    # Trajectories of 2 tokens, k = 2, C = 0.1, C* = 0.15 in both channels, eps = 0.04. Means are half the log-ratios,
    # and so are the residuals of tokens whose trajectory has the other sign as well.
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)),), 0.04)
    ell = torch.tensor(
        [
            [0.02, -0.06],  # means 0.01, 0.03, residuals 0.01, -0.03: G-I, L-I
            [0.02, -0.22],  # 0.01, 0.11; residuals 0.01, -0.11: G-II,r, L-II
            [0.10, -0.40],  # 0.05, 0.20; residuals 0.05, -0.20: G-II, L-III
            [0.24, -0.40],  # 0.12, 0.20: G-III,r, L-III
            [0.40, -0.40],  # 0.20, 0.20: G-III, L-III
            [0.40, 0.40],  # means 0.40, 0, residuals 0: pos zeroed, neg pass, L-I
            [0.0, 0.0],  # G-I, L-I
        ],
        dtype=torch.float64,
    )
    rows = torch.arange(len(ell)).repeat_interleave(2)
    (regimes,) = named_regimes(ell.flatten(), hierarchy.cells({"trajectory": rows}), hierarchy)
    assert regimes.name == "trajectory"
    expected = ["G-I", "G-II,r", "G-II", "G-III,r", "G-III", "pos zeroed, neg pass", "G-I"]
    assert [GLOBAL_REGIMES[at] for at in regimes.global_C.tolist()] == expected
    assert [LOCAL_REGIMES[at] for at in regimes.local_C.tolist()] == ["L-I", "L-II"] + 3 * ["L-III"] + 2 * ["L-I"]
    counts = regimes.counts()
    assert {name: number for name, number in counts.items() if number} == {
        "G-I": 2, "G-II,r": 1, "G-II": 1, "G-III,r": 1, "G-III": 1, "pos zeroed, neg pass": 1,
        "L-I": 3, "L-II": 1, "L-III": 3,
    }  # fmt: skip
    assert list(counts) == [*GLOBAL_REGIMES, *LOCAL_REGIMES]


def test_figure_3_five_regimes_are_strictly_concentric():
    """T = 3, ratios of mean 1, as (65) has it: the rising channel reaches its budget only where N is zeroed."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.rand(100_000, 3, generator=generator, dtype=torch.float64) * 2.0 - 1.0
    delta -= delta.mean(1, keepdim=True)
    ell = torch.log1p(delta[delta.min(1).values > -1.0])
    mean = torch.stack([ell.clamp_min(0.0).mean(1), ell.clamp_max(0.0).mean(1)])
    budget = torch.tensor([[FIGURE_3.pos], [FIGURE_3.neg]], dtype=torch.float64)
    count = torch.bincount(global_regimes(mean, budget, torch.tensor([3.0])), minlength=len(GLOBAL_REGIMES))
    assert count[:5].min() > 100
    assert count[5:].sum() == 0
    # along every ray from the on-policy point the regimes only go outwards
    ray = torch.linspace(0.0, 1.0, 200, dtype=torch.float64)[:, None, None] * delta[:500]
    ray = torch.log1p(ray.clamp_min(-0.999))
    mean = torch.stack([ray.clamp_min(0.0).mean(2), ray.clamp_max(0.0).mean(2)])
    inside = delta[:500].min(1).values > -0.999
    order = global_regimes(mean.flatten(1), budget, torch.tensor([3.0])).view(200, 500)[:, inside]
    assert (order.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_stratum_agrees_with_a_loop_over_its_cells(depth: int):
    case = make_case(depth, seed=depth, scale=0.15)
    cells, eps = case.cells, case.hierarchy.token_clip
    live = [t for t in range(len(case.mask)) if case.mask[t]]

    def mean(name: str, label: int, sign: float) -> float:
        members = [t for t in live if case.labels[name][t] == label]
        own = [case.log_ratio[t].item() for t in members if (case.log_ratio[t] >= 0) == (sign > 0)]
        return sum(own) / len(members)

    finest = case.hierarchy.active[-1].name
    outside = {}
    for t in live:
        sign = 1.0 if case.log_ratio[t] >= 0 else -1.0
        outside[t] = abs(case.log_ratio[t].item() - mean(finest, int(case.labels[finest][t]), sign)) > eps
    above = None
    for stratum, got, level in zip(
        case.hierarchy.active, named_regimes(case.log_ratio, cells, case.hierarchy), cells.shared.levels, strict=True
    ):
        for at, label in enumerate(level.label_C.tolist()):
            members = [t for t in live if case.labels[stratum.name][t] == label]
            state = []
            for sign, budget in ((1.0, stratum.budget.pos), (-1.0, stratum.budget.neg)):
                drift = mean(stratum.name, label, sign)
                if above is not None:
                    drift -= mean(above, int(case.labels[above][members[0]]), sign)
                end = budget * (1.0 + 1.0 / len(members))
                state.append("pass" if abs(drift) <= budget else "rollback" if abs(drift) < end else "zeroed")
            named = {
                ("pass", "pass"): "G-I",
                ("pass", "rollback"): "G-II,r",
                ("pass", "zeroed"): "G-II",
                ("rollback", "zeroed"): "G-III,r",
                ("zeroed", "zeroed"): "G-III",
            }
            expected = named.get((state[0], state[1]), f"pos {state[0]}, neg {state[1]}")
            assert GLOBAL_REGIMES[got.global_C[at]] == expected
            number = sum(outside[t] for t in members)
            local = "L-I" if number == 0 else "L-III" if number == len(members) else "L-II"
            assert LOCAL_REGIMES[got.local_C[at]] == local
        above = stratum.name


def test_several_ranks_count_every_cell_once_and_agree():
    case = make_case(3, seed=5, scale=0.15, num=60)
    whole = [regimes.counts() for regimes in named_regimes(case.log_ratio, case.cells, case.hierarchy)]
    rank_T = torch.where(torch.arange(60) < 25, 0, 2)  # the second rank has no token
    tokens, shared = case.split(rank_T, 3)

    def work(rank: int, reduce) -> list[dict[str, int]]:
        found = named_regimes(case.log_ratio[tokens[rank]], shared[rank], case.hierarchy, reduce)
        return [regimes.counts() for regimes in found]

    results, meeting = on_ranks(3, work)
    assert all(len(sizes) == 2 for sizes in meeting.sizes)
    for index, expected in enumerate(whole):
        assert {name: sum(result[index][name] for result in results) for name in expected} == expected


@pytest.mark.parametrize("form", ["after", "beside the coarsest, swept", "a chain with a join"])
def test_counts_are_those_of_the_report_with_branches_too(form: str):
    case = branched_case(form, seed=1, scale=0.1)
    report = fpo.surrogate(case.log_ratio, case.weight, case.cells, case.hierarchy).report
    found = named_regimes(case.log_ratio, case.cells, case.hierarchy)
    for stratum, regimes in zip(report.strata, found, strict=True):
        counts = regimes.counts()
        assert stratum.name == regimes.name and stratum.cells == sum(counts[name] for name in LOCAL_REGIMES)
        channels, names = stratum.channels, {"pos": ("G-I", "G-II,r", "G-II"), "neg": ("G-I",)}
        names["neg"] += ("pos rollback, neg pass", "pos zeroed, neg pass")
        for channel, passing in names.items():
            expected = channels[channel].pass_through * stratum.cells
            assert sum(counts[name] for name in passing) == pytest.approx(expected, abs=1e-9)


def test_a_stratum_that_is_missing_has_no_regimes_there():
    # a stratum that is there in domain 0 alone: one cell of it, with no drift beyond its parent
    task = fpo.Stratum("task", fpo.Budget(0.1, 0.1), only={"domain": ["code"]})
    hierarchy = fpo.Hierarchy((fpo.Stratum("domain", fpo.Budget(0.1, 0.1)), task), 0.04)
    labels = {"domain": torch.tensor([0, 0, 1, 1]), "task": torch.tensor([5, 5, -1, -1])}
    cells = hierarchy.cells(labels, names={"domain": ["code", "prose"]})
    domain, task_regimes = named_regimes(torch.full((4,), 0.2, dtype=torch.float64), cells, hierarchy)
    assert domain.counts()["pos zeroed, neg pass"] == domain.counts()["L-I"] == 2
    assert task_regimes.counts()["G-I"] == task_regimes.counts()["L-I"] == 1


def test_no_active_stratum_has_no_regimes():
    stratum = fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1), enabled=False)
    hierarchy = fpo.Hierarchy((stratum,), 0.04)
    cells = hierarchy.cells({"trajectory": torch.zeros(3, dtype=torch.int64)})
    assert named_regimes(torch.zeros(3), cells, hierarchy) == ()
