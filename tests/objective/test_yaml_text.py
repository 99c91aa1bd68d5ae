"""YAML whose values are not what they look like, and references without an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_fiberpo import load_hierarchy
from nemo_fiberpo.yaml_text import check_yaml

STRATA = "strata: {domain: {budget: {pos: 1, neg: 0.5}}}\n"
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * ['*' + before])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token_clip: 1:30\n", "line 1: 1:30 is 90 to YAML; write that, or quote a text"),
        ("token_clip: 1:30.5\n", "line 1: 1:30.5 is 90.5 to YAML"),
        ("token_clip: 010\n", "line 1: 010 is 8 to YAML"),
        ("a: [0.5, 10:01]\n", "line 1: 10:01 is 601 to YAML"),
        (BOMB, "line 4: aliases expand to more than 1000 values"),
        ("a: &a\n  b: *a\n", r"line 2: \*a is inside its own anchor"),
        ("a: " + 200 * "[", "line 1: nested more than 100 deep"),
    ],
)
def test_a_hierarchy_has_none_of_these(tmp_path: Path, text: str, message: str):
    path = tmp_path / "h.yaml"
    path.write_text(text + STRATA)
    with pytest.raises(ValueError, match=r"h\.yaml: " + message):
        load_hierarchy(path)


def test_budgets_may_be_shared():
    check_yaml(
        "token_clip: 1.5e-1\nbudget: &b {pos: 1, neg: 0}\nstrata: {a: {budget: *b}, c: {budget: *b}}\nd: '1:30'\n"
    )


def test_numbers_too_large_for_a_float_are_refused():
    base = {"token_clip": 0.04, "strata": {"domain": {"budget": {"pos": 1, "neg": 0.5}}}}
    with pytest.raises(ValueError, match="token_clip: must be finite and greater than 0, got an integer of 1329 bits"):
        load_hierarchy(base | {"token_clip": 10**400})
    floor = {"domain": {"budget": {"pos": 1, "neg": 0.5}}, "trajectory": {"budget": {"pos": 1, "neg": 0.5}}}
    floor["trajectory"]["min_tokens"] = 10**400  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"trajectory\.min_tokens: must be a whole number"):
        load_hierarchy(base | {"strata": floor})
