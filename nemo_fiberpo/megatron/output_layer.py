"""Where log-probs are computed in Megatron's GPTModel: from its logits, or in the place of its output layer.

With `chunked`, the output layer returns log-probs instead of logits for the length of one call of the model. The module
itself is called by Megatron as ever, so that its hooks run (those of DDP gather and reduce its weight) and it is given
the tied embedding where there is one; only its `forward` is replaced, on the instance, and put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.logits import check_choice, is_large
from nemo_fiberpo.megatron.liger import liger_fits, liger_log_probs
from nemo_fiberpo.megatron.linear_logprobs import linear_log_probs
from nemo_fiberpo.megatron.logprobs import parallel


def output_layer(module: Any) -> Any:
    """The output layer of a GPTModel under any wrappers; None on stages that have none."""
    while not hasattr(module, "output_layer") and hasattr(module, "module"):
        module = module.module
    return getattr(module, "output_layer", None)


def chunked_problem(layer: Any) -> str | None:
    """Why an output layer cannot return log-probs; None where it can."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    if type(layer).__call__ is not torch.nn.Module.__call__ or (
        getattr(type(layer), "forward", None) is not ColumnParallelLinear.forward
    ):
        return f"the output layer is a {type(layer).__name__}, not Megatron's ColumnParallelLinear"
    if "forward" in vars(layer):
        return "the output layer's forward was replaced"
    if layer.bias is not None:
        return "the output layer has a bias"
    if layer.gather_output and layer.output_size_per_partition != layer.output_size:
        return "the model gathers its logits (parallel_output=False)"
    for name in ("defer_embedding_wgrad_compute", "mtp_num_layers"):
        if getattr(layer.config, name, None):
            return f"the model is built with {name}"
    return None


def is_chunked(logprobs: str, layer: Any, tokens: int) -> bool:
    """Whether log-probs of `tokens` places take the place of this layer's logits, by `logprobs` of LOG_PROBS.

    ValueError for `chunked` with a layer that cannot; `auto` is `logits` then.
    """
    check_choice(logprobs)
    if logprobs == "logits" or layer is None:
        return False
    problem = chunked_problem(layer)
    if problem is not None and logprobs == "chunked":
        raise ValueError(f"logprobs: chunked does not work here: {problem}; use logits or auto")
    return problem is None and (logprobs == "chunked" or is_large(tokens, layer.output_size_per_partition))


@contextlib.contextmanager
def returning_log_probs(
    layer: Any, target: Tensor, tp_group: dist.ProcessGroup | None, vocab_size: int | None
) -> Iterator[None]:
    """Within the block the output layer returns log-probs of `target` [b, s] as [s, b], for hidden states [s, b, h], or
    [s / tp, b, h] with sequence parallelism."""

    def forward(input_: Tensor, weight: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
        used = layer.weight if weight is None else weight
        return _log_probs(input_, used, target.T, tp_group, vocab_size, layer.sequence_parallel), None

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    sequence_parallel: bool,
) -> Tensor:
    """With Megatron's own exchange of hidden states over tensor-parallel ranks, and by the kernel that fits."""
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    target = target.to(hidden.device)
    liger = liger_fits(hidden, weight, tp_group, vocab_size)
    summed = liger and parallel(tp_group)
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=not summed)
    elif not summed:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return (liger_log_probs if liger else linear_log_probs)(hidden, weight, target, tp_group, vocab_size)
