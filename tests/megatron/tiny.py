"""A tiny float64 mixture-of-experts GPT under real Megatron groups, one batch of data for it, and the slow reference.

What Megatron computes in float32 whatever the parameters' type is the router's softmax (`dtype=torch.float32` is
written in its code); `Float64Softmax` drops that argument, here in the tests alone, so that layouts can be compared at
1e-10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from nemo_fiberpo.megatron import cpu
from nemo_fiberpo.megatron.groups import Reducer, TokenAxes, exchange
from nemo_fiberpo.megatron.logprobs import next_token_log_probs
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.step import StepTokens
from nemo_fiberpo.objective import Budget, Hierarchy, Stratum, build_cells, token_weights

VOCAB, LENGTH, SAMPLES = 32, 12, 8
STRATA = ("domain", "prompt_group", "trajectory")


class Float64Softmax(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.softmax and kwargs.get("dtype") is torch.float32:
            del kwargs["dtype"]
        return func(*args, **kwargs)


class Norm(torch.nn.LayerNorm):
    """Megatron's own wrapper of torch's norm refuses sequence parallelism, which MoE with tensor parallelism needs."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is laid out; data parallelism is what remains of the ranks."""

    tp: int = 1
    pp: int = 1
    microbatches: int = 1
    dispatcher: str = "alltoall"
    aux_loss: float = 0.0
    overlap: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-m{self.microbatches}-{self.dispatcher}" + ("-overlap" if self.overlap else "")


@contextlib.contextmanager
def megatron(layout: Layout) -> Iterator[None]:
    """Megatron on CPU in float64, with initialised process groups."""
    from megatron.core import parallel_state, tensor_parallel

    torch.set_default_dtype(torch.float64)
    with cpu.megatron_on_cpu(), Float64Softmax():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def counting_all_reduces() -> Iterator[list[int]]:
    """Sizes of the all-reduces over all ranks; Megatron's own name a group, those of the exact step do not."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is None:
            sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def make_config(layout: Layout) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    options: dict[str, Any] = dict(  # noqa: C408
        num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, num_moe_experts=4, moe_router_topk=2,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=layout.aux_loss,
        moe_token_dispatcher_type=layout.dispatcher, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, params_dtype=torch.float64, pipeline_dtype=torch.float64,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, sequence_parallel=layout.tp > 1,
        moe_router_dtype="fp64", finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(
        **{name: value for name, value in options.items() if name in known}, **dict(layout.options)
    )


def make_model(layout: Layout) -> Any:
    """The GPT under Megatron's DDP, its parameters a function of their names alone."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = make_config(layout)
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    module = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * (2 // layout.pp), layer_norm=Norm),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
    )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=layout.overlap)
    model = DistributedDataParallel(config, ddp, module)
    config.no_sync_func = model.no_sync if layout.overlap else None
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            parameter.copy_(shard_of(full_parameter(name, parameter, layout.tp), parameter, rank, layout.tp))
    return model.train()


def named_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by the names they have without pipeline parallelism."""
    layers = {str(index): layer.layer_number - 1 for index, layer in enumerate(model.module.decoder.layers)}
    renamed = []
    for name, parameter in model.module.named_parameters():
        name = re.sub(r"(decoder\.layers\.)(\d+)", lambda match: match[1] + str(layers[match[2]]), name)
        renamed.append((name, parameter))
    return renamed


def partition_dim(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def full_parameter(name: str, parameter: torch.nn.Parameter, tp: int) -> torch.Tensor:
    shape = list(parameter.shape)
    if partition_dim(parameter) is not None:
        shape[partition_dim(parameter)] *= tp
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    if "norm" in name:
        return noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return noise * (0.3 if parameter.dim() > 1 else 0.1)


def shard_of(full: torch.Tensor, parameter: torch.nn.Parameter, rank: int, tp: int) -> torch.Tensor:
    return full if partition_dim(parameter) is None else full.chunk(tp, dim=partition_dim(parameter))[rank]


def gradients(model: Any) -> dict[str, tuple[torch.Tensor, int | None]]:
    """This rank's (gradient, dimension split over tensor-parallel ranks), by full name."""
    return {name: (p.main_grad.clone(), partition_dim(p)) for name, p in named_parameters(model)}


def hierarchy() -> Hierarchy:
    """Budgets so tight, and slopes so flat, that every regime occurs."""
    return Hierarchy(
        (
            Stratum("domain", Budget(0.03, 0.02), {"code": Budget(0.05, 0.09)}, slope=0.5),
            Stratum("prompt_group", Budget(0.05, 0.04), slope=0.7),
            Stratum("trajectory", Budget(0.06, 0.05)),
        ),
        token_clip=0.08,
    )


def kl_penalty(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss beside the objective, sum of k3 over live tokens with a denominator of its own."""
    difference = torch.where(batch["mask"], batch["old"] - log_probs, 0.0)
    return (difference.exp() - difference - 1).sum() / 37.0


def make_batch(case: str = "uneven") -> dict[str, torch.Tensor]:
    """SAMPLES trajectories of LENGTH tokens, two per prompt, two prompts per domain, in an order that scatters them.

    uneven        response lengths from 0 (a trajectory without response tokens) to LENGTH - 2
    masked_half   the second half of the samples has no live token at all
    on_policy     as uneven, with log-ratios of exactly 0
    """
    generator = torch.Generator().manual_seed(7)
    order = torch.tensor([0, 3, 5, 6, 1, 7, 2, 4])
    trajectory = order + 100
    prompt_group = order // 2 + 50
    domain = order // 4
    lengths = torch.tensor([9, 4, 1, 6, 0, 10, 3, 2])
    if case == "masked_half":
        lengths = torch.where(torch.arange(SAMPLES) < SAMPLES // 2, lengths, 0)
    start = torch.tensor([1, 3, 2, 4, 2, 0, 5, 1])
    position = torch.arange(LENGTH - 1)
    mask = (position >= start[:, None]) & (position < (start + lengths)[:, None])
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=generator)
    drift = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64) * 0.08
    noise = torch.randn(SAMPLES, LENGTH - 1, generator=generator, dtype=torch.float64) * 0.12
    log_ratio = torch.zeros_like(noise) if case == "on_policy" else drift + noise
    advantage = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64).expand(-1, LENGTH - 1)
    return {
        "tokens": tokens, "mask": mask, "advantage": advantage, "log_ratio": log_ratio,
        "domain": domain, "prompt_group": prompt_group, "trajectory": trajectory,
    }  # fmt: skip


def share_of(batch: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    return {name: value.chunk(ranks)[rank] for name, value in batch.items()}


def split(batch: dict[str, torch.Tensor], number: int) -> list[dict[str, torch.Tensor]]:
    return [share_of(batch, index, number) for index in range(number)]


def labels_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name][:, None].expand_as(batch["mask"]).reshape(-1).contiguous() for name in STRATA}


def make_tokens(batch: dict[str, torch.Tensor], microbatches: int, axes: TokenAxes, **facts: Any) -> StepTokens:
    """This rank's tokens for a step; `batch` has old log-probs."""
    labels, mask = labels_of(batch), batch["mask"].reshape(-1)
    local = [
        hierarchy().cells(labels, mask, names={"domain": ["math", "code"]}, shape=tuple(batch["mask"].shape)),
        build_cells(["trajectory"], labels, mask),
    ]
    cells, trajectories = exchange(local, axes, {"micro-batches per step": microbatches, **facts})
    weights = token_weights(trajectories).view_as(batch["mask"])
    parts = split({**batch, "weighted": weights * batch["advantage"]}, microbatches)
    return StepTokens([p["old"] for p in parts], [p["weighted"] for p in parts], [p["mask"] for p in parts], cells)


def make_policy(model: Any, microbatch_size: int) -> Policy:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    group = parallel_state.get_tensor_model_parallel_group()

    def forward(batch: dict[str, torch.Tensor], module: Any) -> torch.Tensor:
        positions = torch.arange(LENGTH).expand_as(batch["tokens"])
        return module(batch["tokens"], positions, None)

    def log_probs(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return next_token_log_probs(output, batch["tokens"], group)

    return Policy(model, get_forward_backward_func(), forward, log_probs, LENGTH, microbatch_size)


def make_reducer() -> Reducer:
    return Reducer(TokenAxes.from_parallel_state())


def slow_objective(
    log_ratio: torch.Tensor, batch: dict[str, torch.Tensor], chain: Hierarchy, names: list[str]
) -> torch.Tensor:
    """J by loops over tokens and cells, differentiable by autograd: MASTER of EQUATIONS section 0 with weights (18)."""
    mask, ids = batch["mask"], {name: batch[name] for name in STRATA}
    live = [tuple(place) for place in mask.nonzero().tolist()]
    channel = {(b, t): 1 if log_ratio[b, t] >= 0 else -1 for b, t in live}
    zero = log_ratio.new_zeros(())

    def mean(stratum: str, label: int, sign: int) -> torch.Tensor:
        cell = [place for place in live if int(ids[stratum][place[0]]) == label]
        return sum((log_ratio[place] for place in cell if channel[place] == sign), zero) / len(cell)

    def gate(x: torch.Tensor, budget: float, slope: float) -> torch.Tensor:
        if abs(x) <= budget:
            return x
        if abs(x) < budget * (1 + 1 / slope):
            return torch.sign(x).detach() * ((slope + 1) * budget - slope * x.abs())
        return x * 0

    count = {(s, int(label)): sum(int(ids[s][b]) == int(label) for b, _ in live) for s in STRATA for label in ids[s]}
    means = {
        (s, label, sign): mean(s, label, sign) for (s, label), number in count.items() if number for sign in (1, -1)
    }
    trajectories = sum(number > 0 for (s, _), number in count.items() if s == "trajectory")
    total = zero
    for place in live:
        logarithm = zero
        for sign in (1, -1):
            above = zero
            for stratum in chain.strata:
                label = int(ids[stratum.name][place[0]])
                budgets = stratum.budgets.get(names[label], stratum.budget) if stratum.budgets else stratum.budget
                slope = stratum.slope or count[stratum.name, label]
                own = means[stratum.name, label, sign]
                logarithm = logarithm + gate(own - above, budgets.pos if sign > 0 else budgets.neg, slope)
                above = own
            value = log_ratio[place] if channel[place] == sign else zero
            logarithm = logarithm + (value - above).clamp(-chain.token_clip, chain.token_clip)
        weight = 1 / (trajectories * count["trajectory", int(ids["trajectory"][place[0]])])
        total = total + weight * batch["advantage"][place] * logarithm.exp()
    return total
