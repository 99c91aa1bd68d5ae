"""load_hierarchy: what it reads, and every refusal with its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import nemo_fiberpo as fpo
from nemo_fiberpo.config import reject_unknown_keys
from tests.objective.config_edits import LISTED, YAML, by_name, edited

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


REFUSALS = [
    ("token_clipp", 1, r"token_clipp: unknown key; did you mean 'token_clip'\?"),
    ("strata.1.bugdet", {}, r"strata\[1\]\.bugdet: unknown key; did you mean 'budget'\?"),
    ("strata.1.budget.poss", 1, r"strata\[1\]\.budget\.poss: unknown key; did you mean 'pos'\?"),
    ("strata.0.budgets.code.negg", 1, r"strata\[0\]\.budgets\.code\.negg: unknown key; did you mean 'neg'\?"),
    ("strata.1.slope.kap", 1, r"strata\[1\]\.slope\.kap: unknown key; did you mean 'cap'\?"),
    (
        "strata.1.zzzz",
        1,
        r"strata\[1\]\.zzzz: unknown key; valid: beside, budget, budgets, enabled, gate, join, min_tokens, name, only",
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
            r"strata\.a\.budgets\.1: is given twice",
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


@pytest.mark.parametrize("text", [YAML, LISTED], ids=["by name", "list"])
def test_gates_and_token_clips_are_read(text: str):
    config = edited("strata.2.gate", "soft", text) | {"token_clips": {"code": 0.06}}
    read = fpo.load_hierarchy(config)
    assert [stratum.gate.name for stratum in read.strata] == ["rollback", "rollback", "soft"]
    assert read.token_clips == {"code": 0.06} and read.token_clip == 0.04
    for path, value, message in [
        (
            "strata.2.gate",
            "sofd",
            r"strata\[2\]\.gate: must be one of rollback, clip, soft, or package\.module:function",
        ),
        ("strata.2.gate", "math:sin", r"strata\[2\]\.gate: 'math:sin' fails"),
        ("token_clips", 0.1, "token_clips: must be a mapping"),
        ("token_clips", {"code": 0}, r"token_clips\.code: must be finite and greater than 0"),
    ]:
        with pytest.raises(ValueError, match=rf"^{by_name(message, text) if text is YAML else message}"):
            fpo.load_hierarchy(edited(path, value, text))
