"""What cannot be read of routers, by name, on every stage; layers without experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nemo_fiberpo.megatron.routing import RoutingCapture, chosen_layers
from nemo_fiberpo.megatron.step import current_log_probs
from nemo_fiberpo.objective import ExpertPartitions
from tests.megatron import partitions, tiny
from tests.megatron.test_routing import Host
from tests.megatron.tiny import Layout
from tests.support import distributed


def message(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def refusal_worker(rank: int, world: int, layout: Layout) -> dict[str, str]:
    with tiny.megatron(layout):
        host = Host(layout)
        chunks, config = host.policy.chunks, host.policy.config
        table, _ = ExpertPartitions(partitions.PARTITIONS).table(tiny.EXPERTS)
        said = {
            "layer": message(RoutingCapture, chunks, table, [1, 9]),
            "word": message(RoutingCapture, chunks, table, "first"),
            "short": message(RoutingCapture, chunks, table[:-1]),
            "gap": message(RoutingCapture, chunks, table * 2),
        }
        capture = RoutingCapture(chunks, table)
        with capture.watch(host.policy, host.step.microbatches) as watched:
            current_log_probs(watched, host.step.microbatches[:1])
        said["not run"] = message(capture.masses)
        for name, changes in {
            "dense": {"num_moe_experts": None},
            "no layer": {"moe_layer_freq": [0] * config.num_layers},
            "dense layer": {"moe_layer_freq": 2},
            "score": {"moe_router_score_function": "tanh"},
            "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
        }.items():
            before = {field: getattr(config, field) for field in changes}
            for field, value in changes.items():
                setattr(config, field, value)
            said[name] = message(RoutingCapture, chunks, table, [1, 2])
            for field, value in before.items():
                setattr(config, field, value)
        return said


def test_refusals_say_what_would_be_right_on_every_stage() -> None:
    ranks = distributed.run(refusal_worker, 2, Layout(pp=2, microbatches=2))
    assert ranks[0] == ranks[1]
    said = ranks[0]
    assert said["layer"] == "expert_partitions.layers: there is no layer 9; the MoE layers of this model are 1-2"
    assert said["word"].startswith("expert_partitions.layers: must be all or a list of layer numbers")
    assert "one entry for each of the model's 8 experts" in said["short"]
    assert "without a gap, got [0, 2, 4]" in said["gap"]
    assert said["not run"].startswith("routing: micro-batch 1 has not run under `watch`")
    assert "the model is dense (num_moe_experts is not set" in said["dense"] and said["no layer"] == said["dense"]
    assert said["dense layer"] == "expert_partitions.layers: layer 2 is dense; the MoE layers of this model are 1"
    assert said["score"].startswith("moe_router_score_function: 'tanh' is not known")
    assert said["sinkhorn"].startswith("moe_router_load_balancing_type: sinkhorn")


def missing_router_worker(rank: int, world: int) -> str:
    """A model whose second layer is dense though its config says otherwise."""
    layout = Layout()
    with tiny.megatron(layout):
        host = Host(layout)
        dense = tiny.make_model(Layout(experts=0))
        host.model.module.decoder.layers[1] = dense.module.decoder.layers[1]
        return message(partitions.read_masses, host.policy, host.step.microbatches)


def test_a_layer_that_the_config_promises_and_the_model_lacks_is_no_part_of_a_mean() -> None:
    [said] = distributed.run(missing_router_worker, 1)
    assert said.startswith("routing: the routers of the layers [1, 2] did not all run in micro-batch 0; moe_layer_freq")


@dataclasses.dataclass
class Config:
    num_layers: int
    num_moe_experts: int | None
    moe_layer_freq: int | list[int]


def test_layers_with_experts_are_those_of_moe_layer_freq() -> None:
    assert chosen_layers(Config(5, 8, 2)) == (1, 3, 5)
    assert chosen_layers(Config(4, 8, [0, 1, 1, 0])) == (2, 3)
    assert chosen_layers(Config(4, 8, 1), [3, 1]) == (1, 3)
    with pytest.raises(ValueError, match="layer 1 is dense; the MoE layers of this model are 2-3, 5"):
        chosen_layers(Config(5, 8, [0, 1, 1, 0, 1]), [1])
