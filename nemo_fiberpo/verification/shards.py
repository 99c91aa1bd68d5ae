"""Gradients of a model that lies on several ranks, put together and compared with those of one process."""

from __future__ import annotations

import dataclasses
import re
import zlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist


def chunks_of(model: Any) -> list[Any]:
    return model if isinstance(model, list) else [model]


def _gpt_of(chunk: Any) -> Any:
    """Without Megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def named_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters by the names they have in one process: global numbers of layers and experts, and a tied output layer
    of a stage by itself is the embedding."""
    from megatron.core import parallel_state

    rank = parallel_state.get_expert_model_parallel_rank()
    renamed = []
    for gpt in map(_gpt_of, chunks_of(model)):
        layers = list(gpt.decoder.layers)
        for name, parameter in gpt.named_parameters():
            if found := re.match(r"decoder\.layers\.(\d+)\.", name):
                layer = layers[int(found[1])]
                name = f"decoder.layers.{layer.layer_number - 1}." + name[found.end() :]
                first = rank * getattr(layer.mlp, "num_local_experts", 0)
                name = re.sub(r"(?<=local_experts\.)\d+", partial(_renumbered, first), name)
            if name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            renamed.append((name, parameter))
    return renamed


def _renumbered(first: int, match: re.Match[str]) -> str:
    return str(first + int(match[0]))


def shard_place(name: str) -> tuple[int, int]:
    """This rank's place among the tensor-parallel ranks of a parameter, and their number; experts have their own."""
    from megatron.core import parallel_state as mpu

    if "experts" in name:
        return mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


def partition_dim(parameter: torch.nn.Parameter) -> int | None:
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None


def full_parameter(name: str, parameter: torch.nn.Parameter, number: int) -> torch.Tensor:
    shape = list(parameter.shape)
    dim = partition_dim(parameter)
    if dim is not None:
        shape[dim] *= number
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    if "norm" in name:
        return noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return noise * (0.3 if parameter.dim() > 1 else 0.1)


def shard_of(full: torch.Tensor, parameter: torch.nn.Parameter, rank: int, number: int) -> torch.Tensor:
    dim = partition_dim(parameter)
    return full if dim is None else full.chunk(number, dim=dim)[rank]


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
        main_grad: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
        parts[name] = Gradient(main_grad.clone(), dim, *place)
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
