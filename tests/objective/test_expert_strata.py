"""The placements of expert partitions, hard and soft: slow loops, J = I, degenerate cases, ranks.

The placements are those of docs/equations.md, "Expert partitions".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.cases import EXPERT_NAMES, PLACEMENTS, expert_case
from tests.objective.checks import equals_the_slow_loops, is_one_process_on_ranks, is_the_identity_on_policy

CONF = Path(__file__).parents[2] / "conf" / "hierarchy"
KINDS = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("seed", "scale", "slope"), [(0, 0.01, 0.5), (1, 0.04, 0.5), (2, 0.15, None)])
def test_every_placement_equals_the_slow_loops(
    placement: str, seed: int, scale: float, slope: float | None, soft: bool
):
    equals_the_slow_loops(expert_case(placement, seed, scale, soft, slope))


@KINDS
def test_such_cases_have_every_regime_in_strata_of_partitions(soft: bool):
    seen: dict[str, float] = {}
    for placement, (scale, slope) in [("P2", (0.04, 0.5)), ("P4", (0.04, 0.5)), ("P1", (0.15, None))]:
        for seed in range(3):
            report = expert_case(placement, seed, scale, soft, slope).surrogate().report
            for channel, figures in report.strata[-1].channels.items():
                for regime in ("pass_through", "rollback", "zeroed"):
                    key = f"{channel} {regime}"
                    seen[key] = max(seen.get(key, 0.0), getattr(figures, regime))
            seen["clipped"] = max(seen.get("clipped", 0.0), report.clipped)
    assert len(seen) == 7 and all(share > 0 for share in seen.values()), seen


@KINDS
@pytest.mark.parametrize("floor", [None, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_on_policy_the_jacobian_is_the_identity(placement: str, floor: int | None, soft: bool):
    is_the_identity_on_policy(expert_case(placement, 1, soft=soft, floor=floor))
    small = expert_case(placement, 1, scale=1e-6, soft=soft, floor=floor)
    out = fpo.gated_log_ratio(small.log_ratio, small.cells, small.hierarchy)
    torch.testing.assert_close(out, torch.where(small.mask, small.log_ratio, 0.0), rtol=0, atol=1e-20)


# strata of the chain that are left where there is one partition: a stratum that repeats its parent adds nothing
LEFT = {"P0": [0], "P1": [0, 1, 2], "P2": [0, 1, 2, 3], "P3": [0, 2, 3], "P3'": [0, 1, 3], "P4": [0, 1, 2]}


@KINDS
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_partition_is_no_partition(placement: str, soft: bool):
    """P0 is FiberPO, P1, P3 and P4 are FiberPO-Domain, P2 is FiberPO-Domain below one root."""
    case = expert_case(placement, 2, 0.05, soft, parts=1)
    result = case.surrogate()
    strata = [case.hierarchy.strata[at] for at in LEFT[placement]]
    plain = fpo.Hierarchy(tuple(replace(s, name=s.columns[0], join=()) for s in strata), 0.04)
    labels = {**case.labels, "expert_partition": torch.zeros_like(case.labels["trajectory"])}
    expected = replace(case, labels=labels, hierarchy=plain).surrogate()
    bound = 1e-14 if placement == "P4" else 0.0  # of a branch of one cell rounding is left
    assert result.value == pytest.approx(expected.value, abs=bound)
    torch.testing.assert_close(result.coefficients, expected.coefficients, rtol=0, atol=bound)


@KINDS
@pytest.mark.parametrize("floor", [None, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_any_split_over_ranks_is_one_process(placement: str, floor: int | None, soft: bool):
    """Rank 2 has masked tokens alone, rank 3 none."""
    case = expert_case(placement, 3, 0.06, soft, floor=floor)
    either = torch.randint(0, 2, case.mask.shape, generator=torch.Generator().manual_seed(0))
    sizes = is_one_process_on_ranks(case, torch.where(case.mask, either, 2), 4)
    assert [len(of_rank) for of_rank in sizes] == 4 * [4 if placement == "P4" else 2]


@pytest.mark.parametrize("name", ["expert_trajectory", "expert_coarsest", "expert_domain", "expert_branch"])
def test_the_shipped_placements_act_and_say_what_every_partition_does(name: str):
    hierarchy = fpo.load_hierarchy(CONF / f"{name}.yaml")
    case = expert_case("P1", 0, 0.1)
    assert set(hierarchy.columns) == set(case.labels) and not hierarchy.optional_columns
    expert = case.labels["expert_partition"]
    of_prompts = {name: label for name, label in case.labels.items() if name != "expert_partition"}
    hierarchy.check_data(of_prompts, names=EXPERT_NAMES)  # a data set without the labels of a rollout
    metrics = replace(case, hierarchy=hierarchy).surrogate().report.metrics()
    live = case.mask.sum().item()
    for at, partition in enumerate(EXPERT_NAMES["expert_partition"]):
        member_T = case.mask & (expert == at)
        entry = next(
            s.name for s in (*hierarchy.branches, *reversed(hierarchy.strata)) if "expert_partition" in s.columns
        )
        prefix = f"{entry}.{partition}" if entry == "expert_partition" else f"{entry}.expert_partition.{partition}"
        assert metrics[f"{prefix}/token_share"] == pytest.approx(member_T.sum().item() / live)
        if entry != "expert_partition":
            own = case.log_ratio[member_T].clamp_max(0.0).mean().abs().item()
            assert metrics[f"{prefix}/neg/drift"] == pytest.approx(own, abs=1e-15)
