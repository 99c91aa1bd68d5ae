"""An objective is one line of YAML, or one word of the command line: conf/algorithm and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import OBJECTIVES

ROOT = Path(__file__).parents[2]

SHIPPED = {
    "base": ("fiberpo", "trajectory_mean", None),
    "fiberpo": ("fiberpo", "trajectory_mean", None),
    "fiberpo_paper": ("fiberpo", "trajectory_mean", None),
    "ppo": ("ppo", "token_mean", fpo.PpoClip(0.2, 0.2)),
    "grpo": ("grpo", "trajectory_mean", fpo.PpoClip(0.2, 0.2)),
    "dapo": ("grpo", "token_mean", fpo.PpoClip(0.2, 0.28)),
    "gspo": ("gspo", "trajectory_mean", fpo.Gspo(3e-4, 4e-4)),
    "truly_ppo": ("truly_ppo", "token_mean", fpo.TrulyPpo(0.2, 0.3)),
    "apc": ("apc", "trajectory_mean", fpo.Apc(0.05)),
    "cispo": ("cispo", "token_mean", fpo.Cispo(1.0, 4.0)),
    "sapo": ("sapo", "trajectory_mean", fpo.Sapo(1.0, 1.05)),
    "dppo_tv": ("dppo_tv", "token_mean", fpo.DppoTv(0.15, 20.0)),
    "gmpo": ("gmpo", "trajectory_mean", fpo.Gmpo(0.4, 0.4)),
    "apc_state": ("apc", "token_mean", fpo.Apc(0.05, stratum="state")),
}


def composed(*overrides: str):
    hydra = pytest.importorskip("hydra")
    checks = pytest.importorskip("nemo_fiberpo.aligner.config.checks")
    hydra_config = pytest.importorskip("nemo_fiberpo.hydra_support.command_line")
    settings = pytest.importorskip("nemo_fiberpo.aligner.config.sections")
    hydra_config.register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = hydra.compose("quickstart", ["run_dir=/nowhere", *hydra_config.overrides(overrides)])
    return settings.algorithm_settings(cfg), checks.check_sections(cfg)[0]


def test_every_algorithm_file_is_listed():
    assert {path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml")} == set(SHIPPED)
    assert {entry[0] for entry in SHIPPED.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_objective_is_one_word_of_the_command_line(name: str):
    settings, hierarchy = composed(f"algorithm={name}", *(["hierarchy=state"] if name == "apc_state" else []))
    assert (settings.objective, settings.weights, settings.gating_map) == SHIPPED[name]
    assert settings.prompts_per_rollout == 96, "the other keys of the run stay"
    fpo.objective.check_gating(settings.gating_map, hierarchy)


def test_the_training_script_checks_an_objective(tmp_path: Path):
    pytest.importorskip("hydra")
    script = [sys.executable, str(ROOT / "examples" / "train_gpt_fiberpo.py"), "--check", "--config-name", "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for argument, said in (
        ("algorithm.gating.stratum=trajectory", ""),
        ("algorithm.gating.lo=1", "did you mean 'low'"),
    ):
        command = [*script, "algorithm=gspo", argument, f"run_dir={tmp_path}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
        assert (done.returncode == 0) == (not said) and said in done.stderr, done.stderr


def test_fields_of_an_objective_can_be_overridden():
    assert composed("algorithm=fiberpo")[0].use_min and not composed("algorithm=fiberpo_paper")[0].use_min
    assert not composed("algorithm=fiberpo", "algorithm.gating.use_min=false")[0].use_min
    settings, _ = composed("algorithm=gspo", "algorithm.gating.high=0.01", "algorithm.weights=token_mean")
    assert settings.gating == fpo.Gspo(3e-4, 0.01) and settings.weights == "token_mean"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.objective=gsop"], ["algorithm.objective", "did you mean 'gspo'"]),
        (["algorithm.objective=grpo"], ["algorithm.gating.low: is required"]),
        (["algorithm.gating.low=0.2"], ["algorithm.gating.low", "fiberpo", "hierarchy"]),
        (["algorithm.gating.use_min=1"], ["algorithm.gating.use_min: must be true or false"]),
        (["algorithm=grpo", "algorithm.gating.lo=0.2"], ["algorithm.gating.lo", "did you mean 'low'"]),
        (["algorithm=grpo", "algorithm.objective=truly_ppo"], ["algorithm.gating.low: unknown key"]),
        (["algorithm=grpo", "algorithm.gating.high=-1"], ["algorithm.gating.high", "greater than 0"]),
        (["algorithm=grpo", "algorithm.gating=3"], ["algorithm.gating: must be a mapping"]),
        (["algorithm=apc", "algorithm.gating.delta=0"], ["algorithm.gating.delta", "greater than 0"]),
    ],
)
def test_refusals_of_the_algorithm_section(overrides: list[str], words: list[str]):
    with pytest.raises(ValueError) as error:
        composed(*overrides)
    for word in words:
        assert word in str(error.value)
