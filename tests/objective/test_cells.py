"""Cells from labels: nesting, names, what is refused; levels switched off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.cases import F64, make_hierarchy

LABELS = {"domain": torch.tensor([0, 0, 1, 1]), "prompt_group": torch.tensor([3, 3, 9, 8])}


def test_levels_by_hand():
    cells = make_hierarchy(2).cells(LABELS, torch.tensor([True, False, True, True]))
    domain, group = cells.level("domain"), cells.level("prompt_group")
    assert domain.label_C.tolist() == [0, 1] and domain.count_C.tolist() == [1.0, 2.0]
    assert group.label_C.tolist() == [3, 8, 9] and group.count_C.tolist() == [1.0, 1.0, 1.0]
    assert cells.cell_per_token("prompt_group")[[0, 2, 3]].tolist() == [0, 2, 1]
    assert cells.cell_per_token("domain")[[0, 2, 3]].tolist() == [0, 1, 1]
    # stratum, label, those of its parent, live tokens
    expected = [[0, 0, -1, 0, 1], [0, 1, -1, 0, 2], [1, 3, 0, 0, 1], [1, 8, 0, 1, 1], [1, 9, 0, 1, 1]]
    assert cells.census().tolist() == expected


@pytest.mark.parametrize("named", [False, True])
def test_a_prompt_group_in_two_domains_is_refused(named: bool):
    labels = {"domain": torch.tensor([0, 0, 1]), "prompt_group": torch.tensor([4, 5, 5])}
    names = {"domain": ["math", "code"]} if named else None
    shown = r"domain 0 \('math'\) and in domain 1 \('code'\)" if named else "domain 0 and in domain 1"
    with pytest.raises(ValueError, match=rf"labels\['prompt_group'\]: value 5 has tokens in {shown}"):
        make_hierarchy(2).cells(labels, names=names)


def test_a_row_in_two_domains_is_refused_with_a_shape_too():
    labels = {"domain": torch.tensor([0, 1, 1, 1]), "prompt_group": torch.tensor([4, 4, 5, 5])}
    with pytest.raises(ValueError, match=r"labels\['prompt_group'\]: value 4 has tokens in domain 0 and in domain 1"):
        make_hierarchy(2).cells(labels, shape=(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"domain": LABELS["domain"]}}, r"labels: the active stratum 'prompt_group' .*given: 'domain'"),
        (
            {"labels": {**LABELS, "domain": LABELS["domain"].int()}},
            r"labels\['domain'\]: must be .*int64, got torch.int32",
        ),
        (
            {"labels": {**LABELS, "domain": [0, 0, 1, 1]}},
            r"labels\['domain'\]: must be a tensor of torch.int64, got list",
        ),
        (
            {"labels": {**LABELS, "prompt_group": torch.tensor([1])}},
            r"labels\['prompt_group'\]: has 1 tokens, .* has 4",
        ),
        ({"labels": {**LABELS, "domain": LABELS["domain"].view(2, 2)}}, r"labels\['domain'\]: must have one dimension"),
        ({"mask": torch.ones(4)}, "mask: must be a tensor of torch.bool, got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask: has 3 tokens"),
        ({"shape": (2, 3)}, "shape: 2 x 3 is not the number of tokens, 4"),
        ({"shape": (4,)}, r"shape: must be two integers \(B, S\)"),
        ({"shape": (-2, -2)}, r"shape: must be two integers \(B, S\)"),
        ({"names": {"domains": ["a", "b"]}}, "names: no stratum is called 'domains'; did you mean 'domain'"),
        ({"names": {"domain": ["a"]}}, r"labels\['domain'\]: value 1 has no name; names\['domain'\] has 1"),
        ({"names": {"domain": ["a", "a"]}}, r"names\['domain'\]: names must be unique"),
    ],
)
def test_refusals_name_the_field(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_hierarchy(2).cells(**{"labels": LABELS, **change})


def test_overrides_need_names_and_a_cell_of_that_name():
    strata = (fpo.Stratum("domain", fpo.Budget(1, 1), budgets={"cod": fpo.Budget(2, 2)}),)
    hierarchy = fpo.Hierarchy(strata, 0.1)
    with pytest.raises(ValueError, match=r"names: stratum 'domain' overrides the budgets of \['cod'\]"):
        hierarchy.cells(LABELS)
    with pytest.raises(ValueError, match=r"stratum 'domain', budgets.cod: no cell .* did you mean 'code'"):
        hierarchy.cells(LABELS, names={"domain": ["math", "code"]})


def test_labels_of_other_strata_are_not_read():
    other = {**LABELS, "router": torch.zeros(2)}
    assert make_hierarchy(2).cells(other).num_cells("domain") == 2


@pytest.mark.parametrize("num_strata", [1, 3])
@pytest.mark.parametrize(("shape", "masked"), [((2, 3), False), ((2, 3), True), (None, True)])
def test_no_labels_are_needed_where_every_stratum_is_switched_off(
    num_strata: int, shape: tuple[int, int] | None, masked: bool
):
    hierarchy = make_hierarchy(num_strata, enabled=False)
    mask = torch.tensor([True, True, False, True, True, True]) if masked else None
    cells = hierarchy.cells({}, mask, shape=shape)
    ell = torch.tensor([0.01, -0.01, math.nan if masked else 0.3, 0.9, -0.9, 0.0], dtype=F64)
    weight = torch.arange(1.0, 7.0, dtype=F64)
    live = torch.ones(6, dtype=torch.bool) if mask is None else mask
    gated = torch.where(live, ell.clamp(-0.04, 0.04), 0.0)
    result = fpo.surrogate(ell, weight, cells, hierarchy)
    assert result.value == pytest.approx((weight * gated.exp())[live].sum().item(), abs=1e-13)
    inside = live & (ell.abs() <= 0.04)
    torch.testing.assert_close(result.coefficients, torch.where(inside, weight * gated.exp(), 0.0), rtol=1e-15, atol=0)
    assert torch.equal(fpo.gated_log_ratio(ell, cells, hierarchy), gated)
    metrics = result.report.metrics()
    assert metrics["token/live"] == live.sum() and metrics["token/clipped"] == (live & ~inside).sum() / live.sum()
    assert result.report.strata == () and result.report.histograms() == {}
    grpo = fpo.surrogate(ell, weight, cells, hierarchy, gating=fpo.PpoClip(0.2, 0.2))
    assert grpo.coefficients[0].item() == pytest.approx(math.exp(0.01))


def test_refusals_of_an_empty_hierarchy():
    hierarchy = make_hierarchy(2, enabled=False)
    with pytest.raises(ValueError, match="labels: with no active stratum, labels, mask or shape must tell the number"):
        hierarchy.cells({})
    assert hierarchy.cells(LABELS).num_tokens == 4, "labels that nothing needs tell it too"
    with pytest.raises(ValueError, match="token_clips: go by the cells of the coarsest stratum, but every stratum"):
        replace(hierarchy, token_clips={"code": 0.1})


def test_a_hierarchy_describes_itself():
    hierarchy = fpo.Hierarchy(
        (
            fpo.Stratum("domain", fpo.Budget(0.02, 0.015), {"code": fpo.Budget(0.03, 0.02)}, fpo.SlopeCap(32)),
            fpo.Stratum("trajectory", fpo.Budget(0.1, 0.05), enabled=False),
        ),
        0.04,
    )
    first, second, token, gate = hierarchy.describe().splitlines()
    assert "C+ 0.02  C- 0.015  k min(token count, 32)  code: C+ 0.03 C- 0.02" in first
    assert "k token count  (switched off)" in second and token.split() == ["token", "clip", "0.04"]
    assert gate.split() == ["gate", "rollback"]
