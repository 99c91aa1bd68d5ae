"""The Megatron GPT of a policy on the CPU, in one process, and its distributed checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.conversion.families import LLAMA3_KEYS
from nemo_fiberpo.conversion.tensors import scaling_of

_NORM_BESIDE_EXPERTS = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
"""Names of the norm before experts in a checkpoint: with Transformer Engine's layer spec, and with the local one."""


@contextlib.contextmanager
def single_process_megatron() -> Iterator[None]:
    """Megatron-core on the CPU with a single process, in the CPU mode of the actor."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from nemo_fiberpo import nemo_cpu
    from nemo_fiberpo.storage import pickles

    pickles.restrict()
    nemo_cpu.install()
    own = not dist.is_initialized()
    if own:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=30))
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if own:
            dist.destroy_process_group()


def build_gpt(model: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The Megatron GPT of NeMo's `model` section on one rank, with the local layer spec. Its parameters are not set."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig
    from nemo.collections.common.parts.utils import apply_rope_scaling

    experts = model.get("num_moe_experts")
    moe = {}
    if experts:
        moe = {"num_moe_experts": experts, "moe_router_topk": model["moe_router_topk"]}
        moe |= {"moe_router_pre_softmax": bool(model.get("moe_router_pre_softmax")), "moe_aux_loss_coeff": 0.0}
        moe |= {"moe_token_dispatcher_type": "allgather", "moe_router_load_balancing_type": "none"}
    config = TransformerConfig(
        num_layers=model["num_layers"],
        hidden_size=model["hidden_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model.get("num_query_groups"),
        kv_channels=model.get("kv_channels"),
        ffn_hidden_size=model["ffn_hidden_size"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=bool(model.get("qkv_bias")),
        normalization="RMSNorm",
        layernorm_epsilon=model["layernorm_epsilon"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        **moe,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(experts, False),
        vocab_size=model["override_vocab_size"],
        max_sequence_length=model["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=model.get("rotary_base", 10000),
        share_embeddings_and_output_weights=bool(model.get("share_embeddings_and_output_weights", True)),
    ).to(dtype)
    if (scaling := scaling_of(model)) is not None:  # Megatron-core 0.11 supports only the factor; NeMo scales likewise
        frequencies = gpt.rotary_pos_emb.inv_freq
        gpt.rotary_pos_emb.inv_freq = apply_rope_scaling(frequencies, *(scaling[name] for name in LLAMA3_KEYS))
    return gpt


@torch.no_grad()
def load_into(gpt: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Set every parameter, exactly once, to the tensor of its name, in the tensor's own precision."""
    left = dict(gpt.named_parameters())
    for name, tensor in tensors:
        parameter = left.pop(name)
        assert parameter.shape == tensor.shape, f"{name}: {tuple(tensor.shape)} for {tuple(parameter.shape)}"
        parameter.data = tensor.contiguous()
    assert not left, f"no tensor for {sorted(left)}"


def save(gpt: Any, folder: Path) -> None:
    """A distributed checkpoint that models of either layer spec can load."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    state = gpt.sharded_state_dict(prefix="model.")
    engine, local = (f"model.{name}" for name in _NORM_BESIDE_EXPERTS)
    if gpt.config.num_moe_experts:
        for name, entry in list(state.items()):
            if isinstance(entry, ShardedTensor) and entry.key == local:
                state[f"{name} of the other spec"] = dataclasses.replace(entry, key=engine)
    folder.mkdir()
    dist_checkpointing.save(state, str(folder))


def load(gpt: Any, folder: Path) -> None:
    """Set all parameters from a checkpoint of either layer spec, each in the precision in which it is stored."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    engine, local = (f"model.{name}" for name in _NORM_BESIDE_EXPERTS)

    def sharded() -> dict[str, Any]:
        state = gpt.sharded_state_dict(prefix="model.")
        for entry in state.values():
            if engine in metadata and isinstance(entry, ShardedTensor) and entry.key == local:
                entry.key = engine
        return state

    parameters = {f"model.{name}": parameter for name, parameter in gpt.named_parameters()}
    for name, entry in sharded().items():
        if name in parameters and getattr(entry, "key", None) in metadata:
            parameters[name].data = parameters[name].data.to(metadata[entry.key].dtype)
    state = sharded()
    loaded = dist_checkpointing.load(state, str(folder))
    gpt.load_state_dict({name.removeprefix("model."): value for name, value in loaded.items()}, strict=False)
    missing = {name for name, _ in gpt.named_parameters()} - {name.removeprefix("model.") for name in loaded}
    assert not missing, f"{folder}: no tensor for {sorted(missing)}"


def stored(folder: Path, model: Mapping[str, Any]) -> tuple[torch.dtype, int]:
    """Precision of the embedding in a checkpoint, and its number of rows. ValueError if the sizes of its tensors differ
    from NeMo's `model` section, before anything is allocated."""
    from megatron.core import dist_checkpointing

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; a .nemo of Megatron-core holds its weights there")
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    attention, layers = "decoder.layers.self_attention.linear_proj.weight", model["num_layers"]
    width = model.get("kv_channels") or model["hidden_size"] // model["num_attention_heads"]
    sizes = {
        attention: (layers, model["hidden_size"], model["num_attention_heads"] * width),
        "decoder.layers.mlp.linear_fc2.weight": (layers, model["hidden_size"], model["ffn_hidden_size"]),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": (
            *(layers, model.get("num_moe_experts"), model["hidden_size"], model["ffn_hidden_size"]),
        ),
    }
    for name, wanted in sizes.items():
        entry = metadata.get(f"model.{name}")
        if (found := None if entry is None else tuple(entry.global_shape)) not in (wanted, None):
            raise ValueError(f"{folder}: {name} has the shape {found}, but model_config.yaml implies {wanted}")
    embedding = metadata.get("model.embedding.word_embeddings.weight")
    if embedding is None or f"model.{attention}" not in metadata:
        raise ValueError(f"{folder}: does not hold a GPT of Megatron-core, which would have {attention}")
    return embedding.dtype, int(embedding.global_shape[0])
