"""Tensors and configuration of Hugging Face models (Llama, Qwen2 and Mixtral) as those of a Megatron GPT, and back.

Tensors are only renamed and rearranged. No arithmetic touches a weight, so a round trip gives the same bits. Both
directions work on any mapping of names to tensors; `files` reads and writes files.

    q, k, v          one matrix, by query group: the group's queries, its key, its value
    gate, up         one matrix, gate first (w1, w3 of a Mixtral expert)
    tied embeddings  one tensor on both sides
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.conversion.families import FAMILIES, LLAMA3_KEYS, completed

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The values of Llama 3.1, which are NeMo's defaults."""

_NEMO_ASKS_FOR: dict[str, Any] = {
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "grad_allreduce_chunk_size_mb": 125,
    "apex_transformer_log_level": 30,
    "nsys_profile": {"enabled": False},
}
"""Keys that MegatronGPTModel reads without a default; a run's own config overrides them."""


def model_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """NeMo's `model` section for the config.json `hf`. ValueError naming a field that NeMo does not support."""
    family, hf = completed(hf)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    out = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim") or hidden // heads,
        "max_position_embeddings": hf["max_position_embeddings"],
        "encoder_seq_length": hf["max_position_embeddings"],
        "override_vocab_size": hf["vocab_size"],
        "make_vocab_size_divisible_by": 1,
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": family == "qwen2",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": hf["rope_theta"],
        "scale_positional_embedding": hf["rope_scaling"] is not None,
        "share_embeddings_and_output_weights": bool(hf["tie_word_embeddings"]),
        "init_method_std": hf["initializer_range"],
        "num_moe_experts": None,
        "mcore_gpt": True,
        "huggingface_tokens": {name: hf[name] for name in SPECIAL_TOKENS},
    } | _NEMO_ASKS_FOR
    if hf["rope_scaling"] is not None:
        out |= {nemo: hf["rope_scaling"][name] for name, nemo in LLAMA3_KEYS.items()}
    if family == "mixtral":
        out |= {
            "num_moe_experts": hf["num_local_experts"],
            "moe_router_topk": hf["num_experts_per_tok"],
            "moe_ffn_hidden_size": hf["intermediate_size"],
            # Weights of the chosen experts sum to 1: a softmax over only their logits.
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": hf["router_aux_loss_coef"],
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": False,
        }
    return out


def scaling_of(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling` (llama3) for NeMo's `model` section; None without scaling."""
    if not model.get("scale_positional_embedding"):
        return None
    return {name: model.get(nemo, LLAMA3_SCALING[name]) for name, nemo in LLAMA3_KEYS.items()}


_OF_THE_FAMILIES: dict[str, Any] = {"normalization": "rmsnorm", "position_embedding_type": "rope", "bias": False}
_UNLESS_GIVEN: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "qk_layernorm": False,
    "apply_embedding_scaling": False,
    "window_size": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
}
"""Values that all models of these families have, by NeMo's keys. Those of the second are NeMo's defaults, so their keys
may be absent."""


def huggingface_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for NeMo's `model` section. ValueError naming a field that none of the families has."""
    found = {name: model.get(name) for name in _OF_THE_FAMILIES}
    found |= {name: model[name] for name in _UNLESS_GIVEN if model.get(name) is not None}
    for name, value in found.items():
        wanted = (_OF_THE_FAMILIES | _UNLESS_GIVEN)[name]
        if value != wanted:
            raise ValueError(f"model.{name}: {value!r}; a model of the Llama families has {wanted!r}")
    if model.get("activation") not in ("swiglu", "fast-swiglu"):
        raise ValueError(
            f"model.activation: {model.get('activation')!r}; a model of the Llama families has fast-swiglu"
        )
    experts = model.get("num_moe_experts")
    family = "mixtral" if experts else "qwen2" if model.get("qkv_bias") else "llama"
    name = next(name for name, of in FAMILIES.items() if of == family)
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    out: dict[str, Any] = {
        "architectures": [name],
        "model_type": family,
        "num_hidden_layers": model["num_layers"],
        "hidden_size": hidden,
        "intermediate_size": model["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("num_query_groups") or heads,
        "max_position_embeddings": model["max_position_embeddings"],
        "rms_norm_eps": model["layernorm_epsilon"],
        "hidden_act": "silu",
        "rope_theta": model.get("rotary_base", 10000.0),
        "tie_word_embeddings": bool(model.get("share_embeddings_and_output_weights", True)),
        "initializer_range": model.get("init_method_std", 0.02),
    }
    out |= model.get("huggingface_tokens") or {}
    if (model.get("kv_channels") or hidden // heads) != hidden // heads:
        if family == "qwen2":
            raise ValueError(f"model.kv_channels: {model['kv_channels']}; Qwen2 has hidden_size / num_attention_heads")
        out["head_dim"] = model["kv_channels"]
    if (scaling := scaling_of(model)) is not None:
        out["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if experts:
        if model.get("qkv_bias"):
            raise ValueError("model.qkv_bias: true; Mixtral has no biases")
        if (model.get("moe_ffn_hidden_size") or model["ffn_hidden_size"]) != model["ffn_hidden_size"]:
            raise ValueError(f"model.moe_ffn_hidden_size: {model['moe_ffn_hidden_size']}; must be ffn_hidden_size")
        if model.get("moe_router_pre_softmax"):
            raise ValueError("model.moe_router_pre_softmax: true; Mixtral's weights of chosen experts sum to 1")
        out |= {"num_local_experts": experts, "num_experts_per_tok": model["moe_router_topk"], "sliding_window": None}
        out["router_aux_loss_coef"] = model.get("moe_aux_loss_coeff", 0.0)
    return out


Put = Callable[..., Tensor]
Rule = tuple[str, tuple[str, ...], Put, Callable[[Tensor], tuple[Tensor, ...]]]


def _rules(model: Mapping[str, Any]) -> Iterator[Rule]:
    """(Megatron name, Hugging Face names, Hugging Face tensors -> Megatron's, and back) of every tensor."""
    yield "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _same, _alone
    yield "decoder.final_layernorm.weight", ("model.norm.weight",), _same, _alone
    if not model.get("share_embeddings_and_output_weights", True):
        yield "output_layer.weight", ("lm_head.weight",), _same, _alone
    groups = model.get("num_query_groups") or model["num_attention_heads"]
    queries = model["num_attention_heads"] // groups
    for layer in range(model["num_layers"]):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield here + "input_layernorm.weight", (there + "input_layernorm.weight",), _same, _alone
        yield here + "pre_mlp_layernorm.weight", (there + "post_attention_layernorm.weight",), _same, _alone
        for kind in ("weight", "bias") if model.get("qkv_bias") else ("weight",):
            projections = tuple(f"{there}self_attn.{name}_proj.{kind}" for name in "qkv")
            join, part = _by_group(groups, queries)
            yield f"{here}self_attention.linear_qkv.{kind}", projections, join, part
        yield here + "self_attention.linear_proj.weight", (there + "self_attn.o_proj.weight",), _same, _alone
        if not model.get("num_moe_experts"):
            gate_up = there + "mlp.gate_proj.weight", there + "mlp.up_proj.weight"
            yield here + "mlp.linear_fc1.weight", gate_up, _stack, _halves
            yield here + "mlp.linear_fc2.weight", (there + "mlp.down_proj.weight",), _same, _alone
            continue
        yield here + "mlp.router.weight", (there + "block_sparse_moe.gate.weight",), _same, _alone
        for expert in range(model["num_moe_experts"]):
            one, other = f"{here}mlp.experts.local_experts.{expert}.", f"{there}block_sparse_moe.experts.{expert}."
            yield one + "linear_fc1.weight", (other + "w1.weight", other + "w3.weight"), _stack, _halves
            yield one + "linear_fc2.weight", (other + "w2.weight",), _same, _alone


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _alone(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _stack(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def _halves(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _by_group(groups: int, queries: int) -> tuple[Put, Callable[[Tensor], tuple[Tensor, ...]]]:
    def join(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rest = q.shape[1:]
        parts = [part.view(groups, -1, *rest) for part in (q, k, v)]
        return torch.cat(parts, 1).reshape(-1, *rest)

    def part(tensor: Tensor) -> tuple[Tensor, ...]:
        rest = tensor.shape[1:]
        width = tensor.shape[0] // (groups * (queries + 2))
        q, k, v = tensor.view(groups, -1, *rest).split([queries * width, width, width], 1)
        return tuple(entry.reshape(-1, *rest) for entry in (q, k, v))

    return join, part


def to_megatron(read: Callable[[str], Tensor], model: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a Megatron GPT with the local layer spec; `read` gives a Hugging Face tensor by its name, or
    raises KeyError."""
    for name, sources, join, _ in _rules(model):
        yield name, join(*(read(source) for source in sources))


def to_huggingface(tensors: Mapping[str, Tensor], model: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the Hugging Face model, from those of a Megatron GPT with the local layer spec."""
    for name, targets, _, part in _rules(model):
        yield from zip(targets, part(tensors[name]), strict=True)


def precisions_of(precision: Callable[[str], torch.dtype], model: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The precision in which each tensor of the Megatron GPT holds the values of its Hugging Face tensors exactly.

    Megatron's checkpoint stores one tensor for all layers, and one for all experts, so the widest precision counts.
    """
    widest: dict[str, torch.dtype] = {}
    for name, sources, _, _ in _rules(model):
        for source in sources:
            found, kind = precision(source), _kind(name)
            widest[kind] = torch.promote_types(widest.get(kind, found), found)
    return {name: widest[_kind(name)] for name, _, _, _ in _rules(model)}


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the Hugging Face model, by its name."""
    hidden, inner = model["hidden_size"], model["ffn_hidden_size"]
    queries = model["num_attention_heads"] * model["kv_channels"]
    keys = model["num_query_groups"] * model["kv_channels"]
    of = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        "w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner),
        "gate": (model["num_moe_experts"] or 0, hidden),
        "embed_tokens": (model["override_vocab_size"], hidden), "lm_head": (model["override_vocab_size"], hidden),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {}
    for _, sources, _, _ in _rules(model):
        for source in sources:
            module, kind = source.split(".")[-2:]
            shape = of.get(module, (hidden,))  # every other one is a norm
            found[source] = shape[:1] if kind == "bias" else shape
    return found
