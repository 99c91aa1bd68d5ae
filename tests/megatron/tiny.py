"""A tiny float64 GPT under real Megatron process groups and DDP, for any layout.

What Megatron computes in float32 whatever the parameters' type is the router's softmax (`dtype=torch.float32` is
written in its code); `float64_softmax` drops that argument, here in the tests alone, so that layouts can be compared at
1e-10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from nemo_fiberpo.megatron import cpu

VOCAB, HIDDEN, HEADS, FFN, EXPERTS = 32, 16, 8, 32, 8
MAX_POSITIONS = 64  # more than any sample has


@contextlib.contextmanager
def float64_softmax() -> Iterator[None]:
    # By its name, not by a function mode: those are suspended in a backward pass, where activations are recomputed.
    softmax = torch.softmax

    def wide(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(*args, dtype=None if dtype is torch.float32 else dtype, **kwargs)

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
    layers               of the whole model; None for one per stage, two at least
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
    aux_loss: float = 0.0
    layers: int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def num_layers(self) -> int:
        return self.layers or max(2, self.pp * self.vpp)

    @property
    def splits_sequence(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What the model is, whatever the layout: layers, experts, rotary positions."""
        return self.num_layers, self.experts, self.rope

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
        return ", ".join(words + ([f"gathered {self.gathered}"] if self.gathered else []))

    def __str__(self) -> str:
        return f"{self.groups} {self.variant}".replace(", ", "-").replace(" ", "-")


def _known(function: Any, **options: Any) -> dict[str, Any]:
    """The options that this version of a function or class has."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


@contextlib.contextmanager
def megatron(layout: Layout) -> Iterator[None]:
    """Megatron on CPU in float64, with initialised process groups."""
    from megatron.core import parallel_state, tensor_parallel

    torch.set_default_dtype(torch.float64)
    with cpu.megatron_on_cpu(), float64_softmax():
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


def make_config(layout: Layout) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    options: dict[str, Any] = dict(  # noqa: C408
        num_layers=layout.num_layers, hidden_size=HIDDEN, num_attention_heads=HEADS, kv_channels=4, ffn_hidden_size=FFN,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, params_dtype=torch.float64, pipeline_dtype=torch.float64,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Two interleaving stages exchange two messages each way at once, which a batch of them would mix up; Megatron's
        # own training arguments demand the same.
        overlap_p2p_comm=layout.vpp > 1, batch_p2p_comm=layout.vpp == 1,
        sequence_parallel=layout.splits_sequence, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    if layout.experts:
        options.update(
            num_moe_experts=layout.experts, moe_router_topk=2, moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=layout.aux_loss, moe_token_dispatcher_type=layout.dispatcher, moe_router_dtype="fp64",
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
        grad_reduce_in_fp32=False,
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
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            index, number = shard_place(name)
            parameter.copy_(shard_of(full_parameter(name, parameter, number), parameter, index, number))
    return model


def _make_chunk(layout: Layout, config: Any, stage: int) -> Any:
    """The layers of one virtual stage, without DDP."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    from nemo_fiberpo.megatron.cpu_layers import local_block_spec

    virtual = _known(GPTModel, vp_stage=stage if layout.vpp > 1 else None)
    if layout.vpp > 1 and not virtual:
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return GPTModel(
        config,
        local_block_spec(config, layout.num_layers // (layout.pp * layout.vpp)),
        vocab_size=VOCAB,
        max_sequence_length=MAX_POSITIONS,
        pre_process=rank == 0 and stage == 0,
        post_process=rank == layout.pp - 1 and stage == layout.vpp - 1,
        parallel_output=True,
        position_embedding_type="rope" if layout.rope else "learned_absolute",
        **virtual,
    )


def chunks_of(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def named_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by the names they have in one process: global numbers of layers and experts."""
    from megatron.core import parallel_state

    rank = parallel_state.get_expert_model_parallel_rank()
    renamed = []
    for chunk in chunks_of(model):
        layers = list(chunk.module.decoder.layers)
        for name, parameter in chunk.module.named_parameters():
            if found := re.match(r"decoder\.layers\.(\d+)\.", name):
                layer = layers[int(found[1])]
                name = f"decoder.layers.{layer.layer_number - 1}." + name[found.end() :]
                experts = getattr(layer.mlp, "num_local_experts", 0)
                name = re.sub(r"(?<=local_experts\.)\d+", lambda match, n=experts: str(rank * n + int(match[0])), name)
            renamed.append((name, parameter))
    return renamed


def shard_place(name: str) -> tuple[int, int]:
    """This rank's place among the tensor-parallel ranks of a parameter, and their number; experts have their own."""
    from megatron.core import parallel_state as mpu

    if "experts" in name:
        return mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


def partition_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def full_parameter(name: str, parameter: torch.nn.Parameter, number: int) -> torch.Tensor:
    shape = list(parameter.shape)
    if partition_dim(parameter) is not None:
        shape[partition_dim(parameter)] *= number
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    if "norm" in name:
        return noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return noise * (0.3 if parameter.dim() > 1 else 0.1)


def shard_of(full: torch.Tensor, parameter: torch.nn.Parameter, rank: int, number: int) -> torch.Tensor:
    return full if partition_dim(parameter) is None else full.chunk(number, dim=partition_dim(parameter))[rank]


@dataclasses.dataclass(frozen=True)
class Gradient:
    """This rank's part of a parameter's gradient: the whole of it, or part `index` of `number` along `dim`."""

    value: torch.Tensor
    dim: int | None
    index: int
    number: int

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same part of another tensor of the parameter's full shape."""
        return whole if self.dim is None else whole.chunk(self.number, self.dim)[self.index]


def gradients(model: Any) -> dict[str, Gradient]:
    """Gradients of this rank's parameters, by full name; what DDP has scattered is gathered first."""
    for chunk in chunks_of(model):
        if chunk.ddp_config.use_distributed_optimizer:
            _gather_gradient_shards(chunk)
    parts = {}
    for name, parameter in named_parameters(model):
        dim = partition_dim(parameter)
        place = (0, 1) if dim is None else shard_place(name)
        parts[name] = Gradient(parameter.main_grad.clone(), dim, *place)
    return parts


def _gather_gradient_shards(chunk: Any) -> None:
    """With the distributed optimizer a rank's own shard of each bucket alone holds the reduced gradient."""
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def largest_gradient_error(results: list[dict[str, Gradient]], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative error |g - g'| / |g'| of any parameter's gradient, and its name: parts are put together, the
    worst of all ranks' copies of each part, and every parameter of the model must have all its parts."""
    squares: dict[str, dict[int, float]] = {}
    numbers: dict[str, int] = {}
    for result in results:
        for name, part in result.items():
            square = float((part.value - part.part_of(expected[name])).square().sum())
            numbers[name] = part.number
            # not max(): it would drop a NaN
            worst = squares.setdefault(name, {}).get(part.index, 0.0)
            squares[name][part.index] = worst if worst >= square else square
    assert squares.keys() == expected.keys()
    assert all(len(parts) == numbers[name] for name, parts in squares.items())
    errors = {name: sum(parts.values()) ** 0.5 / float(expected[name].norm()) for name, parts in squares.items()}
    name = max(errors, key=lambda entry: (errors[entry] != errors[entry], errors[entry]))
    return errors[name], name
