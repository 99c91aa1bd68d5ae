"""A small random GPT under real Megatron process groups and DDP, for any layout.

What Megatron computes in float32 whatever the parameters' type is the router's softmax (`dtype=torch.float32` is
written in its code); `float64_softmax` drops that argument, so that layouts can be compared at 1e-10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from nemo_fiberpo.verification import shards

EXPERTS = 8
MAX_POSITIONS = 64  # more than any sample has


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of the model. Weights are random numbers of standard deviation 0.3 `scale`."""

    hidden: int
    heads: int
    channels: int
    ffn: int
    vocab: int
    scale: float = 1.0


TINY = Shape(hidden=16, heads=8, channels=4, ffn=32, vocab=32)


@contextlib.contextmanager
def float64_softmax() -> Iterator[None]:
    # By its name, not by a function mode: those are suspended in a backward pass, where activations are recomputed.
    softmax = torch.softmax

    def wide(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        return softmax(  # type: ignore[misc]
            *args, dtype=None if dtype is torch.float32 else dtype, **kwargs
        )

    torch.softmax = wide
    try:
        yield
    finally:
        torch.softmax = softmax


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is laid out; data parallelism is what remains of the ranks.

    etp                  tensor parallelism of the experts; None for Megatron's own default, that of the dense layers
    vpp                  virtual pipeline stages of a rank, 1 for the schedule without interleaving
    sequence_parallel    None for "with tensor parallelism", which Megatron demands of a mixture of experts
    experts              0 for a dense model
    rope                 rotary position embedding; learned absolute positions otherwise
    packed               micro-batches are one packed row (THD) instead of padded rows
    distributed_optimizer  DDP reduce-scatters gradients
    overlap              DDP reduces bucket by bucket during the backward pass
    recompute            activations are computed again in the backward pass
    gathered             "slice" or "sum": log-probs are gathered over cp, see `groups.GATHERED`; "" where they are not
    one_pass             `one_pass_step` instead of `exact_step`
    tied                 the output layer has the weight of the embedding
    logprobs             as in `gpt_policy`
    layers               of the whole model; None for one per stage, two at least
    topk                 experts of a token
    dtype                of parameters and activations; gradients of bfloat16 are added up in float32
    spec                 "local", Megatron's own layers with those of `cpu_layers`, or "transformer_engine"
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    microbatches: int = 1
    sequence_parallel: bool | None = None
    dispatcher: str = "alltoall"
    experts: int = EXPERTS
    rope: bool = True
    packed: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: bool = False
    gathered: str = ""
    one_pass: bool = False
    tied: bool = False
    logprobs: str = "auto"
    aux_loss: float = 0.0
    layers: int | None = None
    topk: int = 2
    shape: Shape = TINY
    dtype: torch.dtype = torch.float64
    spec: str = "local"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def num_layers(self) -> int:
        return self.layers or max(2, self.pp * self.vpp)

    @property
    def splits_sequence(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def kind(self) -> tuple[int, int, bool, bool]:
        """What the model is, whatever the layout: layers, experts, rotary positions, tied embeddings."""
        return self.num_layers, self.experts, self.rope, self.tied

    def on_one_rank(self) -> Layout:
        """The same model in one piece, its batch in one micro-batch of padded rows."""
        model = {name: getattr(self, name) for name in ("experts", "rope", "tied", "topk", "shape", "dtype", "spec")}
        return Layout(layers=self.num_layers, **model)

    @property
    def groups(self) -> str:
        """The process groups, by the sizes that differ from 1."""
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep}
        named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return "-".join(named + ([f"etp{self.etp}"] if self.etp not in (None, self.tp) else [])) or "dp"

    @property
    def variant(self) -> str:
        """Everything else, by what is not the default."""
        words = [f"vpp{self.vpp}"] if self.vpp > 1 else []
        words += [f"m{self.microbatches}", self.dispatcher if self.experts else "dense"]
        if self.sequence_parallel is False and self.tp > 1:
            words.append("no sp")
        words += ["packed" if self.packed else "padded", "rope" if self.rope else "learned"]
        words += [name for name in ("distributed_optimizer", "overlap", "recompute", "one_pass") if getattr(self, name)]
        words += [word for word, is_so in (("chunked", self.logprobs == "chunked"), ("tied", self.tied)) if is_so]
        return ", ".join(words + ([f"gathered {self.gathered}"] if self.gathered else []))

    def __str__(self) -> str:
        return f"{self.groups} {self.variant}".replace(", ", "-").replace(" ", "-")


def _known(function: Any, **options: Any) -> dict[str, Any]:
    """The options that this version of a function or class has."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


@contextlib.contextmanager
def process_groups(layout: Layout) -> Iterator[None]:
    """Megatron's process groups of a layout. SPMD: every rank of the default group enters and leaves it.

    `destroy_model_parallel` leaves some of what it was told, such as who shares the embedding: the next layout of the
    process would find it.
    """
    from megatron.core import parallel_state, tensor_parallel

    before = {name: value for name, value in vars(parallel_state).items() if name.isupper()}
    initialize = parallel_state.initialize_model_parallel
    initialize(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        **_known(initialize, create_gloo_process_groups=False),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    vars(parallel_state).update(before)


def make_config(layout: Layout) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    shape, half = layout.shape, layout.dtype == torch.bfloat16
    options: dict[str, Any] = dict(  # noqa: C408
        num_layers=layout.num_layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        kv_channels=shape.channels, ffn_hidden_size=shape.ffn,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=layout.dtype, pipeline_dtype=layout.dtype, bf16=half, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Two interleaving stages exchange two messages each way at once, which a batch of them would mix up; Megatron's
        # own training arguments demand the same.
        overlap_p2p_comm=layout.vpp > 1, batch_p2p_comm=layout.vpp == 1,
        sequence_parallel=layout.splits_sequence, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    if layout.experts:
        options.update(
            num_moe_experts=layout.experts, moe_router_topk=layout.topk, moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=layout.aux_loss, moe_token_dispatcher_type=layout.dispatcher,
            moe_router_dtype="fp64" if layout.dtype == torch.float64 else "fp32",
            expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp or layout.tp,
        )  # fmt: skip
    if layout.recompute:
        options.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(**(_known(TransformerConfig, **options) | dict(layout.options)))


def make_model(layout: Layout) -> Any:
    """The GPT under Megatron's DDP, or the list of its virtual chunks; parameters are a function of their names."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel_state.set_virtual_pipeline_model_parallel_world_size(layout.vpp if layout.vpp > 1 else None)
    config = make_config(layout)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.dtype == torch.bfloat16,
        overlap_grad_reduce=layout.overlap,
        use_distributed_optimizer=layout.distributed_optimizer,
        bucket_size=2000 if layout.overlap else None,
    )
    chunks = [
        DistributedDataParallel(config, ddp, _make_chunk(layout, config, stage), disable_bucketing=stage > 0).train()
        for stage in range(layout.vpp)
    ]
    if layout.overlap:
        # As Megatron's training loop sets them: a list of the chunks' where there are several.
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if layout.vpp > 1 else no_sync[0]
        if layout.pp > 1:
            sync = [chunk.start_grad_sync for chunk in chunks]
            config.grad_sync_func = sync if layout.vpp > 1 else sync[0]
    model = chunks if layout.vpp > 1 else chunks[0]
    _set_parameters(model, layout)
    return model


def make_bare_model(layout: Layout) -> Any:
    """The same GPT on one rank, without DDP, in a world of any size: `layout` splits nothing."""
    model = _make_chunk(layout, make_config(layout), 0).train()
    _set_parameters(model, layout)
    return model


def _set_parameters(model: Any, layout: Layout) -> None:
    with torch.no_grad():
        for name, parameter in shards.named_parameters(model):
            index, number = shards.shard_place(name)
            full = shards.full_parameter(name, parameter, number)
            full = full if "norm" in name else full * layout.shape.scale
            parameter.copy_(shards.shard_of(full, parameter, index, number))


def _make_chunk(layout: Layout, config: Any, stage: int) -> Any:
    """The layers of one virtual stage, without DDP."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    virtual = _known(GPTModel, vp_stage=stage if layout.vpp > 1 else None)
    if layout.vpp > 1 and not virtual:
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    model: Any = GPTModel(
        config,
        _layers(layout, config),
        vocab_size=layout.shape.vocab,
        max_sequence_length=MAX_POSITIONS,
        pre_process=rank == 0 and stage == 0,
        post_process=rank == layout.pp - 1 and stage == layout.vpp - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=layout.tied,
        position_embedding_type="rope" if layout.rope else "learned_absolute",
        **virtual,
    )
    if torch.cuda.is_available():
        model = model.to(torch.cuda.current_device())
    return Float16Module(config, model) if layout.dtype == torch.bfloat16 else model


def _layers(layout: Layout, config: Any) -> Any:
    """The layers of one virtual stage."""
    if layout.spec == "transformer_engine":
        from megatron.core.models.gpt import gpt_layer_specs

        layers = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
        return layers(num_experts=layout.experts or None, moe_grouped_gemm=False)
    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    return local_block_spec(config, layout.num_layers // (layout.pp * layout.vpp))
