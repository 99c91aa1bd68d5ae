"""load_hierarchy: branches, joins and missing levels, both forms of lists of strata, shipped files, warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import nemo_fiberpo as fpo
from nemo_fiberpo.budget_warnings import overrun_warnings
from nemo_fiberpo.plain import strata_by_name
from tests.objective.config_edits import BRANCHED, BRANCHED_LISTED, YAML, by_name, edited

CONF = Path(__file__).parents[2] / "conf" / "hierarchy"
BUDGET = {"pos": 0.2, "neg": 0.1}


@pytest.mark.parametrize("text", [BRANCHED, BRANCHED_LISTED], ids=["by name", "list"])
def test_branches_joins_and_missing_levels_are_read(text: str):
    hierarchy = fpo.load_hierarchy(OmegaConf.create(text))
    budget = fpo.Budget(0.03, 0.02)
    assert hierarchy == fpo.Hierarchy(
        (
            fpo.Stratum("domain", fpo.Budget(0.02, 0.015)),
            fpo.Stratum("task", budget, only={"domain": ("code", "math")}),
            fpo.Stratum("task_language", budget, join=("task", "language"), only={"domain": ("code",)}),
            fpo.Stratum("trajectory", fpo.Budget(0.12, 0.05)),
        ),
        0.04,
        (
            fpo.Stratum("modality", fpo.Budget(0.02, 0.01), {"image": budget}, beside="domain"),
            fpo.Stratum("expert", fpo.Budget(0.02, 0.01), slope=fpo.SlopeCap(8), enabled=False),
        ),
        3,
    )
    assert [stratum.name for stratum in hierarchy.active] == [
        "domain",
        "task",
        "task_language",
        "trajectory",
        "modality",
    ]
    assert hierarchy.columns == ("domain", "task", "language", "trajectory", "modality")
    assert hierarchy.optional_columns == {"task", "language"}


BRANCH_REFUSALS = [
    ("branchs", [], r"branchs: unknown key; did you mean 'branches'\?"),
    ("sweps", 2, r"sweps: unknown key; did you mean 'sweeps'\?"),
    ("branches.0.besid", "domain", r"branches\[0\]\.besid: unknown key; did you mean 'beside'\?"),
    ("strata.1.ony", {}, r"strata\[1\]\.ony: unknown key; did you mean 'only'\?"),
    ("strata.2.joins", [], r"strata\[2\]\.joins: unknown key; did you mean 'join'\?"),
    ("branches.0.budget.poss", 1, r"branches\[0\]\.budget\.poss: unknown key; did you mean 'pos'\?"),
    ("branches", 3, "branches: must be a mapping from names to strata"),
    ("branches.0", "modality", r"branches\[0\]: must be a mapping"),
    ("branches.0.budget", ..., r"branches\[0\]\.budget: is required"),
    ("branches.0.beside", "domian", r"branches\[0\]\.beside: no stratum .* 'domian'; did you mean 'domain'\?"),
    ("branches.0.beside", 3, r"branches\[0\]\.beside: must be the name of a stratum, got 3"),
    ("strata.2.join", "domain", r"strata\[2\]\.join: must be a list of names, got 'domain'"),
    ("strata.2.join", ["task", 3], r"strata\[2\]\.join: must be a list of names"),
    ("strata.2.join", ["domain", "task"], r"strata\[2\]\.join: every task lies in one domain"),
    ("strata.1.only", ["code"], r"strata\[1\]\.only: must be a mapping"),
    ("strata.1.only.domain", "code", r"strata\[1\]\.only\.domain: must be a list of names, got 'code'"),
    ("strata.1.only.domain", [], r"strata\[1\]\.only\.domain: must name at least one cell"),
    ("strata.0.enabled", False, r"strata\[1\]\.only\.domain: is switched off"),
    ("sweeps", 0, "sweeps: must be a whole number of at least 1, got 0"),
    ("sweeps", 1.5, "sweeps: must be a whole number of at least 1, got 1.5"),
    ("sweeps", True, "sweeps: must be a whole number of at least 1, got True"),
    ("branches", [], "sweeps: repeats the extraction of branches, but there are none"),
]


@pytest.mark.parametrize(("path", "value", "message"), BRANCH_REFUSALS)
def test_refusals_of_branches_name_the_field(path: str, value: Any, message: str):
    with pytest.raises(ValueError, match=rf"^{by_name(message, BRANCHED)}"):
        fpo.load_hierarchy(edited(path, value, BRANCHED))
    with pytest.raises(ValueError, match=rf"^{message}"):
        fpo.load_hierarchy(edited(path, value, BRANCHED_LISTED))


def test_a_branch_with_the_name_of_a_stratum_is_refused_in_the_form_of_each():
    listed: Any = edited("branches.0.name", "task", BRANCHED_LISTED)
    with pytest.raises(ValueError, match=r"^branches\[0\]\.name: 'task' is already the name of strata\[1\]; the same"):
        fpo.load_hierarchy(listed)
    named: Any = edited("branches.task", {"budget": BUDGET}, BRANCHED)
    with pytest.raises(ValueError, match=r"^branches\.task: 'task' is already the name of strata\.task; the same"):
        fpo.load_hierarchy(named)
    with pytest.raises(ValueError, match=r"^branches\[0\]\.name: 'task' is already the name of strata\.task; the same"):
        fpo.load_hierarchy(named | {"branches": listed["branches"]})


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_hierarchy_is_read(path: Path, caplog: pytest.LogCaptureFixture):
    assert fpo.load_hierarchy(path).active
    assert isinstance(OmegaConf.load(path).strata, DictConfig), "by name"
    assert len(caplog.records) == (path.stem == "state"), "neg = pos there"


def test_a_list_of_strata_is_a_mapping_by_name():
    listed: Any = OmegaConf.to_container(OmegaConf.create(BRANCHED_LISTED))
    named: Any = OmegaConf.to_container(OmegaConf.create(BRANCHED))
    for key in ("strata", "branches"):
        found = strata_by_name(listed[key])
        assert found == named[key] and list(found) == list(named[key])
        assert strata_by_name(named[key]) is named[key]


@pytest.mark.parametrize("value", [None, 3, [3], [{"slope": 3}], [{"name": 3}], [{"name": "a"}, {"name": "a"}]])
def test_what_is_no_list_of_strata_with_names_of_their_own_stays_as_it_is(value: Any):
    assert strata_by_name(value) is value


def warned(text: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    fpo.load_hierarchy(OmegaConf.create(text))
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    return [record.getMessage() for record in caplog.records]


def test_a_budget_for_falling_as_wide_as_that_for_rising_is_warned_about(caplog: pytest.LogCaptureFixture):
    assert warned(YAML, caplog) == []
    assert warned(YAML.replace("pos: 0.04, neg: 0.03", "pos: 0.04, neg: 0.3"), caplog) == [], "it is switched off"
    (line,) = warned(YAML.replace("pos: 0.02, neg: 0.015", "pos: 0.02, neg: 0.02"), caplog)
    assert line.startswith("stratum 'domain', budget: neg 0.02 is not less than pos 0.02; the paper recommends")
    (line,) = warned(YAML.replace("pos: 0.03, neg: 0.02", "pos: 0.03, neg: 0.1"), caplog)
    assert line.startswith("stratum 'domain', budgets.code: neg 0.1 is not less than pos 0.03")
    (line,) = warned(
        BRANCHED.replace("beside: domain, budget: {pos: 0.02,", "beside: domain, budget: {pos: 0.005,"), caplog
    )
    assert line.startswith("stratum 'modality', budget: neg 0.01 is not less than pos 0.005")


def test_a_token_clip_above_both_budgets_of_the_finest_stratum_is_warned_about(caplog: pytest.LogCaptureFixture):
    for quiet in (0.04, 0.05, 0.12):
        assert warned(YAML.replace("token_clip: 0.04", f"token_clip: {quiet}"), caplog) == []
    (line,) = warned(YAML.replace("token_clip: 0.04", "token_clip: 0.13"), caplog)
    assert line.startswith(
        "token_clip: 0.13 is greater than both budgets of the finest stratum, 'trajectory' (pos 0.12,"
    )
    off = YAML.replace("token_clip: 0.04", "token_clip: 0.13").replace("slope: 32", "enabled: false")
    (line,) = warned(off, caplog)
    assert "'domain' (pos 0.02, neg 0.015)" in line


def test_a_warning_about_a_file_names_it_and_comes_from_the_first_rank_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "wide.yaml"
    path.write_text(YAML.replace("token_clip: 0.04", "token_clip: 0.5"))
    monkeypatch.setenv("RANK", "1")
    fpo.load_hierarchy(path)
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    fpo.load_hierarchy(path)
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [str(path)]


def test_a_stratum_whose_median_cell_is_over_budget_is_warned_about():
    """Three trajectories of one domain, each drifting by its own amount in the falling channel."""
    hierarchy = fpo.Hierarchy(
        (fpo.Stratum("domain", fpo.Budget(0.5, 0.4)), fpo.Stratum("trajectory", fpo.Budget(0.2, 0.1))), 0.04
    )
    labels = {"domain": torch.zeros(6, dtype=torch.int64), "trajectory": torch.arange(3).repeat_interleave(2)}
    cells = hierarchy.cells(labels, names={"domain": ("math",)})

    def warned_about(*drift: float) -> dict[str, str]:
        log_ratio = -torch.tensor(drift, dtype=torch.float64).repeat_interleave(2)
        return overrun_warnings(fpo.surrogate(log_ratio, torch.ones(6, dtype=torch.float64), cells, hierarchy).report)

    assert warned_about(0.1, 0.15, 0.3) == {}, "one of three is over budget"
    (line,) = warned_about(0.0, 0.0, 0.6).values()
    assert "'trajectory'" in line and "neg 0.27 nats" in line and "raise its budgets" in line
    assert set(warned_about(0.9, 0.9, 0.9)) == {"domain"}, "none moves beyond its domain"
