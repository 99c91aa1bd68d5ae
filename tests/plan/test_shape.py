"""Numbers of parameters: against the published totals, NeMo's own configurations, and real Megatron models."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from nemo_fiberpo.plan.shape import ModelShape
from tests.plan.configs import shape_of
from tests.support import distributed

PUBLISHED = {
    # total and active, as the models' cards have them
    "llama3_1_8b": (8_030_261_248, 8.03e9),
    "mixtral_8x7b": (46_702_792_704, 12.9e9),
    "mixtral_8x22b": (140_620_634_112, 39.1e9),
    "qwen3_235b_a22b": (235_093_634_560, 22.2e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name: str):
    total, active = PUBLISHED[name]
    shape = shape_of(f"cluster/{name}")
    assert shape.total.total == total
    assert shape.active == pytest.approx(active, rel=5e-3)


def test_parameters_of_mixtral_by_hand():
    h, f, d = 4096, 14336, 128
    layer = h * (32 + 2 * 8) * d + 32 * d * h + 2 * h + h * 8
    assert shape_of("cluster/mixtral_8x7b").total.total == 32 * (layer + 8 * 3 * h * f) + 2 * 32000 * h + h


def nemo_defaults(module: str, *classes: str) -> dict[str, Any]:
    """Literal defaults of a dataclass of `nemo.collections.llm`, read from its source: importing it needs a GPU's
    libraries."""
    spec = importlib.util.find_spec("nemo")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "collections/llm/gpt/model" / f"{module}.py").read_text())
    found: dict[str, Any] = {}
    for name in classes:
        node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for entry in node.body:
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.value, ast.Constant):
                found[entry.target.id] = entry.value.value  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("name", "module", "classes"),
    [
        ("llama3_1_8b", "llama", ("LlamaConfig", "Llama3Config", "Llama31Config", "Llama31Config8B")),
        ("mixtral_8x7b", "mixtral", ("MixtralConfig", "MixtralConfig8x7B")),
        ("mixtral_8x22b", "mixtral", ("MixtralConfig", "MixtralConfig8x22B")),
    ],
)
def test_dimensions_are_those_of_nemos_own_configuration(name: str, module: str, classes: tuple[str, ...]):
    nemo, shape = nemo_defaults(module, *classes), shape_of(f"cluster/{name}")
    named = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "gated_linear_unit": shape.gated,
        "add_bias_linear": shape.bias,
        "share_embeddings_and_output_weights": shape.tied,
    }
    if shape.experts:
        named |= {"num_moe_experts": shape.experts, "moe_router_topk": shape.topk}
    assert named == {key: nemo[key] for key in named}


CASES: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (1, {}, {"gated": True}),
    (1, {}, {"gated": False, "bias": True, "qkv_bias": True, "tied": True, "norm": 2}),
    (1, {}, {"experts": 4, "topk": 2, "expert_ffn": 32, "qk_norm": True}),
    (4, {"tp": 2, "pp": 2}, {"gated": True, "qkv_bias": True}),
    (4, {"pp": 2, "ep": 2}, {"experts": 4, "topk": 2, "expert_ffn": 32, "tied": True}),
    (4, {"tp": 2, "ep": 4, "etp": 1}, {"experts": 4, "topk": 2, "expert_ffn": 32, "shared_ffn": 16}),
]


def tiny_shape(changes: dict[str, Any]) -> ModelShape:
    base = {"layers": 4, "hidden": 32, "heads": 4, "groups": 2, "head_dim": 8, "ffn": 32, "vocab": 64}
    return ModelShape(**{**base, **changes})


def real_parameters(rank: int, world: int, sizes: dict[str, int], changes: dict[str, Any]) -> int:
    """Of a real Megatron GPTModel on this rank."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    from nemo_fiberpo.megatron import cpu
    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    shape, tp, pp, ep = tiny_shape(changes), sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("ep", 1)
    moe: dict[str, Any] = {}
    if shape.experts:
        moe = {
            "num_moe_experts": shape.experts, "moe_router_topk": shape.topk, "moe_ffn_hidden_size": shape.expert_ffn,
            "expert_model_parallel_size": ep, "expert_tensor_parallel_size": sizes.get("etp", tp),
            "moe_token_dispatcher_type": "alltoall", "sequence_parallel": tp > 1,
            "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
        }  # fmt: skip
    with cpu.megatron_on_cpu():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep, expert_tensor_parallel_size=sizes.get("etp"),
        )  # fmt: skip
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
            num_query_groups=shape.groups, kv_channels=shape.head_dim, ffn_hidden_size=shape.ffn,
            gated_linear_unit=shape.gated, add_bias_linear=shape.bias, add_qkv_bias=shape.qkv_bias,
            normalization="RMSNorm" if shape.norm == 1 else "LayerNorm", qk_layernorm=shape.qk_norm,
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, use_cpu_initialization=True,
            pipeline_dtype=torch.float32, hidden_dropout=0.0, attention_dropout=0.0, **moe,
        )  # fmt: skip
        model = GPTModel(
            config,
            local_block_spec(config, shape.layers // pp)
            if config.sequence_parallel
            else get_gpt_layer_local_spec(shape.experts or None, False, shape.qk_norm),
            vocab_size=shape.vocab, max_sequence_length=16, position_embedding_type="rope",
            share_embeddings_and_output_weights=shape.tied,
            pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        )  # fmt: skip
        number = sum(parameter.numel() for parameter in model.parameters())
        parallel_state.destroy_model_parallel()
    return number


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "sizes", "changes"), CASES)
def test_parameters_of_every_rank_are_those_of_a_real_megatron_model(
    world: int, sizes: dict[str, int], changes: dict[str, Any]
):
    shape, pp, tp, ep = tiny_shape(changes), sizes.get("pp", 1), sizes.get("tp", 1), sizes.get("ep", 1)
    stages = [shape.stage(stage, pp, tp, ep, sizes.get("etp", tp)).total for stage in range(pp)]
    found = distributed.run(real_parameters, world, sizes, changes, timeout=120)
    assert found == [stages[rank * pp // world] for rank in range(world)]


def test_stages_of_other_lengths_add_up_to_the_model():
    shape = shape_of("cluster/qwen3_235b_a22b")
    layers = [shape.layers_of(stage, 8) for stage in range(8)]
    assert layers == [11, *[12] * 6, 11]
    assert sum(shape.stage(stage, 8).total for stage in range(8)) == shape.total.total


def test_what_the_size_follows_from_is_named_all_at_once():
    with pytest.raises(ValueError, match=r"model.num_layers, model.ffn_hidden_size, cluster.vocab_size: needed"):
        ModelShape.from_config({"hidden_size": 64, "num_attention_heads": 4}, None, 1)


def test_a_vocabulary_is_padded_as_nemo_pads_it():
    config = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8}
    assert ModelShape.from_config(config, 32000, 1).vocab == 32000
    assert ModelShape.from_config(config, 32001, 4).vocab == 32256
    assert ModelShape.from_config(config | {"make_vocab_size_divisible_by": 8}, 45, 2).vocab == 48
    assert ModelShape.from_config(config | {"override_vocab_size": 50}, 45, 2).vocab == 50
