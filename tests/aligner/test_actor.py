"""Parts of the actor that need no model: what it refuses, and how it packs."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_fiberpo import nemo_cpu

nemo_cpu.install()
from nemo_fiberpo.aligner.actor import FiberPOActor  # noqa: E402
from nemo_fiberpo.aligner.config.model_checks import check_model, check_vocabulary, first_token  # noqa: E402
from nemo_fiberpo.aligner.generation import lockstep  # noqa: E402
from nemo_fiberpo.megatron.sequences import balanced  # noqa: E402
from tests.support.launching import ROOT  # noqa: E402

GOOD = {"mcore_gpt": True, "optim": {"name": "mcore_distributed_optim"}, "ppo": {"sampling_params": {}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"name": "distributed_fused_adam"}}, ["model.optim.name", "mcore_distributed_optim"]),
        ({"mcore_gpt": False}, ["model.mcore_gpt"]),
        ({"precision": "16-mixed"}, ["model.precision: '16-mixed'", "use bf16"]),
        (
            {"context_parallel_size": 2, "ppo": {"sampling_params": {}, "trt_llm": {"enable": True}}},
            ["model.context_parallel_size", "model.ppo.trt_llm.enable"],
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            ["model.virtual_pipeline_model_parallel_size", "only pipeline_model_parallel_size"],
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
        ({"ppo": {"ratio_eps": 0.2, "sampling_params": {}}}, ["model.ppo.ratio_eps: 0.2", "0.0"]),
        ({"peft": {"peft_scheme": "lora"}}, ["model.peft.peft_scheme: lora needs Transformer Engine"]),
        ({"peft": {"peft_scheme": "lroa"}}, ["model.peft.peft_scheme: 'lroa' is unknown", "'lora'"]),
    ],
)
def test_a_model_that_cannot_run_is_refused_by_field(change, words):
    with pytest.raises(ValueError) as error:
        check_model(OmegaConf.create(GOOD | change))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("sampling_params", "use_greedy", True, "must be False: all responses to a prompt would be equal"),
        ("sampling_params", "temperature", 0.7, "must be 1.0: responses must be samples of the policy itself"),
        ("sampling_params", "temperature", True, "must be 1.0"),
        ("sampling_params", "top_k", 5, "must be 0"),
        ("sampling_params", "top_p", 0.9, "must be 1.0"),
        ("sampling_params", "repetition_penalty", 1.2, "must be 1.0"),
        ("sampling_params", "all_probs", True, "nothing here reads them"),
        ("sampling_params", "compute_logprob", True, "nothing here reads them"),
        ("sampling_params", "add_BOS", "yes", "must be true or false"),
        ("sampling_params", "end_strings", "</s>", "must be a list of texts"),
        ("sampling_params", "temprature", 0.7, "unknown key; did you mean 'temperature'"),
        ("sampling_params", "min_p", 0.1, "unknown key"),
        ("length_params", "min_length", 8, "must be 0: it masks the end-of-sequence token"),
        ("length_params", "min_length", 1, "must be 0"),
        ("length_params", "min_lenght", 1, "did you mean 'min_length'"),
    ],
)
def test_what_would_sample_from_another_distribution_is_refused(section, key, value, words):
    given = OmegaConf.create(GOOD | {"ppo": {"sampling_params": {}, "length_params": {}} | {section: {key: value}}})
    with pytest.raises(ValueError) as error:
        check_model(given)
    assert str(error.value).startswith(f"model.ppo.{section}.{key}: ") and words in str(error.value)


def test_what_policies_are_sampled_with_passes():
    neutral = {"use_greedy": False, "temperature": 1, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    free = {"add_BOS": True, "end_strings": ["\n"], "all_probs": False, "compute_logprob": False}
    ppo = {"sampling_params": neutral | free, "length_params": {"max_length": 4, "min_length": 0}}
    check_model(OmegaConf.create(GOOD | {"ppo": ppo}))


@pytest.mark.parametrize("dropout", [0.1, None, False])
def test_adapters_drop_nothing(monkeypatch, dropout):
    monkeypatch.setattr("nemo_fiberpo.megatron.cpu.installed", lambda: False)
    lora = {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 8, "adapter_dropout": 0.0}}
    check_model(OmegaConf.create(GOOD | {"peft": lora}))
    lora["lora_tuning"]["adapter_dropout"] = dropout
    with pytest.raises(ValueError, match=rf"^model\.peft\.lora_tuning\.adapter_dropout: {dropout}; must be 0\.0"):
        check_model(OmegaConf.create(GOOD | {"peft": lora}))


def test_nemos_loop_is_asked_for_samples_of_the_policy(monkeypatch):
    asked = {}
    monkeypatch.setattr(lockstep, "synced_generate", lambda *args, **options: asked.update(options))
    base = OmegaConf.load(ROOT / "conf" / "model" / "policy.yaml").ppo
    lockstep.generate_tokens(SimpleNamespace(), None, None, None, base.sampling_params, base.length_params)
    assert asked["min_tokens_to_generate"] == 0 and not asked["greedy"] and asked["top_k"] == 0
    assert asked["temperature"] == asked["top_p"] == asked["repetition_penalty"] == 1.0


def test_prompts_begin_with_the_tokenizers_first_token_where_asked_for():
    model = OmegaConf.create({"ppo": {"sampling_params": {"add_BOS": True}}})
    assert first_token(model, SimpleNamespace(bos_id=2, vocab_size=5)) == 2
    for bos_id in (None, -1, 5):
        with pytest.raises(ValueError, match=r"^model\.ppo\.sampling_params\.add_BOS: true, but .* no BOS token"):
            first_token(model, SimpleNamespace(bos_id=bos_id, vocab_size=5))
    model.ppo.sampling_params.add_BOS = False
    assert first_token(model, SimpleNamespace(bos_id=None, vocab_size=5)) is None


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
        (50, 50, {}, "the end-of-sequence token has the id 50"),
        (50, None, {}, "the end-of-sequence token has the id None"),
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


def test_packed_micro_batches_keep_groups_together():
    # sums of pairs 10 9 11 | 4 2 8: 11 10 9, the second turn backwards
    dealt = balanced([1, 9, 7, 2, 8, 3, 2, 2, 1, 1, 4, 4], 3, together=2)
    assert dealt == [[4, 5, 8, 9], [0, 1, 6, 7], [2, 3, 10, 11]]
