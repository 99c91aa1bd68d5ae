"""Expert partitions in the aligner: what is checked before training, and what the hierarchy is given."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.config.model_checks import partition_table
from nemo_fiberpo.aligner.rollout.experts import ExpertLabels, labels_of, routing_metrics
from nemo_fiberpo.aligner.rollout.minibatch import Minibatch, flatten_column, flatten_labels
from nemo_fiberpo.aligner.rollout.strata import StrataLabels
from nemo_fiberpo.config import load_hierarchy
from nemo_fiberpo.megatron.sequences import packed_rows, padded_rows
from nemo_fiberpo.objective import ExpertPartitions

BUDGET = {"pos": 0.1, "neg": 0.1}
HIERARCHY = load_hierarchy(
    {
        "token_clip": 0.1,
        "strata": [
            {"name": "domain", "budget": BUDGET},
            {"name": "trajectory", "budget": BUDGET},
            {"name": "trajectory_expert", "join": ["trajectory", "expert_partition"], "budget": BUDGET},
        ],
    }
)


class Prompts:
    """What `StrataLabels` asks of a `PromptDataset`: six prompts of two domains."""

    first_index = 0

    def __len__(self):
        return 6

    def label_names(self, name, optional=False):
        assert name == "domain"
        return ["code", "math"]

    def label_table(self, name, optional=False):
        return torch.tensor([0, 1, 0, 1, 0, 1])


def test_a_dense_policy_is_refused_by_the_field_that_makes_it_dense():
    with pytest.raises(ValueError, match=r"num_moe_experts"):
        partition_table(ExpertPartitions(by="expert"), OmegaConf.create({"num_moe_experts": None}))


def test_blocks_of_experts_follow_the_expert_parallel_size_of_the_model():
    model = OmegaConf.create({"num_moe_experts": 4, "expert_model_parallel_size": 2})
    table, names = partition_table(ExpertPartitions(), model)
    assert table.tolist() == [0, 0, 1, 1] and len(names) == 2


@pytest.mark.parametrize(
    ("layers", "frequency", "said"),
    [([1, 9], None, "no layer 9; .* 1-4"), ([1], [0, 1, 0, 1], "layer 1 is dense; .* 2, 4")],
)
def test_a_layer_that_has_no_experts_is_refused_before_the_model_is_built(layers, frequency, said):
    model = OmegaConf.create({"num_moe_experts": 4, "num_layers": 4, "moe_layer_freq": frequency})
    with pytest.raises(ValueError, match=rf"expert_partitions\.layers: .*{said}"):
        partition_table(ExpertPartitions("expert", layers), model)


def test_a_hierarchy_with_experts_is_checked_against_the_prompts_before_there_is_a_rollout():
    StrataLabels(HIERARCHY, Prompts(), ("low", "high")).check()
    wrong = {"token_clip": 0.1, "strata": [{"name": "expert_partition", "budget": BUDGET, "budgets": {"hgih": BUDGET}}]}
    with pytest.raises(ValueError, match=r"budgets.hgih.*did you mean 'high'"):
        StrataLabels(load_hierarchy(wrong), Prompts(), ("low", "high")).check()


def test_labels_are_those_of_tokens_and_memberships_come_first():
    part = {
        "prompt_index": torch.tensor([0, 1]),
        "trajectory": torch.tensor([4, 5]),
        "expert_partition": torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.uint8),
    }
    labels = StrataLabels(HIERARCHY, Prompts(), ("low", "high")).labels(part)
    assert labels["domain"].tolist() == [0, 1] and labels["trajectory"].tolist() == [4, 5]
    assert labels["expert_partition"].dtype == torch.int64
    assert labels["expert_partition"].tolist() == [[0, 1, 1], [1, 0, 0]]
    part["expert_membership"] = torch.full((2, 3, 2), 100, dtype=torch.uint8)
    assert labels_of(part) is part["expert_membership"]


@pytest.mark.parametrize("packed", [False, True])
def test_memberships_follow_their_tokens_into_rows(packed):
    tokens = torch.arange(12).view(2, 6)
    mask = torch.ones(2, 5, dtype=torch.bool)
    membership = torch.stack([tokens[:, 1:], 255 - tokens[:, 1:]], -1).to(torch.uint8)
    rows = packed_rows(tokens, [6, 4]) if packed else padded_rows(tokens)
    found = flatten_labels(membership, mask, [rows])
    live = rows.source.reshape(-1) >= 0
    assert found.shape == (rows.tokens.numel(), 2)
    assert torch.equal(found[live][:, 0].long(), rows.targets.reshape(-1)[live])
    assert int(found[~live].sum()) == 0
    back = torch.zeros_like(membership)
    rows.put(rows.take(membership), back)
    reached = flatten_column(torch.ones(2, 5), [rows]).sum()
    assert int((back.sum(-1) == 255).sum()) == int(reached)


def test_tokens_that_changed_their_partition_are_counted_by_the_one_they_had():
    class Capture:
        def masses(self):
            return [torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]]], dtype=torch.float64)]

        def release(self):
            pass

    experts = ExpertLabels.__new__(ExpertLabels)
    experts.names, experts.capture = ("low", "high"), Capture()
    old = torch.tensor([[0, 1, 0, 1]], dtype=torch.uint8)
    for masked, counts in ((3, [[2, 1], [1, 0]]), (2, [[1, 2], [0, 1]])):
        mask = torch.ones(1, 4, dtype=torch.bool)
        mask[0, masked] = False
        minibatch = Minibatch([], [], None, [], [], [mask], None, expert_labels=[old])
        assert experts.changed(minibatch).tolist() == counts


def test_routing_metrics_are_shares_of_tokens():
    metrics = routing_metrics(torch.tensor([[6.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), ("a", "b", "c"))
    assert metrics["routing/changed"] == 3 / 8
    assert metrics["routing/changed/a"] == 0.5 and metrics["routing/changed/b"] == 0.0
    assert "routing/changed/c" not in metrics, "nothing to be a share of"
    assert [metrics[f"routing/share/{name}"] for name in "abc"] == [0.75, 0.25, 0.0]
