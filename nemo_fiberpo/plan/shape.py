"""The parameters of a Megatron GPT from its configuration: in all, active for one token, and on one rank.

attention   h (a + 2 g) d + a d h          h hidden, a heads, g query groups (of keys and values), d width of a head
dense MLP   (3 if gated else 2) h f
experts     E of them, each as a dense MLP of f_e, and a router h E; k of them see a token
vocabulary  V h for the embedding, as much again for the output layer where they are not tied
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GATED = ("swiglu", "fast-swiglu", "geglu", "fast-geglu", "reglu", "fast-reglu")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: dense ones (attention, norms, routers, embeddings), and those of experts."""

    dense: int
    expert: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a GPT.

    vocab      rows of the embedding, padded
    norm       parameters of a norm per unit of width: 1 RMSNorm, 2 LayerNorm
    positions  learned absolute positions, 0 with rotary ones
    first_stage, last_stage   layers of the first and the last pipeline stage; 0 for as many as the others
    experts    0 for a dense model;  topk of them see a token;  expert_ffn wide;  shared_ffn of the shared expert
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 0
    topk: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    gated: bool = True
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norm: int = 1
    tied: bool = False
    positions: int = 0
    first_stage: int = 0
    last_stage: int = 0

    @classmethod
    def from_config(cls, model: Mapping[str, Any], vocab_size: int | None, tp: int) -> ModelShape:
        """From NeMo's `model` section. `vocab_size` of the tokenizer is padded as NeMo pads it, unless the section
        has `override_vocab_size`. Raises ValueError naming the fields that are missing, all of them."""
        needed = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
        missing = [f"model.{name}" for name in needed if not model.get(name)]
        override = model.get("override_vocab_size")
        if not (override or vocab_size):
            missing.append("cluster.vocab_size")
        experts = model.get("num_moe_experts") or 0
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: needed, because the size of the model follows from it. Take a configuration "
                "that has it, such as one of conf/model/, or a pretrained_checkpoint.restore_from_path that is there; "
                "cluster.vocab_size is the tokenizer's"
            )
        heads, hidden = model["num_attention_heads"], model["hidden_size"]
        multiple = (model.get("make_vocab_size_divisible_by") or 128) * tp
        learned = model.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        return cls(
            layers=model["num_layers"],
            hidden=hidden,
            heads=heads,
            groups=model.get("num_query_groups") or heads,
            head_dim=model.get("kv_channels") or hidden // heads,
            ffn=model["ffn_hidden_size"],
            vocab=override or math.ceil((vocab_size or 0) / multiple) * multiple,
            experts=experts,
            topk=(model.get("moe_router_topk") or 2) if experts else 0,
            expert_ffn=(model.get("moe_ffn_hidden_size") or model["ffn_hidden_size"]) if experts else 0,
            shared_ffn=(model.get("moe_shared_expert_intermediate_size") or 0) if experts else 0,
            gated=model.get("activation") in GATED,
            bias=bool(model.get("bias", True)),
            qkv_bias=bool(model.get("qkv_bias", False)),
            qk_norm=bool(model.get("qk_layernorm", False)),
            norm=1 if str(model.get("normalization", "layernorm")).lower() == "rmsnorm" else 2,
            tied=bool(model.get("share_embeddings_and_output_weights", True)),
            positions=model.get("max_position_embeddings") or 0 if learned else 0,
            first_stage=model.get("num_layers_in_first_pipeline_stage") or 0,
            last_stage=model.get("num_layers_in_last_pipeline_stage") or 0,
        )

    def layer(self, tp: int = 1, ep: int = 1, etp: int = 1) -> Parameters:
        """Parameters of one layer, on one rank."""
        h, query, keys = self.hidden, self.heads * self.head_dim, 2 * self.groups * self.head_dim
        dense = (h * (query + keys) + query * h) // tp
        dense += 2 * self.norm * h + (2 * self.norm * self.head_dim if self.qk_norm else 0)
        if self.bias or self.qkv_bias:
            dense += (query + keys) // tp
        if self.bias:
            dense += h
        if not self.experts:
            return Parameters(dense + self._mlp(self.ffn, tp))
        dense += h * self.experts + (self._mlp(self.shared_ffn, tp) if self.shared_ffn else 0)
        return Parameters(dense, self.experts // ep * self._mlp(self.expert_ffn, etp))

    def _mlp(self, ffn: int, tp: int) -> int:
        wide = (2 if self.gated else 1) * ffn // tp
        return self.hidden * wide + ffn // tp * self.hidden + ((wide + self.hidden) if self.bias else 0)

    def even(self, pp: int) -> tuple[int, int]:
        """Layers and pipeline stages beside those whose layers are given: what must divide."""
        given = [layers for layers in (self.first_stage, self.last_stage) if layers]
        return self.layers - sum(given), pp - len(given)

    def layers_of(self, stage: int, pp: int) -> int:
        """Layers of a pipeline stage."""
        if stage == 0 and self.first_stage:
            return self.first_stage
        if stage == pp - 1 and self.last_stage:
            return self.last_stage
        layers, stages = self.even(pp)
        return layers // stages

    def stage(self, stage: int, pp: int, tp: int = 1, ep: int = 1, etp: int = 1) -> Parameters:
        """Parameters on one rank of a pipeline stage. A tied embedding has a copy on the last stage."""
        layer = self.layer(tp, ep, etp)
        layers = self.layers_of(stage, pp)
        dense = layer.dense * layers
        if stage == 0:
            dense += self.vocab // tp * self.hidden + self.positions * self.hidden
        if stage == pp - 1:
            dense += self.norm * self.hidden
            dense += self.vocab // tp * self.hidden if not self.tied or pp > 1 else 0
        return Parameters(dense, layer.expert * layers)

    @property
    def total(self) -> Parameters:
        """Parameters of the whole model."""
        return dataclasses.replace(self, first_stage=0, last_stage=0).stage(0, 1)

    @property
    def active(self) -> int:
        """Parameters that one token uses, the whole embedding included, as model cards count them."""
        total = self.total
        return total.dense + (total.expert // self.experts * self.topk if self.experts else 0)

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied by: `active` without the embedding, which is looked up."""
        return self.active - (0 if self.tied else self.vocab * self.hidden) - self.positions * self.hidden
