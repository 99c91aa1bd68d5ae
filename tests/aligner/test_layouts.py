"""The training script on other layouts: what a run does must not depend on them.

Runs whose responses are generated on equally many ranks (data parallel times context parallel) sample the same tokens,
so their optimizer steps have the same gradient, to the rounding of float32. Auxiliary losses are off: Megatron's depend
on which tokens share a micro-batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import forked
from tests.support.launching import fresh, metrics, optimizer_steps

pytestmark = pytest.mark.timeout(600)

GRADED = ["rewards.graders={checksum: 'tests.support.checksum_grader:grade'}", "rewards.score=raw"]
ONE_ROLLOUT = ["algorithm.rl_steps=1", "algorithm.save_interval=0", "model.moe_aux_loss_coeff=0", "model.optim.lr=1e-3"]
TENSOR = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
CONTEXT = ["model.context_parallel_size=2"]
PIPELINE = ["model.pipeline_model_parallel_size=2"]
PACKED = ["algorithm.packing=true"]
# Labels of tokens that the routers give: the gradient agrees only where they do.
EXPERTS = [
    "hierarchy=expert_trajectory",
    "hierarchy.expert_partitions.by=expert",
    "hierarchy.strata.trajectory_expert.min_tokens=2",
]
# Labels that the sampled tokens give: segments in trajectories, a user's function as a branch, and masked spans.
SEGMENTS = [
    "hierarchy=think_answer",
    "hierarchy.token_clip=0.2",
    "hierarchy.token_labels.segment.markers={think: ['1', '2'], word: ['a', 'e']}",
    "hierarchy.strata.segment_in_trajectory.min_tokens=2",
    "hierarchy.token_labels.kind=tests.support.own_labels:kinds",
    "hierarchy.branches={kind: {budget: {pos: 0.01, neg: 0.005}}}",
    "hierarchy.ignore=['3', '4']",
]
SOFT = ["hierarchy.expert_partitions.membership=soft"]


def graded_by_checksum(run_dir: Path) -> None:
    """Rewards that differ from response to response, whatever the policy has learned."""
    prompts = run_dir / "data" / "train.jsonl"
    prompts.write_text(prompts.read_text().replace('"grader": "reasoning_gym"', '"grader": "checksum"'))


def rollout_and_steps(start: Path, tmp_path: Path, name: str, processes: int, *overrides: str):
    """Reward metrics of the rollout, and the rows of its two optimizer steps."""
    run_dir = fresh(start, tmp_path, name)
    graded_by_checksum(run_dir)
    forked.launch("train_gpt_fiberpo.py", run_dir, *ONE_ROLLOUT, *GRADED, *overrides, processes=processes)
    (rollout,) = [row for row in metrics(run_dir) if "train_rollouts/rewards" in row]
    steps = optimizer_steps(run_dir)
    assert len(steps) == 2
    kept = "reward", "length", "token_share", "entropy/"
    return {key: value for key, value in rollout.items() if any(part in key for part in kept)}, steps


@pytest.mark.parametrize(
    ("hierarchy", "layouts"),
    [
        (EXPERTS, {"one process": (1, []), "packed, tensor and sequence parallel": (2, [*PACKED, *TENSOR])}),
        (
            [*EXPERTS, *SOFT],
            {
                "data parallel": (2, []),
                "packed, context parallel": (2, [*PACKED, *CONTEXT]),
                "context and pipeline parallel": (4, [*CONTEXT, *PIPELINE]),
            },
        ),
    ],
)
def test_the_same_rollout_has_the_same_gradient_on_every_layout(start, tmp_path, hierarchy, layouts):
    results = {
        name: rollout_and_steps(
            start, tmp_path, name.replace(",", "").replace(" ", "-"), processes, *hierarchy, *overrides
        )
        for name, (processes, overrides) in layouts.items()
    }
    first_rollout, first_steps = next(iter(results.values()))
    assert first_rollout["train_rollouts/rewards"] > 0.1 and first_steps[0]["train_optim/grad_norm"] > 0.01
    for name, (rollout, steps) in results.items():
        assert rollout == first_rollout, name
        for step, other in zip(steps, first_steps, strict=True):
            assert step["train_optim/grad_norm"] == pytest.approx(other["train_optim/grad_norm"], rel=2e-5), name
            assert step["train_optim/recompute_error"] < 1e-5, name
        # Nothing has moved: a label that is not at its token would differ from the routing there.
        assert steps[0]["train_optim/on_policy"] == 1.0 and steps[0]["train_optim/routing/changed"] < 0.01, name
        drift, loss = "train_optim/gates/log_ratio/abs_mean", "train_optim/loss"
        assert steps[1][drift] == pytest.approx(first_steps[1][drift], rel=1e-3), name
        assert steps[1][loss] == pytest.approx(first_steps[1][loss], abs=1e-6), name
        for step, other in zip(steps, first_steps, strict=True):
            routing = {key: value for key, value in step.items() if "/routing/share/" in key or "/merged_" in key}
            assert routing and routing == {key: other[key] for key in routing}, name


def test_one_pass_is_two_passes_where_cells_allow_it(start, tmp_path):
    """Prompt groups of 4 in micro-batches of 4: a group is in one micro-batch."""
    hierarchy = ["hierarchy=group"]
    two = rollout_and_steps(start, tmp_path, "two", 2, *hierarchy)
    one = rollout_and_steps(start, tmp_path, "one", 2, *hierarchy, "algorithm.passes=1")
    assert one[0] == two[0]
    for step, other in zip(one[1], two[1], strict=True):
        assert step["train_optim/gate_all_reduces"] == 1.0
        assert step["train_optim/grad_norm"] == pytest.approx(other["train_optim/grad_norm"], rel=2e-5)
    assert one[1][0]["train_optim/gates/log_ratio/max"] == 0.0, "the first step after a rollout is on-policy"
    for key, value in two[1][1].items():
        if "gates/" in key:
            assert one[1][1][key] == pytest.approx(value, rel=1e-2, abs=1e-5), key


@pytest.mark.parametrize("packing", [False, True])
def test_optimistic_steps_are_two_passes(start, tmp_path, packing: bool):
    """With a domain that is everywhere. The first step after a rollout is on-policy; the second one is optimistic."""
    given = [*(PACKED if packing else []), "algorithm.micro_batches=whole_groups"]
    two = rollout_and_steps(start, tmp_path, "two", 2, *given)
    auto = rollout_and_steps(start, tmp_path, "auto", 2, *given, "algorithm.passes=auto")
    assert auto[0] == two[0]
    for step, other in zip(auto[1], two[1], strict=True):
        assert step["train_optim/grad_norm"] == pytest.approx(other["train_optim/grad_norm"], rel=2e-5)
    first, second = auto[1][:2]
    assert first["train_optim/on_policy"] == 1.0 and "train_optim/second_pass" not in first
    assert second["train_optim/gate_all_reduces"] == 3.0 and 0.0 <= second["train_optim/second_pass"] <= 1.0


def test_all_forward_passes_first_are_two_passes(start, tmp_path):
    """With activations recomputed, a KL penalty and losses of the routers, over two RL steps."""
    given = [
        *ONE_ROLLOUT,
        *GRADED,
        "algorithm.rl_steps=2",
        "algorithm.kl.coefficient=0.1",
        "model.moe_aux_loss_coeff=0.01",
    ]
    full = ["granularity=full", "method=uniform", "num_layers=1"]
    recompute = [f"model.activations_checkpoint_{value}" for value in full]
    rows = []
    for name, more in {"two": [], "all": ["algorithm.passes=all_forward", *recompute]}.items():
        run_dir = fresh(start, tmp_path, name)
        graded_by_checksum(run_dir)
        forked.launch("train_gpt_fiberpo.py", run_dir, *given, *more, processes=2)
        rows.append(metrics(run_dir))
    two, kept = rows
    assert sum("train_optim/grad_norm" in row for row in two) == 4 and len(kept) == len(two)
    for row, other in zip(kept, two, strict=True):
        off_policy = other.get("train_optim/on_policy") == 0.0
        assert row.keys() == other.keys() - ({"train_optim/recompute_error"} if off_policy else set())
        for key, value in row.items():
            if key == "train_optim/grad_norm":
                assert value == pytest.approx(other[key], rel=2e-5)
            elif key != "train_optim/recompute_error":
                assert value == pytest.approx(other[key], rel=1e-2, abs=1e-5), key


def test_one_pass_refuses_a_domain_that_is_everywhere(start, tmp_path):
    with pytest.raises(AssertionError, match=r"one pass: domain 0 \('algorithms'\) has tokens in micro-batch \d of dp"):
        rollout_and_steps(start, tmp_path, "domain", 2, "algorithm.passes=1")


@pytest.mark.parametrize(
    "layouts",
    [
        {"one process": (1, []), "packed, tensor and sequence parallel": (2, [*PACKED, *TENSOR])},
        {"data parallel": (2, []), "packed, context parallel": (2, [*PACKED, *CONTEXT])},
    ],
)
def test_labels_of_sampled_tokens_are_the_same_on_every_layout(start, tmp_path, layouts):
    results = {
        name: rollout_and_steps(
            start, tmp_path, name.replace(",", "").replace(" ", "-"), processes, *SEGMENTS, *overrides
        )
        for name, (processes, overrides) in layouts.items()
    }
    (first_rollout, first_steps), *_ = results.values()
    shares = {key.partition("/")[2]: value for key, value in first_rollout.items() if "token_share" in key}
    segments = {name: shares.pop(f"token_share/segment.{name}") for name in ("think", "word", "answer")}
    assert all(segments.values()) and sum(segments.values()) == pytest.approx(1.0)
    assert {name.rpartition(".")[2] for name in shares} == {"digit", "arithmetic", "strings", "algorithms"}
    assert sum(shares.values()) == pytest.approx(1.0)
    for name, (rollout, steps) in results.items():
        entropies = {key for key in rollout if "entropy/" in key}
        assert len(entropies) == 7, name
        for key, value in rollout.items():
            assert value == pytest.approx(first_rollout[key], rel=1e-5), f"{name}: {key}"
        assert steps[0]["train_optim/on_policy"] == 1.0 and steps[1]["train_optim/gate_all_reduces"] == 4.0, name
        for step, other in zip(steps, first_steps, strict=True):
            assert step["train_optim/grad_norm"] == pytest.approx(other["train_optim/grad_norm"], rel=2e-5), name
            assert step["train_optim/recompute_error"] < 1e-5, name
        named = {key: value for key, value in first_steps[1].items() if key.endswith(("token_share", "merged_tokens"))}
        assert {key: steps[1][key] for key in named} == named, name
        assert "train_optim/gates/segment_in_trajectory.segment.think/token_share" in named
        assert "train_optim/gates/kind.digit/token_share" in named
        for key, value in first_steps[1].items():
            if "/drift" in key or key.endswith("/loss"):
                assert steps[1][key] == pytest.approx(value, rel=1e-2, abs=1e-6), f"{name}: {key}"


HALF = ["model.expert_model_parallel_size=2", "model.megatron_amp_O2=true", "trainer.precision=bf16"]


@pytest.mark.parametrize(
    ("processes", "overrides", "rounding"),
    [(1, [], 2e-6), (2, TENSOR, 2e-6), (2, HALF, 0.05), (4, [*CONTEXT, *PIPELINE, *PACKED], 2e-6)],
    ids=["one process", "tensor parallel", "expert parallel in bf16", "context and pipeline parallel, packed"],
)
def test_generation_hands_over_the_log_probs_of_the_tokens_that_it_sampled(
    start, tmp_path, processes, overrides, rounding
):
    run_dir = fresh(start, tmp_path, "run")
    graded_by_checksum(run_dir)
    correction = "algorithm.rollout_correction={kind: sequence_mask, low: 0.9, high: 1.1}"
    more = [*ONE_ROLLOUT, *GRADED, correction, *overrides]
    forked.launch("train_gpt_fiberpo.py", run_dir, *more, processes=processes)
    (rollout,) = [row for row in metrics(run_dir) if "train_rollouts/rewards" in row]
    # Decoding from a cache and reading whole sequences are the same function, but for rounding.
    assert rollout["train_rollouts/rollout_correction/abs_log_ratio"] < rounding
    assert rollout["train_rollouts/rollout_correction/touched"] == 0
    assert rollout["train_rollouts/rollout_correction/mean_weight"] == pytest.approx(1, abs=10 * rounding)
    first, second = optimizer_steps(run_dir)
    assert first["train_optim/on_policy"] == 1.0 and second["train_optim/gate_all_reduces"] == 2.0
    # In bfloat16 with experts on two ranks, too, the passes differ by rounding at most.
    assert first["train_optim/recompute_error"] < max(1e-5, 2 * rounding)
    assert second["train_optim/gates/trajectory/cells"] == 16.0
