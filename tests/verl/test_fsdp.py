"""verl's FSDP2 engine takes the exact step: the gradient of the whole mini-batch, whatever its split."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from nemo_fiberpo import load_hierarchy
from tests.verl.host import GROUPS, HIERARCHY, SAMPLES, Batch, make_batch, save_model
from tests.verl.ranks import steps
from tests.verl.slow import expected, largest_difference, relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROWS = GROUPS * SAMPLES
MICRO_BATCHES = (1, 2, 8)
FLOAT32 = 1e-5
FIBERPO = {"loss_mode": "fiberpo", "hierarchy": HIERARCHY}
MEAN = {"loss_agg_mode": "seq-mean-token-mean"}
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
GSPO = {**FIBERPO, "objective": "gspo", "gating": {"low": 0.02, "high": 0.03}}
PENALTIES = {"entropy_coeff": 0.05, "use_kl_loss": True, "kl_loss_coef": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("qwen3_moe")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def batch(folder: Any) -> Batch:
    return make_batch(folder)


def cases(world_size: int) -> dict[str, dict[str, Any]]:
    """By name, what `steps` runs on so many ranks."""
    rows = ROWS // world_size
    whole = {"micro_batch_size": rows, "policy_loss": FIBERPO, **MEAN}
    split = {**whole, "micro_batch_size": rows // 8}
    out = {f"micro {m}": {**whole, "micro_batch_size": rows // m} for m in MICRO_BATCHES}
    out |= {mode: {**split, "loss_agg_mode": mode} for mode in AGGREGATIONS}
    out["dynamic"] = {**split, "use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 48}
    out["gspo"] = {**(whole if world_size == 1 else split), "policy_loss": GSPO}
    entropy = {"settings": {"calculate_entropy": True}}
    out["penalties"] = {**split, **PENALTIES, **entropy}
    return out


@pytest.fixture(scope="module")
def outcomes(folder: Any, batch: Batch) -> Any:
    @cache
    def on(world_size: int) -> dict[str, dict[str, Any]]:
        named = cases(world_size)
        return dict(zip(named, steps(world_size, folder, batch, list(named.values())), strict=True))

    return on


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", [*(f"micro {m}" for m in MICRO_BATCHES), "dynamic"])
def test_gradient_of_every_split_is_that_of_the_slow_loops(
    outcomes: Any, folder: Any, batch: Batch, world_size: int, case: str
):
    wanted, found = expected(folder, batch, HIERARCHY), outcomes(world_size)[case]
    assert relative_error(found["gradients"], wanted.gradients) < FLOAT32
    metrics = found["metrics"]
    assert metrics["actor/pg_loss"][0] == pytest.approx(-wanted.value, rel=1e-6)
    assert metrics["gate_all_reduces"][0] == load_hierarchy(HIERARCHY).num_reductions
    assert metrics["recompute_error"][0] < 1e-5
    assert metrics["gates/token/live"][0] == int(batch.response_mask.sum())
    assert metrics["gates/domain.code/token_share"][0] + metrics["gates/domain.math/token_share"][0] == pytest.approx(1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_after_a_step_do_not_depend_on_the_split(outcomes: Any, world_size: int):
    first = outcomes(1)["micro 1"]["parameters"]
    for m in MICRO_BATCHES:
        assert largest_difference(outcomes(world_size)[f"micro {m}"]["parameters"], first) < 1e-5


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_tokens_weigh_as_verl_aggregates_losses(outcomes: Any, folder: Any, batch: Batch, world_size: int, mode: str):
    wanted = expected(folder, batch, HIERARCHY, mode)
    assert relative_error(outcomes(world_size)[mode]["gradients"], wanted.gradients) < FLOAT32


def test_importance_weights_of_the_rollout_multiply_advantages(folder: Any, batch: Batch):
    weights = 0.5 + torch.rand(batch.old_log_probs.shape, generator=torch.Generator().manual_seed(4))
    weighted = dataclasses.replace(batch, rollout_is_weights=weights)
    case = {"micro_batch_size": 2, "policy_loss": FIBERPO, **MEAN}
    found, wanted = steps(2, folder, weighted, [case])[0], expected(folder, weighted, HIERARCHY)
    assert relative_error(found["gradients"], wanted.gradients) < FLOAT32
    assert relative_error(found["gradients"], expected(folder, batch, HIERARCHY).gradients) > 0.05


def mismatched(batch: Batch) -> Batch:
    """With log-probs of an engine that has others."""
    noise = 0.2 * torch.randn(batch.old_log_probs.shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(batch, rollout_log_probs=(batch.old_log_probs - noise) * batch.response_mask)


def test_masks_and_weights_of_verls_own_correction(folder: Any, batch: Batch):
    """Whole sequences and single tokens are rejected by verl before the step; others keep a truncated weight."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    given = mismatched(batch)
    data, mask, _ = compute_rollout_correction_and_rejection_mask(
        given.old_log_probs, given.rollout_log_probs, given.response_mask, rollout_is="token", rollout_is_threshold=1.1,
        rollout_rs="seq_mean_k1,token_k1", rollout_rs_threshold="0.95_1.1,0.7_1.4",
    )  # fmt: skip
    rejected = given.response_mask.bool() & ~mask.bool()
    assert rejected.any(1).sum() > (rejected.sum(1) == given.response_mask.sum(1)).sum() > 0
    corrected = dataclasses.replace(
        given, response_mask=mask, rollout_is_weights=data.batch["rollout_is_weights"], rollout_log_probs=None
    )
    case = {"micro_batch_size": 2, "policy_loss": FIBERPO, "loss_agg_mode": "token-mean"}
    found, wanted = steps(2, folder, corrected, [case])[0], expected(folder, corrected, HIERARCHY, "token-mean")
    assert relative_error(found["gradients"], wanted.gradients) < FLOAT32
    assert relative_error(found["gradients"], expected(folder, batch, HIERARCHY, "token-mean").gradients) > 0.05


def test_rollout_weights_by_the_engines_log_probs(folder: Any, batch: Batch):
    given = mismatched(batch)
    live = given.response_mask.bool()
    difference = torch.where(live, given.old_log_probs.double() - given.rollout_log_probs.double(), 0.0)
    mean = difference.sum(1, keepdim=True) / live.sum(1, keepdim=True)
    weight = {
        "tis": difference.exp().clamp(max=1.1),
        "sequence_mask": difference.exp() * ((mean.exp() >= 0.95) & (mean.exp() <= 1.05)),
    }
    settings = {
        "tis": {"kind": "tis", "high": 1.1},
        "sequence_mask": {"kind": "sequence_mask", "low": 0.95, "high": 1.05},
    }
    cases = [
        {"micro_batch_size": 2, "policy_loss": {**FIBERPO, "rollout_weights": settings[kind]}, **MEAN}
        for kind in weight
    ]
    for (kind, expected_weight), found in zip(weight.items(), steps(2, folder, given, cases), strict=True):
        weighted = dataclasses.replace(batch, rollout_is_weights=expected_weight)
        assert relative_error(found["gradients"], expected(folder, weighted, HIERARCHY).gradients) < FLOAT32, kind
        touched = (expected_weight == 0) if kind == "sequence_mask" else (difference.exp() > 1.1)
        share = (touched & live).sum().item() / live.sum().item()
        assert 0 < share < 1 and found["metrics"]["rollout_weights/touched"][0] == pytest.approx(share)


def test_gates_of_the_parts_would_give_another_gradient(folder: Any, batch: Batch):
    """What the tests above would find if every micro-batch had gates of its own."""
    whole = expected(folder, batch, HIERARCHY).gradients
    halves = [expected(folder, batch.rows(list(range(at, ROWS, 2))), HIERARCHY).gradients for at in (0, 1)]
    summed = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}
    assert relative_error(summed, whole) > 0.05


def test_another_objective_needs_whole_cells_too(outcomes: Any):
    one, split = outcomes(1)["gspo"], outcomes(2)["gspo"]
    assert relative_error(split["gradients"], {k: v.double() for k, v in one["gradients"].items()}) < FLOAT32
    assert split["metrics"]["gate_all_reduces"][0] == load_hierarchy(HIERARCHY).num_reductions / 2 + 1
    assert 0 < split["metrics"]["gates/token/clipped"][0] < 1


def test_entropy_and_kl_of_verl_come_on_top(outcomes: Any, folder: Any, batch: Batch):
    """The loss is linear in its parts: without advantages, verl's own loss has the penalties alone."""
    alone = Batch(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages)})
    case = {**cases(1)["penalties"], "policy_loss": {"loss_mode": "vanilla"}}
    penalties = steps(1, folder, alone, [case])[0]["gradients"]
    for world_size in (1, 2):
        found = outcomes(world_size)["penalties"]
        gates = outcomes(world_size)["micro 8"]["gradients"]
        summed = {name: (gates[name] + penalties[name]).double() for name in gates}
        assert relative_error(found["gradients"], summed) < 2 * FLOAT32
        assert relative_error(found["gradients"], {k: v.double() for k, v in gates.items()}) > 1e-3
        assert found["metrics"]["kl_loss"][0] > 0
