"""Parts of the actor that need no model: what it refuses, and how it packs."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo.aligner import cpu

cpu.install()
from nemo_fiberpo.aligner.actor import FiberPOActor, balanced  # noqa: E402
from nemo_fiberpo.aligner.model_checks import check_model, check_vocabulary  # noqa: E402

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


@pytest.mark.parametrize(
    ("size", "end", "config", "said"),
    [
        (50, 7, {"override_vocab_size": 48}, "model.tokenizer: 50 tokens, but the policy's embedding has 48 rows"),
        (65, 7, {}, "model.tokenizer: 65 tokens, but the policy's embedding has 64 rows"),
        (50, 50, {}, "the token that ends a response has the id 50"),
        (50, None, {}, "the token that ends a response has the id None"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_policy_is_refused(size, end, config, said):
    with pytest.raises(ValueError, match=said):
        check_vocabulary(OmegaConf.create(config), SimpleNamespace(vocab_size=size, eos_id=end), padded=64)
    check_vocabulary(OmegaConf.create({"override_vocab_size": 50}), SimpleNamespace(vocab_size=50, eos_id=0), padded=64)


def test_the_actor_looks_before_it_builds_a_model():
    """NeMo calls `_build_vocab` first, and pads 45 tokens to 48 rows."""
    actor = FiberPOActor.__new__(FiberPOActor)
    actor.__dict__ |= {"_cfg": OmegaConf.create({"make_vocab_size_divisible_by": 8}), "use_loss_mask": False}
    actor.__dict__["tokenizer"] = SimpleNamespace(vocab_size=45, eos_id=1)
    actor._build_vocab()
    assert actor.padded_vocab_size == 48
    actor._cfg.override_vocab_size = 44
    with pytest.raises(ValueError, match="45 tokens, but the policy's embedding has 44 rows"):
        actor._build_vocab()


def test_packed_micro_batches_have_equally_many_samples_and_about_equal_lengths():
    # sorted: 9 8 7 | 3 2 1, the second turn backwards: 9+1, 8+2, 7+3
    dealt = balanced([1, 9, 7, 2, 8, 3], 3)
    assert dealt == [[1, 0], [4, 3], [2, 5]]
    assert sorted(index for part in dealt for index in part) == list(range(6))
