"""Strata in what Hydra composes: by name in whichever form a file has them; mappings merge, lists replace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.checks import check_sections
from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.hydra_support import named_strata

LISTED = """
token_clip: 0.04
strata:
  - {name: domain, budget: {pos: 0.02, neg: 0.015}}
  - {name: trajectory, budget: {pos: 0.12, neg: 0.05}, slope: 32}
branches:
  - {name: modality, beside: domain, budget: {pos: 0.02, neg: 0.015}}
"""
TWO = "[{name: domain, budget: {pos: 0.2, neg: 0.1}}, {name: trajectory, budget: {pos: 0.3, neg: 0.2}}]"
FILES = {
    "hierarchy/listed.yaml": LISTED,
    "hierarchy/built_on_it.yaml": "defaults: [listed, _self_]\nstrata: {domain: {budget: {pos: 0.5}}}\n",
    "merges.yaml": "defaults: [quickstart, _self_]\nhierarchy: {strata: {domain: {budget: {pos: 0.5}}}}\n",
    "lists.yaml": f"defaults: [quickstart, _self_]\nhierarchy: {{strata: {TWO}}}\n",
    "lists_no_names.yaml": "defaults: [quickstart, _self_]\nhierarchy: {strata: [{budget: {pos: 1, neg: 1}}]}\n",
    "merges_over_a_list.yaml": "defaults: [lists, _self_]\nhierarchy: {strata: {domain: {budget: {pos: 0.5}}}}\n",
    "lists_over_a_mapping.yaml": f"defaults: [merges, _self_]\nhierarchy: {{strata: {TWO}}}\n",
    "all_its_own.yaml": (
        "defaults: [base, {algorithm: fiberpo}, {model: tiny_moe}, _self_]\n"
        f"hierarchy: {{token_clip: 0.04, strata: {TWO}}}\n"
    ),
    "twice.yaml": "defaults: [quickstart, _self_]\nhierarchy:\n  strata:\n    a: {slope: 1}\n    a: {slope: 2}\n",
}
BOTH = {"domain": {"budget": {"pos": 0.2, "neg": 0.1}}, "trajectory": {"budget": {"pos": 0.3, "neg": 0.2}}}
QUICKSTART = {
    "domain": {"budget": {"pos": 0.04, "neg": 0.03}},
    "prompt_group": {"budget": {"pos": 0.08, "neg": 0.06}},
    "trajectory": {"budget": {"pos": 0.24, "neg": 0.12}, "slope": {"cap": 32}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def composed(folder: Path, name: str, *overrides: str) -> Any:
    """The `hierarchy` of that file with overrides, checked as a run checks it."""
    cfg = compose(str(folder / f"{name}.yaml"), ["run_dir=/nowhere", *overrides])
    check_sections(cfg)
    return OmegaConf.to_container(cfg.hierarchy)


def changed(strata: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    return strata | {name: strata.get(name, {}) | fields}


SHORTER = f"hierarchy.strata={TWO}"
CASES = [
    ("lists", [], BOTH),
    ("lists", ["hierarchy.strata.domain.budget.pos=0.5"], changed(BOTH, "domain", budget={"pos": 0.5, "neg": 0.1})),
    ("lists", ["hierarchy.strata.domain.slope=3"], changed(BOTH, "domain", slope=3)),
    ("lists", ["~hierarchy.strata.domain"], {"trajectory": BOTH["trajectory"]}),
    ("merges", [], changed(QUICKSTART, "domain", budget={"pos": 0.5, "neg": 0.03})),
    ("merges", [SHORTER], BOTH),
    ("merges", [SHORTER, "hierarchy.strata.domain.slope=3"], changed(BOTH, "domain", slope=3)),
    ("merges_over_a_list", [], changed(BOTH, "domain", budget={"pos": 0.5, "neg": 0.1})),
    ("lists_over_a_mapping", [], BOTH),
    ("all_its_own", ["hierarchy.strata.domain.enabled=false"], changed(BOTH, "domain", enabled=False)),
]


@pytest.mark.parametrize(("name", "overrides", "wanted"), CASES)
def test_a_mapping_merges_and_a_list_replaces(folder: Path, name: str, overrides: list[str], wanted: dict[str, Any]):
    found = composed(folder, name, *overrides)["strata"]
    assert found == wanted and list(found) == list(wanted)


def test_a_group_file_with_lists_is_overridden_by_name_and_built_upon(folder: Path):
    group = "hierarchy=listed"
    found = composed(folder, "all_its_own", f"+{group}", "hierarchy.strata.domain.budget.pos=0.06")
    assert list(found["strata"]) == ["domain", "trajectory"], "the body's list replaces the group's"
    (folder / "plain.yaml").write_text("defaults: [quickstart, {override hierarchy: listed}, _self_]\n")
    found = composed(folder, "plain", "hierarchy.strata.domain.budget.pos=0.06", "hierarchy.branches.modality.slope=3")
    assert found["strata"]["domain"] == {"budget": {"pos": 0.06, "neg": 0.015}}
    assert found["branches"] == {"modality": {"beside": "domain", "budget": {"pos": 0.02, "neg": 0.015}, "slope": 3}}
    found = composed(folder, "plain", "hierarchy=built_on_it")
    assert found["strata"]["domain"] == {"budget": {"pos": 0.5, "neg": 0.015}} and found["token_clip"] == 0.04


def test_a_stratum_that_is_added_is_the_finest(folder: Path):
    found = composed(folder, "lists", "+hierarchy.strata.turn={budget: {pos: 0.4, neg: 0.3}}")
    assert list(found["strata"]) == ["domain", "trajectory", "turn"]


def test_slopes_are_overridden_whichever_form_they_have(folder: Path):
    found = composed(folder, "merges", "hierarchy.strata.trajectory.slope=3", "hierarchy.strata.domain.slope.cap=4")
    assert found["strata"]["trajectory"]["slope"] == 3 and found["strata"]["domain"]["slope"] == {"cap": 4}


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("lists_no_names", [], r"^hierarchy\.strata\[0\]\.name: is required"),
        (
            "lists",
            ["hierarchy.strata.domain.budget.pos=-1"],
            r"^hierarchy\.strata\.domain\.budget\.pos: must be finite",
        ),
        (
            "lists",
            ["hierarchy.strata.domian.slope=3"],
            r"^hierarchy\.strata\.domian\.budget: is required; did you mean",
        ),
        ("lists", ["hierarchy.strata=3"], r"^hierarchy\.strata: must be a mapping from names to strata"),
        (
            "merges",
            ["hierarchy.strata.domain=null"],
            r"^hierarchy\.strata\.domain: must be a mapping, got None; enabled",
        ),
        ("twice", [], r'twice\.yaml: .*line 4.* found duplicate key a in ".*twice\.yaml", line 5'),
    ],
)
def test_refusals(folder: Path, name: str, overrides: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        composed(folder, name, *overrides)


def test_what_hydra_lacks_is_named(monkeypatch: pytest.MonkeyPatch):
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    monkeypatch.setattr(named_strata, "_installed", False)
    composing = ConfigLoaderImpl._compose_config_from_defaults_list
    monkeypatch.delattr(ConfigLoaderImpl, "_apply_overrides_to_config")
    with pytest.raises(ImportError, match=r"ConfigLoaderImpl\._apply_overrides_to_config does not exist"):
        named_strata.install()
    assert ConfigLoaderImpl._compose_config_from_defaults_list is composing
