"""Every objective trains in the training script, selected by one word, with the same diagnostics."""

from __future__ import annotations

import math

import pytest

from tests.aligner.test_layouts import rollout_and_steps

pytestmark = pytest.mark.timeout(600)
OBJECTIVES = ("fiberpo", "ppo", "grpo", "dapo", "gspo", "truly_ppo", "apc", "cispo", "sapo", "dppo_tv", "gmpo")


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """One rollout, two optimizer steps each; a large learning rate, so that the second is far off-policy."""
    folder = tmp_path_factory.mktemp("objectives")
    far = ["model.optim.lr=3e-2", "model.optim.sched.warmup_steps=0"]
    narrow = {"dppo_tv": ["algorithm.gating.delta=0.01"]}  # so that it drops some of the tiny policy's tokens
    return {
        name: rollout_and_steps(start, folder, name, 1, f"algorithm={name}", *narrow.get(name, []), *TINY, *far)[1]
        for name in OBJECTIVES
    }


# quickstart.yaml's own sizes come after the algorithm's file; weights and advantages are the algorithm's
TINY = ["model.micro_batch_size=16", "model.ppo.forward_micro_batch_size=16", "model.ppo.rollout_micro_batch_size=32"]


def test_every_objective_trains(runs):
    for name, (first, second) in runs.items():
        assert first["train_optim/gate_all_reduces"] == 0.0 and second["train_optim/gate_all_reduces"] == 2.0, name
        assert all(math.isfinite(step["train_optim/grad_norm"]) for step in (first, second)), name
        assert second["train_optim/gates/log_ratio/abs_mean"] > 0.05, "the second step is off-policy"


def test_all_have_the_same_diagnostics(runs):
    names = {key for key in runs["fiberpo"][1] if "gates/" in key}
    assert len(names) > 40
    for name, steps in runs.items():
        assert {key for key in steps[1] if "gates/" in key} == names, name


def test_apc_at_the_level_of_states_trains(start, tmp_path):
    """As many states as live tokens, less those that samples of a prompt share."""
    _, (_, second) = rollout_and_steps(start, tmp_path, "state", 2, "algorithm=apc_state", "hierarchy=state")
    assert second["train_optim/gate_all_reduces"] == 2.0 and math.isfinite(second["train_optim/grad_norm"])
    states, tokens = second["train_optim/gates/state/cells"], second["train_optim/gates/token/live"]
    assert 0.5 * tokens < states < tokens, "the first token of every sample of a prompt is chosen in the same state"


def test_the_same_rollout_gives_another_second_step_to_every_objective(runs):
    """The first steps of equal weights are equal: on-policy every objective is the policy gradient."""
    by_trajectory = ("fiberpo", "grpo", "gspo", "apc", "sapo", "gmpo")
    for group in (by_trajectory, ("ppo", "dapo", "truly_ppo", "cispo", "dppo_tv")):
        first = {name: runs[name][0]["train_optim/grad_norm"] for name in group}
        assert max(first.values()) == pytest.approx(min(first.values()), rel=1e-5)
        second = {name: runs[name][1]["train_optim/loss"] for name in group}
        assert len({f"{value:.4g}" for value in second.values()}) == len(group), second
