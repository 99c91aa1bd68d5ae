"""The training script as a user runs it: real NeMo-Aligner, real processes, a few steps of a tiny policy.

What must hold: a run leaves what it should, every parallel layout trains, and bad input is explained.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from nemo_fiberpo.aligner.config.checks import check_sections
from nemo_fiberpo.aligner.config.model_checks import partition_table
from nemo_fiberpo.hydra_support.command_line import overrides, register_resolvers
from tests.support import forked
from tests.support.launching import (
    DENSE,
    ROOT,
    arguments,
    check_each,
    environment,
    fresh,
    metrics,
    optimizer_steps,
)

pytestmark = pytest.mark.timeout(600)


def test_a_run_leaves_metrics_checkpoints_and_a_policy(uninterrupted):
    steps = optimizer_steps(uninterrupted)
    assert [row["step"] for row in steps] == list(range(16)), "4 RL steps x 2 epochs x 2 minibatches"
    for row in steps:
        first = row["step"] % 4 == 0
        assert row["train_optim/on_policy"] == float(first)
        assert row["train_optim/gate_all_reduces"] == (0.0 if first else 2.0)
        assert math.isfinite(row["train_optim/grad_norm"])
        # float32: pass D repeats pass A, and the old log-probs on-policy
        assert row["train_optim/recompute_error"] < 1e-5
        assert row["train_optim/kl_penalty"] >= 0.0
        if not first:
            for stratum in ("domain", "prompt_group", "trajectory"):
                for channel in ("pos", "neg"):
                    regimes = [
                        row[f"train_optim/gates/{stratum}/{channel}/{r}"]
                        for r in ("pass_through", "rollback", "zeroed")
                    ]
                    assert sum(regimes) == pytest.approx(1.0)
    assert any(row["train_optim/gates/log_ratio/abs_mean"] > 0 for row in steps if "train_optim/loss" in row)
    rollouts = [row for row in metrics(uninterrupted) if "train_rollouts/rewards" in row]
    assert [row["train_rollouts/consumed_samples"] for row in rollouts] == [8.0, 16.0, 24.0, 32.0]
    checkpoints = {path.name for path in (uninterrupted / "nemo" / "checkpoints").iterdir()}
    assert any(name.startswith("fiberpo-step=2-consumed_samples=16-") for name in checkpoints)
    assert "quickstart.nemo" in checkpoints
    assert list((uninterrupted / "nemo").glob("events.out.tfevents*")), "a TensorBoard log"


ONE_STEP = ["algorithm.rl_steps=1", "algorithm.save_interval=0"]
LAYOUTS = {
    "tensor parallel": [*DENSE, "model.tensor_model_parallel_size=2"],
    "pipeline parallel": ["model.pipeline_model_parallel_size=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains(start, dense_start, tmp_path, layout):
    run_dir = fresh(dense_start if layout == "tensor parallel" else start, tmp_path, "run")
    forked.launch("train_gpt_fiberpo.py", run_dir, *ONE_STEP, *LAYOUTS[layout])
    first, second = optimizer_steps(run_dir)
    assert first["train_optim/on_policy"] == 1.0 and second["train_optim/gate_all_reduces"] == 2.0
    assert first["train_optim/recompute_error"] < 1e-5
    assert second["train_optim/gates/trajectory/cells"] == 16.0


WRONG = {
    "algorithm.samples_per_promt=4": "did you mean 'samples_per_prompt'",
    "hierarchy.strata.domian.slope=3": "did you mean the stratum 'domain'",
    "hierarchy.strata.domain.budget.pos=-1": "greater than 0",
    "hierarchy.token_clip=nan": "finite",
    "algorithm.optimizer_steps=5": "divide",
}


def test_bad_config_is_one_line_before_anything_is_loaded(tmp_path):
    begun = [sys.executable, str(ROOT / "examples" / "train_gpt_fiberpo.py"), "--check"]
    given = [arguments(tmp_path, override) for override in WRONG]
    done = subprocess.run([*begun, *given[0]], env=environment(), text=True, capture_output=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    lines, _ = check_each(given)
    assert lines[0] == done.stderr.strip()
    for line, (override, words) in zip(lines, WRONG.items(), strict=True):
        key = override.partition("=")[0]
        assert line.startswith("error: ") and key.removesuffix(".slope") in line and words in line, line


def test_the_quickstart_config_passes_the_check_which_tells_what_is_not_there(tmp_path):
    begun = [sys.executable, str(ROOT / "examples" / "train_gpt_fiberpo.py"), "--check", "--config-name", "quickstart"]
    done = subprocess.run([*begun, f"run_dir={tmp_path}"], env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the config: name, run_dir, seed, ")
    assert f"data.train: not checked: {tmp_path}/data/train.jsonl does not exist" in done.stdout


OWN = """
defaults: [quickstart, _self_]
rewards: {graders: {mine: "graders_beside_the_config:score"}}
"""


def test_graders_are_found_beside_the_run_config(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    begun = [sys.executable, str(ROOT / "examples" / "train_gpt_fiberpo.py"), "--check", f"run_dir={tmp_path}"]
    options = ["--config-dir", str(tmp_path), "--config-name", "own"]  # after an override, too
    done = subprocess.run([*begun, *options], env=environment(), text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith("error: rewards.graders.mine: graders_beside_the_config:")
    assert len(done.stderr.splitlines()) == 1
    (tmp_path / "graders_beside_the_config.py").write_text("def score(record, response):\n    return 1.0\n")
    done = subprocess.run([*begun, *options], env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hierarchy", sorted(path.stem for path in (ROOT / "conf" / "hierarchy").glob("*.yaml")))
def test_every_shipped_hierarchy_passes_the_check(tmp_path, hierarchy):
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        chosen = [f"hierarchy={hierarchy}", f"run_dir={tmp_path}", "model.expert_model_parallel_size=2"]
        cfg = compose("quickstart", overrides(chosen))
    _, partitions, _ = check_sections(cfg)
    assert (partitions is not None) == hierarchy.startswith("expert_")
    if partitions is not None:
        partition_table(partitions, cfg.model)
