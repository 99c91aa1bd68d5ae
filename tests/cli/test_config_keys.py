"""`fiberpo config` explains every key there is, with the defaults that runs get; docs/config.md is the same."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import MISSING

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.sections import (
    SECTIONS,
    algorithm_settings,
    cluster_settings,
    data_settings,
    reward_settings,
    run_settings,
)
from nemo_fiberpo.cli import main
from nemo_fiberpo.cli.compose import SHIPPED, compose
from nemo_fiberpo.cli.config_keys import TOP_LEVEL, UNSET, find, sections
from nemo_fiberpo.nemo_config import meanings as nemo
from tests.support.launching import ROOT

EVERY = sections(SHIPPED)
KEYS = [(section, key) for section in EVERY.values() for block in section.blocks for key in block.keys]
BASE_FILES = {"": "base.yaml", "algorithm.": "algorithm/base.yaml", "model.": "model/policy.yaml"}


def leaves(tree, prefix=""):
    """Dotted keys of a config file; hydra's own and references to files are no keys of a run."""
    for name, value in tree.items():
        if f"{prefix}{name}" in ("hydra", "defaults"):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_docs_config_is_current(capsys):
    assert main(["config", "--markdown"]) == 0
    written = (ROOT / "docs" / "config.md").read_text()
    assert capsys.readouterr().out == written, "python -m nemo_fiberpo.cli config --markdown > docs/config.md"


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda value: getattr(value, "name", None))
def test_every_key_has_a_meaning_and_its_values(section, key):
    assert key.meaning.endswith("."), "the text below the field"
    assert key.form or section.name in nemo.SECTIONS


def test_every_section_is_there():
    assert set(SECTIONS) == {name.partition(".")[0] for name in EVERY if name} | {
        key.name for key in EVERY[TOP_LEVEL].blocks[0].keys
    }


@pytest.mark.parametrize(("prefix", "file"), BASE_FILES.items())
def test_every_key_of_the_base_files_is_explained(prefix, file):
    tree = OmegaConf.to_container(OmegaConf.load(SHIPPED / file), resolve=False)
    for name in leaves(tree, prefix):
        assert find(name, EVERY).blocks[0].keys, name


def test_defaults_are_those_of_a_run(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, {hierarchy: domain}, {algorithm: base}, {model: policy}, _self_]\ndata: {train: prompts}\n"
    )
    cfg = compose(str(tmp_path / "mine.yaml"))
    parsed = {
        TOP_LEVEL: run_settings(cfg), "algorithm": algorithm_settings(cfg), "data": data_settings(cfg),
        "rewards": reward_settings(cfg), "cluster": cluster_settings(cfg),
    }  # fmt: skip
    seen = 0
    for name, settings in parsed.items():
        for key in EVERY[name].blocks[0].keys:
            value = settings
            for part in key.name.split("."):
                value = getattr(value, part)
            if key.default is MISSING or "${" in str(key.default):
                assert value, key.name
            elif key.name != "unsafe_tasks":  # null and [] are the same
                assert value == key.default, key.name
                seen += 1
    assert seen > 40


def shown(capsys, *arguments, width=80):
    """Status, output and error output of `fiberpo config`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        status = main(["config", *arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", [None, *filter(None, EVERY)])
def test_no_line_is_wider_than_the_terminal(capsys, name, width):
    status, out, _ = shown(capsys, *([name] if name else []), width=width)
    assert status == 0
    wide = [line for line in out.splitlines() if len(line) > width and len(line.split()) > 1]
    assert not wide, "a single word may be wider"
    if name:
        for block in EVERY[name].blocks:
            assert all(f"\n  {key.name}" in out for key in block.keys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seed", "\n  seed: 1234  (whole number, from 0 to 2147483647)\n"),
        ("algorithm.kl", "\n  kl.coefficient: 0.0  (number, at least 0)\n"),
        ("algorithm.optimizer_steps", "\n  optimizer_steps: 4  (whole number, at least 1)\n"),
        ("algorithm.data_epochs", "A resumed run may change it."),
        ("algorithm.gating.delta", "objective apc: "),
        ("data.train", "\n  train: ???  (text)\n"),
        ("rewards.max_failed", "(number, from 0 to 1)"),
        ("hierarchy.strata.domain.budget.pos", "\n  budget: ???"),
        ("hierarchy.strata.domain", "\n  min_tokens: null"),
        ("hierarchy.token_labels.segment.markers.think", "\n  markers: ???"),
        ("trainer.ppo.max_steps", "\n  ppo: {...}\n"),
        ("model.num_moe_experts", "\n  num_moe_experts\n"),
    ],
)
def test_a_key_is_found_by_its_dotted_name(capsys, name, words):
    status, out, _ = shown(capsys, name)
    assert status == 0 and words in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("algoritm", "did you mean algorithm?"),
        ("algorithm.epoch", "did you mean algorithm.epochs?"),
        ("samples_per_prompt", "did you mean algorithm.samples_per_prompt?"),
        ("hierarchy.strata.domain.buget", "did you mean hierarchy.strata.budget?"),
        ("zzz", "sections: hierarchy, hierarchy.strata, "),
        ("model.hidden_size", "NeMo may"),
    ],
)
def test_an_unknown_name_gets_the_nearest(capsys, name, words):
    status, out, error = shown(capsys, name)
    assert status == 2 and not out
    assert error.startswith(f"error: {name}: ") and words in error and len(error.splitlines()) == 1


def test_keys_that_a_file_leaves_to_nemo_have_no_default():
    (key,) = find("model.tokenizer", EVERY).blocks[0].keys
    assert key.default == UNSET


def test_it_needs_neither_nemo_nor_megatron():
    code = """
import sys
from nemo_fiberpo.cli import main
main(["config", "algorithm"])
found = {"nemo", "nemo_aligner", "megatron", "hydra", "lightning", "transformers", "matplotlib"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_keys_that_a_resumed_run_may_change_are_those_of_the_document():
    (row,) = re.findall(
        r"^\| (`algorithm\.rl_steps`.*) \| may change \|$", (ROOT / "docs/checkpoints.md").read_text(), re.M
    )
    marked = {key.name for section, key in KEYS if key.may_change and section.name in ("algorithm", "rewards")}
    assert {name.rpartition(".")[2] for name in re.findall(r"`([^`]+)`", row)} == marked
    assert {key.name for section, key in KEYS if key.may_change and section.name == "data"} == {"train", "heldout"}
