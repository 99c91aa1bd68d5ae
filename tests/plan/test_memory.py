"""Memory arithmetic against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_fiberpo.plan.layout import Layout
from nemo_fiberpo.plan.memory import GIB, Run, layer_bytes, memory
from nemo_fiberpo.plan.shape import ModelShape
from tests.plan.configs import plan_of

SHAPE = ModelShape(layers=4, hidden=64, heads=4, groups=2, head_dim=16, ffn=128, vocab=256)
RUN = Run(
    prompt=8, response=24, rows=2, forward=2, generated=4, microbatches=8, weight_bytes=2, gradient_bytes=4,
    optimizer_bytes=12, recompute=-1, checkpoint_every=1, flash=True, allgather=False,
)  # fmt: skip


def test_weights_gradients_and_optimizer_by_hand():
    found = memory(SHAPE, Layout(1, 4, tp=2), RUN, 1.0)
    layer = (64 * (64 + 64) + 64 * 64 + 3 * 64 * 128) // 2 + 2 * 64
    own = 4 * layer + 2 * 256 // 2 * 64 + 64
    assert found.static == {"weights": 2 * own, "gradients": 4 * own, "optimizer": 12 * own // 2}


def test_the_optimizer_of_experts_is_sharded_over_the_ranks_that_hold_the_same_ones():
    """8 ranks, 4 experts over 4: 8 share what is dense, 2 the same expert."""
    moe = dataclasses.replace(SHAPE, experts=4, topk=2, expert_ffn=128)
    found = memory(moe, Layout(1, 8, ep=4), RUN, 1.0)
    expert = 4 * 3 * 64 * 128
    dense = moe.stage(0, 1, ep=4).dense
    assert found.static["optimizer"] == 12 * dense // 8 + 12 * expert // 2


def test_activations_by_hand():
    """Per token, in bf16: 4 h for the norms, (2 a + 2 g) d for attention, 3 f for the gated MLP."""
    assert layer_bytes(SHAPE, Layout(1, 1), RUN, 10, 1.0, False) == 10 * 2 * (4 * 64 + (8 + 4) * 16 + 3 * 128)
    split = layer_bytes(SHAPE, Layout(1, 2, tp=2), RUN, 10, 1.0, True)
    assert split == 10 * 2 * (4 * 64 / 2 + (8 + 4) * 16 / 2 + 3 * 128 / 2)


def test_a_pipeline_keeps_as_many_microbatches_as_stages_follow():
    found = [memory(dataclasses.replace(SHAPE, vocab=1), Layout(1, 4, pp=pp), RUN, 1.0) for pp in (2, 4)]
    for pp, one in zip((2, 4), found, strict=True):
        stage_zero = pp * (4 // pp) * 2 * 32 * 64 * 2
        assert one.training["activation checkpoints"] <= stage_zero
    everything = dataclasses.replace(RUN, recompute=0)
    assert memory(SHAPE, Layout(1, 1), everything, 1.0).training["activations kept"] == 4 * layer_bytes(
        SHAPE, Layout(1, 1), RUN, 64, 1.0, False
    )


def test_all_forward_passes_first_keep_all_microbatches_by_hand():
    """8 micro-batches of 64 tokens, 64 units in bf16: a checkpoint is 8192 bytes."""
    run = dataclasses.replace(RUN, all_forward=True, logprobs="logits")
    kept = memory(SHAPE, Layout(1, 1), run, 1.0).training
    assert kept["activation checkpoints"] == 8 * 4 * 8192
    assert kept["inputs of log-probs kept"] == 7 * 2 * 8192 and kept["logits kept"] == 7 * 4 * 64 * 256
    blocks = memory(
        SHAPE, Layout(1, 2, tp=2, sequence_parallel=True), dataclasses.replace(run, logprobs="chunked"), 1.0
    )
    assert blocks.training["activation checkpoints"] == 8 * 4 * 8192 // 2
    assert (
        blocks.training["inputs of log-probs kept"] == 7 * (8192 // 2 + 8192) and "logits kept" not in blocks.training
    )
    everything = memory(SHAPE, Layout(1, 1), dataclasses.replace(run, recompute=0), 1.0)
    assert everything.training["activations kept"] == 8 * 4 * layer_bytes(SHAPE, Layout(1, 1), RUN, 64, 1.0, False)
    stages = memory(dataclasses.replace(SHAPE, vocab=1), Layout(1, 2, pp=2), run, 1.0)
    assert stages.training["activation checkpoints"] == 8 * 2 * 8192


def test_the_pass_of_old_log_probs_by_hand():
    """Its own number of rows: one layer's activations at a time, float32 logits and an eighth of them again."""
    found = memory(SHAPE, Layout(1, 1), dataclasses.replace(RUN, forward=16), 1.0)
    tokens = 16 * 32
    one = layer_bytes(SHAPE, Layout(1, 1), RUN, tokens, 1.0, False)
    assert found.log_probs == {"a layer's activations": one, "logits": 4 * tokens * 256 * 9 // 8}
    assert found.peak == sum(found.static.values()) + sum(found.log_probs.values())


@pytest.mark.parametrize(
    ("logprobs", "vocab"), [("chunked", 2**15), ("auto", 2**22), ("auto", 2**15), ("logits", 2**22)]
)
def test_log_probs_by_hand(logprobs: str, vocab: int):
    """64 tokens: logits of 2^22 columns take 1 GiB, from which on `auto` takes blocks, of a 32nd of them."""
    run, shape = dataclasses.replace(RUN, logprobs=logprobs), dataclasses.replace(SHAPE, vocab=vocab)
    items = memory(shape, Layout(1, 1), run, 1.0).training
    if logprobs == "chunked" or (logprobs, vocab) == ("auto", 2**22):
        assert items["log-probs in blocks"] == 64 * (6 * vocab // 32 + 8 * 64)
        assert "logits and their gradient" not in items
    else:
        assert items["logits and their gradient"] == 8 * 64 * vocab
        assert "log-probs in blocks" not in items


def test_keys_and_values_by_hand():
    found = memory(SHAPE, Layout(1, 1), RUN, 1.0)
    assert found.generation["keys and values"] == 2 * 4 * 32 * 2 * 16 * 4 * 2
    assert not memory(SHAPE, Layout(1, 1), dataclasses.replace(RUN, generated=0), 1.0).generation


def test_training_and_generation_alternate():
    found = memory(SHAPE, Layout(1, 1), RUN, 1.0)
    parts = sum(found.training.values()), sum(found.generation.values())
    assert found.peak == sum(found.static.values()) + max(parts)


def test_a_model_that_does_not_fit_is_refused_with_remedies():
    plan = plan_of("cluster/mixtral_8x7b", "model.expert_model_parallel_size=1", "trainer.num_nodes=1")
    assert len(plan.problems) == 1
    assert plan.problems[0].startswith("cluster.gpu_memory_gib: a rank of pipeline stage")
    assert "raise model.tensor_, pipeline_ or expert_model_parallel_size" in plan.problems[0]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (("model.activations_checkpoint_granularity=null", "model.micro_batch_size=8"), "lower model.micro_batch_size"),
        (
            ("algorithm.passes=all_forward", "model.activations_checkpoint_granularity=null"),
            "which algorithm.passes: all_forward holds at once: set it to 2",
        ),
        (("model.ppo.rollout_micro_batch_size=256",), "lower model.ppo.rollout_micro_batch_size"),
        (
            ("model.ppo.forward_micro_batch_size=64", "model.logprobs=logits"),
            "lower model.ppo.forward_micro_batch_size",
        ),
    ],
)
def test_the_remedy_is_for_what_is_largest(changes: tuple[str, ...], remedy: str):
    plan = plan_of("cluster/llama3_1_8b", *changes)
    assert [remedy in problem for problem in plan.problems] == [True]


def test_the_initial_policy_lies_in_host_memory_where_a_penalty_needs_it():
    assert plan_of("cluster/llama3_1_8b").host_bytes == 0
    plan = plan_of("cluster/llama3_1_8b", "algorithm.kl.coefficient=0.01")
    assert plan.memory is not None
    assert plan.host_bytes == 8 * plan.memory.static["weights"] and plan.host_bytes > 59 * GIB
    refused = plan_of("cluster/llama3_1_8b", "algorithm.kl.coefficient=0.01", "cluster.host_memory_gib=32")
    assert "cluster.host_memory_gib" in refused.problems[0]


def test_what_is_kept_on_the_host_is_not_on_the_device():
    """With recomputation of all 32 layers: what one micro-batch keeps stays, as with two passes; all go to the host."""
    two, device, host = (
        plan_of("cluster/llama3_1_8b", *changes).memory
        for changes in (
            (),
            ("algorithm.passes=all_forward",),
            ("algorithm.passes=all_forward", "algorithm.kept_on=host"),
        )
    )
    assert two is not None and device is not None and host is not None
    assert host.training == two.training and two.on_host == device.on_host == 0
    number = device.training["activation checkpoints"] / two.training["activation checkpoints"]
    after = sum(device.training.values()) - sum(two.training.values())
    after -= (number - 1) * two.training["activation checkpoints"]
    assert number > 1 and host.on_host == pytest.approx(number * two.training["activation checkpoints"] + after)
    plan = plan_of("cluster/llama3_1_8b", "algorithm.passes=all_forward", "algorithm.kept_on=host")
    assert plan.host_bytes == 8 * host.on_host
    large = ("model.activations_checkpoint_granularity=null", "model.micro_batch_size=8")
    refused = plan_of("cluster/llama3_1_8b", "algorithm.passes=all_forward", "algorithm.kept_on=host", *large)
    assert "lower model.micro_batch_size" in refused.problems[0], "kept_on is on the host already"


# Layers and their parameters from the published configurations: attention h (a + 2 g) d + a d h, two norms, a router
# h E, experts 3 h f: (dense, of experts, ranks that share the optimizer of the one, of the other) of the fullest rank.
BY_HAND = {
    # 32 layers of 218 M and twice 128256 x 4096, over 2; 8 ranks / TP 2
    "llama3_1_8b": (4_015_263_744, 0, 4, 1),
    # the last of 4 stages: 8 layers of 42 M beside one expert of 176 M, the output layer and the norm; DP 8
    "mixtral_8x7b": (466_948_096, 1_409_286_144, 8, 1),
    # the last of 8: 7 layers of 88 M beside one expert of 302 M; DP 16, of which 2 have the same expert
    "mixtral_8x22b": (813_606_912, 2_113_929_216, 16, 2),
    # the second of 8: 12 layers of 71 M over 4 and the router, beside 16 of 128 experts of 19 M; DP 4 x CP 2, 4
    "qwen3_235b_a22b": (220_302_336, 3_623_878_656, 8, 4),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_stays_in_the_layouts_that_ship_by_hand(name: str):
    dense, expert, shards, expert_shards = BY_HAND[name]
    found = plan_of(f"cluster/{name}").memory
    assert found is not None and found.static == {
        "weights": 2 * (dense + expert),
        "gradients": 4 * (dense + expert),
        "optimizer": 12 * dense // shards + 12 * expert // expert_shards,
    }
