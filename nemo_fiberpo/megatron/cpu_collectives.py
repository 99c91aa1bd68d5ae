"""What NCCL does and gloo does not: averages, and tensors of unequal length. `megatron.cpu` puts these in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _is_gloo_average(op: Any, group: dist.ProcessGroup | None) -> bool:
    return op == dist.ReduceOp.AVG and dist.get_backend(group) == "gloo"


def averaging_all_reduce(all_reduce: Callable) -> Callable:
    def wrapped(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if _is_gloo_average(op, group):
            tensor.div_(dist.get_world_size(group))
            op = dist.ReduceOp.SUM
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    return wrapped


def averaging_reduce_scatter(reduce_scatter: Callable) -> Callable:
    def wrapped(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if _is_gloo_average(op, group):
            input, op = input / dist.get_world_size(group), dist.ReduceOp.SUM
        return reduce_scatter(output, input, op=op, group=group, async_op=async_op)

    return wrapped


def _is_uneven_gloo(parts: list[torch.Tensor], group: dist.ProcessGroup | None) -> bool:
    return len({part.shape for part in parts}) > 1 and dist.get_backend(group) == "gloo"


def uneven_all_gather(all_gather: Callable) -> Callable:
    def wrapped(tensor_list, tensor, group=None, async_op=False):
        if not _is_uneven_gloo(tensor_list, group):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(len(part) for part in tensor_list)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group=group)
        for part, whole in zip(tensor_list, gathered, strict=True):
            part.copy_(whole[: len(part)])
        return None

    return wrapped


def uneven_reduce_scatter(reduce_scatter: Callable) -> Callable:
    def wrapped(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if not _is_uneven_gloo(input_list, group):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(input_list)
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split([len(part) for part in input_list])[dist.get_rank(group)])
        return None

    return wrapped
