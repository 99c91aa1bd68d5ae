"""load_hierarchy: what it reads, and every refusal with its field."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import nemo_fiberpo as fpo
from nemo_fiberpo.config import reject_unknown_keys, strata_by_name

CONF = Path(__file__).parents[2] / "conf" / "hierarchy"
YAML = """
token_clip: 0.04
strata:
  domain: {budget: {pos: 0.02, neg: 0.015}, budgets: {code: {pos: 0.03, neg: 0.02}}}
  prompt_group: {budget: {pos: 0.04, neg: 0.03}, slope: {cap: 32}, enabled: false}
  trajectory: {budget: {pos: 0.12, neg: 0.05}, slope: 32, min_tokens: 8}
"""
LISTED = """
token_clip: 0.04
strata:
  - {name: domain, budget: {pos: 0.02, neg: 0.015}, budgets: {code: {pos: 0.03, neg: 0.02}}}
  - {name: prompt_group, budget: {pos: 0.04, neg: 0.03}, slope: {cap: 32}, enabled: false}
  - {name: trajectory, budget: {pos: 0.12, neg: 0.05}, slope: 32, min_tokens: 8}
"""
EXPECTED = fpo.Hierarchy(
    (
        fpo.Stratum("domain", fpo.Budget(0.02, 0.015), {"code": fpo.Budget(0.03, 0.02)}),
        fpo.Stratum("prompt_group", fpo.Budget(0.04, 0.03), slope=fpo.SlopeCap(32), enabled=False),
        fpo.Stratum("trajectory", fpo.Budget(0.12, 0.05), slope=32, min_tokens=8),
    ),
    0.04,
)


@pytest.mark.parametrize("text", [YAML, LISTED], ids=["by name", "list"])
def test_a_path_a_dict_and_a_dict_config_read_alike(tmp_path: Path, text: str):
    path = tmp_path / "hierarchy.yaml"
    path.write_text(text)
    config = OmegaConf.create(text)
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    for given in (path, str(path), config, plain):
        assert fpo.load_hierarchy(given) == EXPECTED
    assert [stratum.name for stratum in EXPECTED.active] == ["domain", "trajectory"]


def test_interpolations_are_resolved_in_their_surroundings():
    config = OmegaConf.create({"eps": 0.3, "h": {"token_clip": "${eps}", "strata": [{"name": "a", "budget": "${b}"}]}})
    config.b = {"pos": 1, "neg": 2}
    assert fpo.load_hierarchy(config.h) == fpo.Hierarchy((fpo.Stratum("a", fpo.Budget(1, 2)),), 0.3)
    config.h.token_clip = "${epps}"
    with pytest.raises(ValueError, match=r"h\.token_clip: .*epps"):
        fpo.load_hierarchy(config.h)


def edited(path: str, value: Any, text: str) -> dict[str, Any]:
    """The example with one entry set; `...` removes it. A number is the place of a stratum, in either form."""
    config: Any = copy.deepcopy(OmegaConf.to_container(OmegaConf.create(text)))
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = at(node, part)
    last = int(last) if isinstance(node, list) else key_of(node, last)
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return config


def key_of(node: dict[str, Any], part: str) -> str:
    return list(node)[int(part)] if part.isdigit() else part


def at(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list) else node[key_of(node, part)]


def by_name(message: str, text: str) -> str:
    """The pattern of a message for the mapping in `text`, from that for the list."""
    config: Any = OmegaConf.to_container(OmegaConf.create(text))

    def path(match: re.Match[str]) -> str:
        return rf"{match[1]}\.{list(config[match[1]])[int(match[2])]}"

    return re.sub(r"(strata|branches)\\\[(\d)\\\]", path, message)


REFUSALS = [
    ("token_clipp", 1, r"token_clipp: unknown key; did you mean 'token_clip'\?"),
    ("strata.1.bugdet", {}, r"strata\[1\]\.bugdet: unknown key; did you mean 'budget'\?"),
    ("strata.1.budget.poss", 1, r"strata\[1\]\.budget\.poss: unknown key; did you mean 'pos'\?"),
    ("strata.0.budgets.code.negg", 1, r"strata\[0\]\.budgets\.code\.negg: unknown key; did you mean 'neg'\?"),
    ("strata.1.slope.kap", 1, r"strata\[1\]\.slope\.kap: unknown key; did you mean 'cap'\?"),
    (
        "strata.1.zzzz",
        1,
        r"strata\[1\]\.zzzz: unknown key; valid: beside, budget, budgets, enabled, join, min_tokens, name, only, slope",
    ),
    ("token_clip", ..., "token_clip: is required"),
    ("strata", ..., "strata: is required"),
    ("strata", [], "strata: at least one stratum"),
    ("strata", "domain", "strata: must be a mapping from names to strata, coarsest first, or a list, got 'domain'"),
    ("strata", {"name": "a"}, r"strata\.name: must be a mapping, got 'a'"),
    ("strata.0", "domain", r"strata\[0\]: must be a mapping, got 'domain'"),
    ("strata.0.budget", ..., r"strata\[0\]\.budget: is required"),
    ("strata.0.budget", 0.1, r"strata\[0\]\.budget: must be a mapping, got 0.1"),
    ("strata.0.budget.neg", ..., r"strata\[0\]\.budget\.neg: is required"),
    ("strata.0.budgets", [1], r"strata\[0\]\.budgets: must be a mapping"),
    ("strata.0.budgets.code", 3, r"strata\[0\]\.budgets\.code: must be a mapping"),
    ("strata.0.enabled", "no", r"strata\[0\]\.enabled: must be true or false, got 'no'"),
    ("strata.1.slope.cap", ..., r"strata\[1\]\.slope\.cap: is required"),
    ("strata.2.min_token", 4, r"strata\[2\]\.min_token: unknown key; did you mean 'min_tokens'\?"),
    ("strata.2.min_tokens", 1, r"strata\[2\]\.min_tokens: must be a whole number of at least 2, got 1; leave it out"),
    ("strata.2.min_tokens", "8", r"strata\[2\]\.min_tokens: must be a whole number of at least 2, got '8'"),
    ("strata.0.min_tokens", 8, r"strata\[0\]\.min_tokens: 'domain' is the coarsest active stratum"),
]
for bad in (0, -1, float("inf"), float("nan"), True, "0.1", [1]):
    for field in (
        "token_clip",
        "strata.0.budget.pos",
        "strata.0.budgets.code.neg",
        "strata.2.slope",
        "strata.1.slope.cap",
    ):
        shown = field.replace(".0", "[0]").replace(".1", "[1]").replace(".2", "[2]")
        REFUSALS.append((field, bad, "".join("\\" + c if c in "[]." else c for c in shown) + ": must be"))


NAME_REFUSALS = [
    ("strata.0.name", ..., r"strata\[0\]\.name: is required"),
    ("strata.0.name", "", r"strata\[0\]\.name: must be a non-empty string"),
    ("strata.0.name", True, r"strata\[0\]\.name: must be a non-empty string, got True"),
    ("strata.2.name", "domain", r"strata\[2\]\.name: 'domain' is already the name of strata\[0\]"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSALS)
def test_refusals_name_the_field(path: str, value: Any, message: str):
    with pytest.raises(ValueError, match=rf"^{by_name(message, YAML)}"):
        fpo.load_hierarchy(edited(path, value, YAML))


@pytest.mark.parametrize(("path", "value", "message"), [*REFUSALS, *NAME_REFUSALS])
def test_refusals_name_the_field_of_a_list(path: str, value: Any, message: str):
    with pytest.raises(ValueError, match=rf"^{message}"):
        fpo.load_hierarchy(edited(path, value, LISTED))


BUDGET = {"pos": 0.2, "neg": 0.1}


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        ({1: {"budget": BUDGET}}, "strata: the name of a stratum must be a non-empty text, got 1"),
        ({"": {"budget": BUDGET}}, "strata: the name of a stratum must be a non-empty text, got ''"),
        ({"a": {"budget": BUDGET, "name": "b"}}, r"strata\.a\.name: is 'a' by its key, got 'b'; leave it out"),
        ({"a": None}, r"strata\.a: must be a mapping, got None; enabled: false switches a stratum off"),
        ({"a": {"slope": 3}}, r"strata\.a\.budget: is required$"),
        (
            {"domain": {"budget": BUDGET}, "domian": {"slope": 3}},
            r"strata\.domian\.budget: is required; did you mean the stratum 'domain'\?",
        ),
        (
            {"domain": {"budget": BUDGET}, "domian": {"budget": {"pos": 1}}},
            r"strata\.domian\.budget\.neg: is required; did you mean the stratum 'domain'\?",
        ),
        (
            {"a": {"budget": BUDGET, "budgets": {1: BUDGET, "1": BUDGET}}},
            r"strata\.a\.budgets\.1: stands there twice",
        ),
    ],
)
def test_refusals_of_names(strata: Any, message: str):
    with pytest.raises(ValueError, match=rf"^{message}"):
        fpo.load_hierarchy({"token_clip": 1, "strata": strata})


def test_a_name_that_the_key_repeats_is_the_same():
    named = {"a": {"name": "a", "budget": BUDGET}}
    assert fpo.load_hierarchy({"token_clip": 0.1, "strata": named}).strata == (fpo.Stratum("a", fpo.Budget(0.2, 0.1)),)


def test_a_key_with_null_is_as_if_it_were_left_out():
    plain: Any = OmegaConf.to_container(OmegaConf.create(YAML))
    keys = ("budgets", "slope", "enabled", "join", "only", "beside", "min_tokens")
    plain["strata"] = {name: dict.fromkeys(keys) | fields for name, fields in plain["strata"].items()}
    assert fpo.load_hierarchy(plain | {"branches": None, "sweeps": None, "expert_partitions": None}) == EXPECTED


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("strata.0.join", 0, r"strata\.domain\.join: must be a list of names, got 0"),
        ("strata.0.budgets", False, r"strata\.domain\.budgets: must be a mapping, got False"),
        ("branches", 0, "branches: must be a mapping from names to strata"),
    ],
)
def test_a_false_value_is_not_one_left_out(path: str, value: Any, message: str):
    with pytest.raises(ValueError, match=rf"^{message}"):
        fpo.load_hierarchy(edited(path, value, YAML))


def test_refusals_of_a_file_name_it(tmp_path: Path):
    path = tmp_path / "hierarchy.yaml"
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: cannot be read: No such file"):
        fpo.load_hierarchy(path)
    path.write_text("token_clip: 1\nstrata: [\n")
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: line 3: not valid YAML"):
        fpo.load_hierarchy(path)
    path.write_text(YAML.replace("neg: 0.05", "neg: '???'"))
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: strata\.trajectory\.budget\.neg: .*[Mm]issing"):
        fpo.load_hierarchy(path)
    path.write_text(YAML.replace("trajectory", "domain"))
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: line 6: not valid YAML: .*duplicate key domain"):
        fpo.load_hierarchy(str(path))
    path.write_text(LISTED.replace("trajectory", "domain"))
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: strata\[2\]\.name: 'domain' is already"):
        fpo.load_hierarchy(str(path))
    path.write_text("- a\n")
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: .*must be a mapping"):
        fpo.load_hierarchy(str(path))
    path.write_text("token_clip: 1\ntoken_clip: 2\n")
    with pytest.raises(ValueError, match=r"hierarchy\.yaml: line 2: not valid YAML: .*duplicate key"):
        fpo.load_hierarchy(str(path))


@pytest.mark.parametrize("given", [3, None, [1, 2]])
def test_something_else_is_refused(given: Any):
    with pytest.raises(ValueError, match=r"hierarchy: must be a mapping"):
        fpo.load_hierarchy(given)


def test_the_dataclasses_refuse_too():
    with pytest.raises(ValueError, match=r"pos: must be finite and greater than 0"):
        fpo.Budget(0.0, 1.0)
    with pytest.raises(ValueError, match=r"budget: must be a Budget"):
        fpo.Stratum("a", 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"budgets\.code: must be a Budget"):
        fpo.Stratum("a", fpo.Budget(1, 1), {"code": 1})  # type: ignore[dict-item]


def test_reject_unknown_keys_for_others():
    reject_unknown_keys({"a": 1}, ["a", "b"], "x")
    with pytest.raises(ValueError, match=r"^x\.learning_rat: unknown key; did you mean 'learning_rate'"):
        reject_unknown_keys({"learning_rat": 1}, ["learning_rate", "b"], "x")


BRANCHED = """
token_clip: 0.04
strata:
  domain: {budget: {pos: 0.02, neg: 0.015}}
  task: {budget: {pos: 0.03, neg: 0.02}, only: {domain: [code, math]}}
  task_language: {join: [task, language], budget: {pos: 0.03, neg: 0.02}, only: {domain: [code]}}
  trajectory: {budget: {pos: 0.12, neg: 0.05}}
branches:
  modality: {beside: domain, budget: {pos: 0.02, neg: 0.01}, budgets: {image: {pos: 0.03, neg: 0.02}}}
  expert: {budget: {pos: 0.02, neg: 0.01}, slope: {cap: 8}, enabled: false}
sweeps: 3
"""
BRANCHED_LISTED = """
token_clip: 0.04
strata:
  - {name: domain, budget: {pos: 0.02, neg: 0.015}}
  - {name: task, budget: {pos: 0.03, neg: 0.02}, only: {domain: [code, math]}}
  - {name: task_language, join: [task, language], budget: {pos: 0.03, neg: 0.02}, only: {domain: [code]}}
  - {name: trajectory, budget: {pos: 0.12, neg: 0.05}}
branches:
  - {name: modality, beside: domain, budget: {pos: 0.02, neg: 0.01}, budgets: {image: {pos: 0.03, neg: 0.02}}}
  - {name: expert, budget: {pos: 0.02, neg: 0.01}, slope: {cap: 8}, enabled: false}
sweeps: 3
"""


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
