"""Parts of the actor that need no model: what it refuses and the KL penalty."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_fiberpo.aligner import cpu

cpu.install()
from nemo_fiberpo.aligner.actor import balanced, kl_penalty  # noqa: E402
from nemo_fiberpo.aligner.model_checks import check_model  # noqa: E402

GOOD = {"mcore_gpt": True, "optim": {"name": "mcore_distributed_optim"}, "ppo": {"sampling_params": {}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"name": "distributed_fused_adam"}}, ["model.optim.name", "mcore_distributed_optim"]),
        ({"mcore_gpt": False}, ["model.mcore_gpt"]),
        (
            {"context_parallel_size": 2, "ppo": {"sampling_params": {}, "trt_llm": {"enable": True}}},
            ["model.context_parallel_size", "model.ppo.trt_llm.enable"],
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            ["model.virtual_pipeline_model_parallel_size", "pipeline_model_parallel_size alone"],
        ),
        ({"sequence_parallel": True}, ["model.sequence_parallel", "tensor_model_parallel_size is 1"]),
        ({"num_moe_experts": 4, "tensor_model_parallel_size": 2}, ["model.sequence_parallel", "must be true"]),
        (
            {
                "num_moe_experts": 4,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
                "moe_token_dispatcher_type": "alltoall",
            },
            ["model.moe_token_dispatcher_type", "use allgather"],
        ),
        ({"ppo": {"offload_adam_states": True, "sampling_params": {}}}, ["model.ppo.offload_adam_states", "False"]),
        ({"ppo": {"entropy_bonus": 0.1, "sampling_params": {}}}, ["model.ppo.entropy_bonus", "0"]),
        ({"ppo": {"sampling_params": {"temperature": 0.7}}}, ["model.ppo.sampling_params.temperature", "must be 1.0"]),
        ({"ppo": {"sampling_params": {"top_k": 5}}}, ["model.ppo.sampling_params.top_k", "must be 0"]),
    ],
)
def test_a_model_that_cannot_run_is_refused_by_field(change, words):
    with pytest.raises(ValueError) as error:
        check_model(OmegaConf.create(GOOD | change))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "layout",
    [
        {"context_parallel_size": 1, "virtual_pipeline_model_parallel_size": None, "sequence_parallel": False},
        {"context_parallel_size": 2, "num_moe_experts": 4},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "num_moe_experts": 4},
        {"tensor_model_parallel_size": 2},
    ],
)
def test_a_model_that_can_run_passes(layout):
    check_model(OmegaConf.create(GOOD | layout))


def test_context_parallelism_on_a_gpu_needs_transformer_engine(monkeypatch):
    monkeypatch.setattr("nemo_fiberpo.megatron.cpu.installed", lambda: False)
    check_model(OmegaConf.create(GOOD | {"context_parallel_size": 2, "transformer_engine": True}))
    with pytest.raises(ValueError, match="model.context_parallel_size: 2 needs transformer_engine: true"):
        check_model(OmegaConf.create(GOOD | {"context_parallel_size": 2, "transformer_engine": False}))


def test_packed_micro_batches_have_equally_many_samples_and_about_equal_lengths():
    # sorted: 9 8 7 | 3 2 1, the second turn backwards: 9+1, 8+2, 7+3
    dealt = balanced([1, 9, 7, 2, 8, 3], 3)
    assert dealt == [[1, 0], [4, 3], [2, 5]]
    assert sorted(index for part in dealt for index in part) == list(range(6))


def batch(init, weights, mask):
    return {"init_log_probs": torch.tensor(init), "weights": torch.tensor(weights), "mask": torch.tensor(mask)}


def test_kl_penalty_by_hand():
    # d = init - current = log 2 and 0: exp(d) - d - 1 = 1 - log 2 and 0
    current = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    init = [[-1.0 + 0.6931471805599453, -2.0]]
    value = kl_penalty(current, batch(init, [[0.5, 0.5]], [[True, True]]), coefficient=0.1)
    assert value.item() == pytest.approx(0.1 * 0.5 * (1 - 0.6931471805599453), rel=1e-6)


def test_kl_penalty_pulls_towards_the_initial_policy():
    current = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    kl_penalty(current, batch([[-0.5, -1.5]], [[1.0, 1.0]], [[True, True]]), coefficient=1.0).backward()
    # d/d log pi of exp(d) - d - 1 is 1 - exp(d)
    wanted = 1 - torch.tensor([[0.5, -0.5]], dtype=torch.float64).exp()
    torch.testing.assert_close(current.grad, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_kl_penalty_of_a_masked_token_is_nothing(value):
    current = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    penalty = kl_penalty(current, batch([[-0.5, value]], [[1.0, 0.0]], [[True, False]]), coefficient=1.0)
    penalty.backward()
    assert torch.isfinite(penalty) and current.grad[0, 1] == 0.0


def test_kl_penalty_of_a_token_far_off_is_finite():
    current = torch.tensor([[-1e4, -1.0]], requires_grad=True)
    penalty = kl_penalty(current, batch([[-0.5, -1e4]], [[1.0, 1.0]], [[True, True]]), coefficient=1.0)
    penalty.backward()
    assert torch.isfinite(penalty) and bool(torch.isfinite(current.grad).all())
