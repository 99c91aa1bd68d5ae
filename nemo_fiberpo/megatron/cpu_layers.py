"""Layers for where Transformer Engine is absent: attention over context-parallel and packed rows, and norms under
sequence parallelism, which megatron-core's local layer spec lacks.

On a GPU these are Transformer Engine's. They work on any device and in any floating dtype, without its speed: attention
holds a mask of all keys for every query, and keys and values of the whole sequence on every context-parallel rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from nemo_fiberpo.megatron.sequences import zigzag


class AllGatherAttention(MegatronModule):
    """Causal self-attention that gathers the keys and values of all context-parallel ranks.

        out_i = sum_{j <= i, same sequence} softmax_j(q_i k_j / sqrt(d)) v_j

    query [s, b, heads, d], key and value [s, b, groups, d] (THD: [t, heads, d]) of this rank's zig-zag part ->
    [s, b, heads d]. The backward pass of the gather is a reduce-scatter: every rank's queries read this rank's keys.
    The size of the CP group is asked for in every call. Attention dropout is refused.
    """

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any):
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError(f"attention_dropout: {config.attention_dropout}; must be 0 in this attention")
        # apply_query_key_layer_scaling guards fp16 against overflow and changes no value: nothing overflows here.
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        assert attention_bias is None, "a bias is not part of this attention"
        if packed_seq_params is not None:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        mask = None
        if attn_mask_type is not AttnMaskType.no_mask:
            mask = _causal_mask(query.shape[0], key.shape[0], packed_seq_params, query.device)
        if parallel_state.get_context_parallel_world_size() > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_from_sequence_parallel_region(part.contiguous(), True, group) for part in (key, value))
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def _causal_mask(queries: int, keys: int, packed: Any, device: torch.device) -> Tensor:
    """Bool [local queries, keys of all CP ranks in the order of the gather]: which keys a query sees. The queries of
    a decoding step are the last ones."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if packed is None:
        places = torch.cat([zigzag(keys * size, size, other, device) for other in range(size)])
        own = places[rank * keys : (rank + 1) * keys][keys - queries :]
        return own[:, None] >= places
    starts = packed.cu_seqlens_q.tolist()
    spans = [stop - start for start, stop in pairwise(starts)]
    places = torch.cat([zigzag(span, size, other, device) for other in range(size) for span in spans])
    span = torch.tensor([span // size for span in spans], device=device)
    sequence = torch.arange(len(spans), device=device).repeat_interleave(span)
    own = places[rank * queries : (rank + 1) * queries]
    return (own[:, None] >= places) & (sequence[:, None] == sequence.repeat(size))


class _MarksSequenceParallel:
    """Its parameters see a part of the sequence on every TP rank; Megatron sums the gradients of those so marked."""

    def _mark(self, config: Any) -> None:
        for parameter in self.parameters():  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm, _MarksSequenceParallel):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps)
        self._mark(config)


class RMSNorm(torch.nn.RMSNorm, _MarksSequenceParallel):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps)
        self._mark(config)


def local_block_spec(config: Any, num_layers: int) -> TransformerBlockSubmodules:
    """Megatron-core's local layer spec for the `num_layers` layers of this stage, with the layers above.

    `config` is the TransformerConfig; raises ValueError for its `normalization` if it is neither LayerNorm nor RMSNorm.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    norms = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
    if config.normalization not in norms:
        raise ValueError(f"normalization: {config.normalization!r}; must be LayerNorm or RMSNorm")
    norm = norms[config.normalization]
    spec = get_gpt_layer_local_spec(config.num_moe_experts, config.moe_grouped_gemm, config.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = AllGatherAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
