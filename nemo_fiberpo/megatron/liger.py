"""Liger's kernel for log-probs from hidden states, where it is installed and its native code fits the device.

Liger (>= 0.8.3) has native code for compute capability 9.0 (Hopper), and for the tensor-parallel variant also for 10.x,
with NVSHMEM. Elsewhere it falls back on blocks of 512 tokens in plain torch, which need more memory than ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.logprobs import parallel, refuse_outside, vocabulary


def _operations() -> Any:
    """Liger's module of this kernel, or None: its imports fail in many ways where Triton does not fit torch."""
    try:
        from liger_kernel.ops import fused_linear_scaled_cross_entropy
    except Exception:
        return None
    return fused_linear_scaled_cross_entropy


def liger_installed() -> bool:
    return _operations() is not None


def liger_fits(
    hidden: Tensor, weight: Tensor, tp_group: dist.ProcessGroup | None = None, vocab_size: int | None = None
) -> bool:
    """Whether Liger's native kernel takes these, on every rank of the group alike: bfloat16 on a device that it has
    code for, and a vocabulary without padding."""
    if not hidden.is_cuda or hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    columns = weight.shape[0] * (dist.get_world_size(tp_group) if parallel(tp_group) else 1)
    if vocab_size not in (None, columns) or (operations := _operations()) is None:
        return False
    try:
        if parallel(tp_group):
            supported = operations._supports_native_tp_architecture(hidden.device)
            return bool(supported) and operations._load_native_tp_function() is not None
        if torch.cuda.get_device_capability(hidden.device) != (9, 0):
            return False
        return operations._load_sm90_function() is not None
    except (AttributeError, ImportError):  # another version of Liger, or without CUTLASS
        return False


def liger_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """As `linear_log_probs`, by Liger's functions; but the gradient of `hidden` is already summed over the group.

    Columns from vocab_size on are cut off, which only one rank can; with several it must be all of them. Raises
    ImportError where Liger is not installed.
    """
    operations = _operations()
    if operations is None:
        raise ImportError("liger_kernel >= 0.8.3 and Triton are not installed; use linear_log_probs")
    size = vocabulary(weight.shape[0], tp_group, vocab_size)
    refuse_outside(target, size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if parallel(tp_group):
        if size != weight.shape[0] * dist.get_world_size(tp_group):
            raise ValueError(f"vocab_size: {size}; Liger takes no padded vocabulary that is sharded")
        function = operations.LigerFusedLinearScaledCrossEntropyTPFunction
        nll: Tensor = function.apply(flat, weight, target.reshape(-1), tp_group)
    else:
        function = operations.LigerFusedLinearScaledCrossEntropyFunction
        nll = function.apply(flat, weight[:size], target.reshape(-1))
    return -nll.view(target.shape)
