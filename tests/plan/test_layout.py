"""Ranks, groups and what must divide what."""

from __future__ import annotations

import pytest

from nemo_fiberpo.plan.layout import Layout
from nemo_fiberpo.plan.shape import ModelShape

SHAPE = ModelShape(layers=8, hidden=64, heads=8, groups=4, head_dim=8, ffn=128, vocab=512)
MOE = ModelShape(8, 64, 8, 4, 8, 128, 512, experts=8, topk=2, expert_ffn=128)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, 8, tp=2, pp=2, cp=2, ep=4, etp=2),
        Layout(4, 8, tp=1, pp=4, ep=8),
        Layout(4, 8, tp=4, pp=2, cp=2, ep=8, etp=1),
    ],
    ids=str,
)
def test_groups_are_megatrons(layout: Layout):
    """Its own rank generator, in the order that NeMo gives it."""
    from megatron.core.parallel_state import RankGenerator

    order, found = "tp-cp-ep-dp-pp", layout.groups()
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    experts = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.expert_dp, pp=layout.pp, cp=1, order=order)
    wanted = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp"),
        "pipeline": dense.get_ranks("pp"),
        "expert tensor": experts.get_ranks("tp"),
        "expert": experts.get_ranks("ep"),
        "expert data": experts.get_ranks("dp"),
    }
    assert {name: sorted(groups) for name, groups in found.items()} == {
        name: sorted(map(list, groups)) for name, groups in wanted.items()
    }


@pytest.mark.parametrize(
    ("layout", "shape", "said"),
    [
        (Layout(1, 8, cp=3), SHAPE, ["trainer.num_nodes x devices: 1 x 8 = 8 ranks are not a multiple of"]),
        (Layout(2, 8, tp=8), SHAPE, ["model.tensor_model_parallel_size: 8 does not divide model.num_query_groups = 4"]),
        (Layout(3, 8, pp=3), SHAPE, ["model.pipeline_model_parallel_size: 3 does not divide model.num_layers = 8"]),
        (
            Layout(1, 8, pp=2, vpp=3),
            SHAPE,
            ["model.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size: 6 does not divide"],
        ),
        (
            Layout(1, 8, pp=2, ep=8),
            MOE,
            ["model.expert_model_parallel_size: 8 does not divide data x context parallel"],
        ),
        (Layout(3, 8, ep=3), MOE, ["model.expert_model_parallel_size: 3 does not divide model.num_moe_experts = 8"]),
        (Layout(1, 8, ep=2), SHAPE, ["model.expert_model_parallel_size: 2, but the model has no experts"]),
        (
            Layout(3, 8, tp=3, pp=1, ep=1),
            SHAPE,
            ["num_attention_heads = 8", "num_query_groups = 4", "vocabulary = 512", "ffn_hidden_size = 128"],
        ),
    ],
)
def test_what_does_not_divide_is_named_all_of_it(layout: Layout, shape: ModelShape, said: list[str]):
    found = list(layout.problems(shape))
    assert len(found) == len(said)
    for message, part in zip(found, said, strict=True):
        assert part in message


def test_what_fits_has_no_problems():
    assert not list(Layout(2, 8, tp=2, pp=2, cp=2, ep=4, etp=2).problems(MOE))
    assert not list(Layout(2, 8, tp=4, pp=4).problems(SHAPE))


def test_groups_that_cross_nodes_are_a_warning():
    assert not list(Layout(4, 8, pp=4, ep=8).warnings())
    assert len(list(Layout(2, 8, tp=16).warnings())) == 1
    assert len(list(Layout(4, 8, tp=4, ep=8, etp=4).warnings())) == 1


def test_a_size_that_is_no_whole_number_is_named():
    with pytest.raises(ValueError, match=r"model.context_parallel_size: must be a whole number of at least 1, got -2"):
        Layout.from_config({"context_parallel_size": -2}, {"num_nodes": 1, "devices": 8})
    with pytest.raises(ValueError, match="trainer.devices"):
        Layout.from_config({}, {"num_nodes": 1, "devices": "auto"})
