"""The token clip of named cells of the coarsest stratum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.cases import F64, TREE_NAMES, Case, branched_case, expert_case, stratum, tree_case
from tests.objective.checks import equals_the_slow_loops, is_one_process_on_ranks, is_the_identity_on_policy


def test_clips_by_hand():
    # domains code {0, 1} and math {2, 3} with M+ = 0.2 and residuals +-0.1: clipped at 0.03 in math, at 0.2 in code
    hierarchy = fpo.Hierarchy((stratum("domain", 1.0),), 0.2, token_clips={"math": 0.03})
    cells = hierarchy.cells({"domain": torch.tensor([0, 0, 1, 1])}, names={"domain": ["code", "math"]})
    ell = torch.tensor([0.3, 0.1, 0.3, 0.1], dtype=F64)
    out = fpo.gated_log_ratio(ell, cells, hierarchy)
    assert out.tolist() == pytest.approx([0.3, 0.1, 0.23, 0.17], abs=1e-15)
    report = fpo.surrogate(ell, torch.ones(4, dtype=F64), cells, hierarchy).report
    assert report.clipped == 0.5
    assert "clip 0.2  math: 0.03" in hierarchy.describe()


def clipped(case: Case, **clips: float) -> Case:
    return replace(case, hierarchy=replace(case.hierarchy, token_clips=clips))


def cases() -> dict[str, Case]:
    branched = branched_case("beside the coarsest, swept", 1, 0.06)
    branched.names = {"domain": ["code", "math"]}
    joined = expert_case("P3", 1, 0.06)
    chain = (replace(joined.hierarchy.strata[1], slope=0.5), joined.hierarchy.strata[3])
    of_join = replace(joined, hierarchy=fpo.Hierarchy(chain, 0.04))
    return {
        "tree": clipped(tree_case(1), math=0.01, prose=0.2),
        "branches": clipped(branched, code=0.008),
        "soft": clipped(expert_case("P1", 1, 0.06, soft=True, floor=4), math=0.01, code=0.08),
        "soft cells are the coarsest": clipped(expert_case("P2", 1, 0.06, soft=True), low=0.01, high=0.1),
        "a join is the coarsest": replace(
            of_join, hierarchy=replace(of_join.hierarchy, token_clips={"math/low": 0.01, "code/high": 0.1})
        ),
    }


@pytest.mark.parametrize("kind", ["tree", "branches", "soft", "soft cells are the coarsest", "a join is the coarsest"])
def test_clips_equal_the_slow_loops_and_over_ranks_the_same(kind: str):
    case = cases()[kind]
    result = equals_the_slow_loops(case)
    without = replace(case, hierarchy=replace(case.hierarchy, token_clips={}))
    assert abs(result.value - without.surrogate().value) > 1e-6
    is_the_identity_on_policy(case)
    is_one_process_on_ranks(case, torch.arange(len(case.mask)) % 2, 3)


def test_a_clip_of_the_default_changes_nothing_to_the_bit():
    case = tree_case(2)
    one, other = case.surrogate(), clipped(case, code=case.hierarchy.token_clip).surrogate()
    assert one.value == other.value and torch.equal(one.coefficients, other.coefficients)


def test_the_coarsest_stratum_is_the_coarsest_that_is_switched_on():
    chain = (stratum("domain", enabled=False), stratum("modality", 1.0))
    hierarchy = fpo.Hierarchy(chain, 0.2, token_clips={"text": 0.03})
    labels = {"domain": torch.zeros(4, dtype=torch.int64), "modality": torch.tensor([0, 0, 1, 1])}
    cells = hierarchy.cells(labels, names=TREE_NAMES)
    out = fpo.gated_log_ratio(torch.tensor([0.3, 0.1, 0.3, 0.1], dtype=F64), cells, hierarchy)
    assert out.tolist() == pytest.approx([0.3, 0.1, 0.23, 0.17], abs=1e-15)


def test_what_is_refused_names_the_field():
    chain = (stratum("domain"),)
    labels = {"domain": torch.tensor([0, 1])}
    for value in (0.0, -1, float("nan"), True, "0.1"):
        with pytest.raises(ValueError, match=r"^token_clips\.math: must be"):
            fpo.Hierarchy(chain, 0.1, token_clips={"math": value})
    with pytest.raises(ValueError, match=r"^token_clips: must be a mapping from names of cells to numbers, got 0.1"):
        fpo.Hierarchy(chain, 0.1, token_clips=0.1)
    hierarchy = fpo.Hierarchy(chain, 0.1, token_clips={"maths": 0.1})
    with pytest.raises(ValueError, match=r"^names: token_clips go by cells of 'domain', so names\['domain'\] must"):
        hierarchy.cells(labels)
    with pytest.raises(ValueError, match=r"^token_clips\.maths: no cell of 'domain' .*; did you mean 'math'\?"):
        hierarchy.cells(labels, names={"domain": ["code", "math"]})
    off = (stratum("domain", enabled=False),)
    with pytest.raises(ValueError, match="^token_clips: go by the cells of the coarsest stratum, but every stratum is"):
        fpo.Hierarchy(off, 0.1, token_clips={"math": 0.1})


def test_clips_may_change_under_cells_that_are_built():
    """As budgets do: cells hold what tells tokens apart, not how they are gated."""
    case = tree_case(3)
    cells = case.cells
    changed = clipped(case, math=0.001)
    results = [fpo.surrogate(case.log_ratio, case.weight, c, changed.hierarchy) for c in (cells, changed.cells)]
    assert results[0].value == results[1].value != case.surrogate().value
