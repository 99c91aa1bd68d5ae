"""Parts of the actor that need no model: what it refuses and the KL penalty."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_fiberpo.aligner import cpu

cpu.install()
from nemo_fiberpo.aligner.actor import check_model, kl_penalty  # noqa: E402

GOOD = {"mcore_gpt": True, "optim": {"name": "mcore_distributed_optim"}, "ppo": {"sampling_params": {}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"name": "distributed_fused_adam"}}, ["model.optim.name", "mcore_distributed_optim"]),
        ({"mcore_gpt": False}, ["model.mcore_gpt"]),
        ({"context_parallel_size": 2}, ["model.context_parallel_size", "tensor_model_parallel_size"]),
        ({"virtual_pipeline_model_parallel_size": 2}, ["model.virtual_pipeline_model_parallel_size"]),
        ({"sequence_parallel": True}, ["model.sequence_parallel", "tensor_model_parallel_size alone"]),
        (
            {"num_moe_experts": 4, "tensor_model_parallel_size": 2},
            ["model.tensor_model_parallel_size", "expert_model_parallel_size"],
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


def test_a_model_that_can_run_passes():
    check_model(OmegaConf.create(GOOD | {"context_parallel_size": 1, "virtual_pipeline_model_parallel_size": None}))


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
