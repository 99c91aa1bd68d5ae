"""From a rollout to minibatches, without a model: what the trainer tells it of each sequence, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo import nemo_cpu

nemo_cpu.install()
from nemo_fiberpo.aligner.actor import FiberPOActor  # noqa: E402
from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings  # noqa: E402
from nemo_fiberpo.aligner.generation.engine_log_probs import ENGINE  # noqa: E402
from nemo_fiberpo.aligner.trainer import FiberPOTrainer  # noqa: E402
from nemo_fiberpo.megatron.groups import Axis, Reducer, TokenAxes  # noqa: E402
from nemo_fiberpo.objective import Budget, Gspo, Hierarchy, RolloutCorrection, Stratum  # noqa: E402

AXES = TokenAxes(tuple(Axis(name, 1, 0, sharded=name in ("cp", "dp")) for name in ("tp", "pp", "cp", "dp")))


def trainer(**settings) -> FiberPOTrainer:
    """A trainer of one rank whose model only makes rows."""
    actor = SimpleNamespace(reducer=Reducer(AXES), _sequence_parallel=False)
    made = FiberPOTrainer.__new__(FiberPOTrainer)
    made.settings = AlgorithmSettings(samples_per_prompt=2, prompts_per_rollout=2, **settings)
    made.hierarchy = Hierarchy((Stratum("trajectory", Budget(0.1, 0.1)),), token_clip=0.1)
    made.strata = SimpleNamespace(labels=lambda part: {"trajectory": part["trajectory"]}, names={})
    made.model = SimpleNamespace(
        rows=lambda *args: FiberPOActor.rows(actor, *args),  # type: ignore[arg-type]
        reducer=actor.reducer, cfg=SimpleNamespace(micro_batch_size=2), experts=None,
    )  # fmt: skip
    return made


def rollout(**changes) -> dict[str, torch.Tensor]:
    """Four samples with prompts of 2 tokens: responses of 3, 1, 3 (cut at the limit) and 2 (could not be graded)."""
    columns = {
        "response_tokens": torch.arange(20).view(4, 5),
        "prompt_lengths": torch.tensor([2, 2, 2, 2]),
        "response_lengths": torch.tensor([5, 3, 5, 4]),
        "is_end": torch.tensor([1, 1, 0, 1]),
        "valid": torch.tensor([1, 1, 1, 0]),
        "advantage": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        "logprobs": torch.full((4, 4), -1.0),
        "trajectory": torch.arange(4),
    }
    return columns | changes


@pytest.mark.parametrize("packing", [False, True])
def test_routers_learn_from_the_tokens_of_samples_in_the_loss(packing, monkeypatch):
    if packing:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    fiberpo = trainer(truncated="mask", packing=packing)
    fiberpo.generate_ppo_data(rollout())
    [minibatch] = fiberpo._minibatches
    tokens = torch.cat([entry.tokens[entry.routed.mask] for entry in minibatch.rows])
    assert sorted(tokens.tolist()) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sum(int(entry.routed.per_row.sum()) for entry in minibatch.rows) == 8
    fiberpo = trainer(truncated="keep", packing=packing)
    fiberpo.generate_ppo_data(rollout())
    assert sum(int(entry.routed.per_row.sum()) for entry in fiberpo._minibatches[0].rows) == 13


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("logprobs", "old log-probs is -inf"),
        ("init_logprobs", "initial policy's log-probs is -inf"),
        (ENGINE, "log-probs of generation is -inf"),
    ],
)
def test_a_log_prob_that_is_not_finite_stops_the_rollout(column, said):
    log_probs = torch.full((4, 4), -1.0)
    log_probs[0, 2] = -torch.inf
    settings = {"rollout_correction": RolloutCorrection("tis", high=2.0)} if column == ENGINE else {}
    with pytest.raises(ValueError, match=f"{said} at sample 0, token position 2"):
        trainer(**settings).generate_ppo_data(rollout(**{column: log_probs}))
    log_probs[0, 2], log_probs[1, 3] = -1.0, -torch.inf  # behind the second response
    trainer(**settings).generate_ppo_data(rollout(**{column: log_probs}))


def test_a_correction_multiplies_advantages_alone():
    ratio = torch.tensor([[9.0, 2.0, 1.0, 0.5], [9.0, 2.0, 9.0, 9.0], [9.0, 0.8, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    log_probs = {"logprobs": torch.full((4, 4), -1.0), ENGINE: -1.0 - ratio.log()}
    plain, corrected = trainer(), trainer(rollout_correction=RolloutCorrection("icepop", 0.7, 1.5))
    plain.generate_ppo_data(rollout(**log_probs))
    _, metrics = corrected.generate_ppo_data(rollout(**log_probs))
    [before], [after] = plain._minibatches, corrected._minibatches
    factor = [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0.8, 1, 1, 0], [0, 0, 0, 0, 0]]
    expected = torch.cat(list(before.weighted_advantage)) * torch.tensor(factor)
    assert torch.allclose(torch.cat(list(after.weighted_advantage)), expected, rtol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(before.weights, after.weights, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before.mask, after.mask, strict=True))
    # Of 7 live tokens, 2 2 1/2 are masked; the fourth sample could not be graded.
    assert metrics["rollout_correction/touched"].item() == pytest.approx(3 / 7)
    sizes = [abs(math.log(value)) for value in (2, 1, 0.5, 2, 0.8, 1, 1)]
    assert metrics["rollout_correction/abs_log_ratio"].item() == pytest.approx(sum(sizes) / 7, rel=1e-6)
    assert metrics["rollout_correction/mean_weight"].item() == pytest.approx(3.8 / 7, rel=1e-6)
    assert before.correction is None and not any("correction" in name for name in plain.generate_ppo_data(rollout())[1])


def test_a_map_that_couples_tokens_is_not_on_policy_under_a_correction():
    correction = RolloutCorrection("tis", high=2.0)
    gspo = {"objective": "gspo", "gating": Gspo(3e-4, 4e-4)}
    assert trainer(**gspo).settings.on_policy is None
    assert trainer(rollout_correction=correction).settings.on_policy is None
    assert trainer(**gspo, rollout_correction=correction).settings.on_policy is False


def test_an_engine_without_log_probs_is_refused():
    actor = SimpleNamespace(use_trtllm_generation=True)
    with pytest.raises(ValueError, match=r"rollout_correction\.kind: needs the log-probs of the engine.*TensorRT-LLM"):
        FiberPOActor.record_log_probs(actor)  # type: ignore[arg-type]
