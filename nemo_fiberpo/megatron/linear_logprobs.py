"""Log-probabilities from hidden states and the output layer's weight: logits exist for a block of the vocabulary only.

`logprobs.vocab_parallel_log_probs` holds [tokens, V / tp] logits and, in the backward pass, their gradient. Here both
passes walk over blocks of vocabulary columns. The forward pass keeps the running maximum and sum of the softmax for
each token; the backward pass computes each block's logits again. So a step has one matrix product more, 8 instead of 6
flops per token, column and hidden unit. Blocks are of columns, where Liger and verl take blocks of tokens: so the
weight's gradient is one product per row of it, rounded once, and only that of the hidden states is summed over blocks,
in float32.

`output_layer` has the place where this meets Megatron's model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.logits import block_width
from nemo_fiberpo.megatron.logprobs import (
    accumulate_dtype,
    own_columns,
    parallel,
    refuse_outside,
    to_log_prob_gradient,
    vocabulary,
)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """log softmax(hidden weight^T)[target] for each position, differentiable with respect to hidden and weight.

    Args
        hidden      [..., h], floating; not modified
        weight      [V/tp, h], of the same dtype; not modified
        target      int64 [...], tokens
        tp_group    the tensor-parallel group; None where the vocabulary is not sharded
        vocab_size  of the tokenizer, at most V; None: V

    Returns, refuses and leaves out what `vocab_parallel_log_probs` does of the logits: float64 for float64, else
    float32; columns from vocab_size on are no part of the distribution and their rows of the weight have gradient 0.
    Logits are rounded to the dtype of `hidden`, as an output layer rounds them. Positions whose upstream gradient is 0
    contribute nothing to either gradient.

    SPMD: the weight is sharded over `tp_group` along its rows; hidden, target and result are replicated. The gradient
    of the weight is that of the shard; that of `hidden` is this rank's part of a sum over the group, which the caller
    takes (Megatron's `copy_to_tensor_model_parallel_region` or `gather_from_sequence_parallel_region` before this).
    One MAX and one SUM all-reduce in the forward pass, none in the backward pass. Memory beyond inputs and gradients:
    logits of one block in the dtype of `hidden` and in float32, and twice the hidden states in float32 unless they are.
    """
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden: {hidden.dtype}, but weight is {weight.dtype}; they must be of one dtype")
    size = vocabulary(weight.shape[0], tp_group, vocab_size)
    refuse_outside(target, size)
    log_probs: Tensor = _LinearLogProbs.apply(hidden, weight, target, tp_group, size)
    return log_probs


class _Blocks:
    """The logits of one block of columns after the other, in buffers that all blocks share."""

    def __init__(self, h_TH: Tensor, weight_VH: Tensor, columns: int):
        self.h_TH, self.weight_VH, self.columns = h_TH, weight_VH, columns
        self.width = block_width(columns)
        number = h_TH.shape[0] * self.width
        self.narrow = torch.empty(number, dtype=h_TH.dtype, device=h_TH.device)
        dtype = accumulate_dtype(h_TH)
        self.wide = self.narrow if dtype == h_TH.dtype else torch.empty(number, dtype=dtype, device=h_TH.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their logits in the dtype that is computed in, which may be changed)."""
        for start in range(0, self.columns, self.width):
            block = slice(start, min(start + self.width, self.columns))
            x_TV = self._shaped(self.narrow, block)
            torch.mm(self.h_TH, self.weight_VH[block].T, out=x_TV)
            yield block, x_TV if self.wide is self.narrow else self._shaped(self.wide, block).copy_(x_TV)

    def rounded(self, values_TV: Tensor, block: slice) -> Tensor:
        """What was yielded for a block, in the dtype of the hidden states."""
        return values_TV if self.wide is self.narrow else self._shaped(self.narrow, block).copy_(values_TV)

    def _shaped(self, buffer: Tensor, block: slice) -> Tensor:
        tokens, width = self.h_TH.shape[0], block.stop - block.start
        return buffer[: tokens * width].view(tokens, width)


def _within(local_T: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Targets as columns of a block, 0 where they are not among them, and where they are."""
    mine_T = (local_T >= block.start) & (local_T < block.stop)
    return torch.where(mine_T, local_T - block.start, 0), mine_T


class _LinearLogProbs(torch.autograd.Function):
    """Saves the inputs (no copy) and each token's log-partition."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup | None, vocab_size: int
    ) -> Tensor:
        h_TH = hidden.reshape(-1, hidden.shape[-1])
        first, columns = own_columns(weight.shape[0], group, vocab_size)
        local_T = target.reshape(-1) - first
        max_T = h_TH.new_full(h_TH.shape[:1], -torch.inf, dtype=accumulate_dtype(hidden))
        sum_T, picked_T = torch.zeros_like(max_T), torch.zeros_like(max_T)
        inside_T = (local_T >= 0) & (local_T < columns)
        for block, x_TV in _Blocks(h_TH, weight, columns):
            column_T, mine_T = _within(local_T, block)
            picked_T = torch.where(mine_T, x_TV.gather(-1, column_T[:, None]).squeeze(-1), picked_T)
            larger_T = torch.maximum(max_T, x_TV.amax(-1))
            sum_T.mul_((max_T - larger_T).exp_()).add_(x_TV.sub_(larger_T[:, None]).exp_().sum(-1))
            max_T = larger_T
        if parallel(group):
            own_T = max_T.clone()
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
            sum_T.mul_((own_T - max_T).exp_())
        sums_2T = torch.stack([sum_T, torch.where(inside_T, picked_T - max_T, 0.0)])
        if parallel(group):
            dist.all_reduce(sums_2T, op=dist.ReduceOp.SUM, group=group)
        log_sum_T = sums_2T[0].log()
        ctx.columns = columns
        ctx.save_for_backward(hidden, weight, local_T, max_T, log_sum_T)
        return (sums_2T[1] - log_sum_T).view(target.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, local_T, max_T, log_sum_T = ctx.saved_tensors
        h_TH, grad_T = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        sum_TH = torch.zeros(h_TH.shape, dtype=max_T.dtype, device=h_TH.device) if of_hidden else None
        weight_VH = torch.empty_like(weight) if of_weight else None
        blocks = _Blocks(h_TH, weight, ctx.columns)
        for block, x_TV in blocks:
            to_log_prob_gradient(x_TV, *_within(local_T, block), max_T, log_sum_T, grad_T)
            x_TV = blocks.rounded(x_TV, block)
            if weight_VH is not None:
                torch.mm(x_TV.T, h_TH, out=weight_VH[block])
            if sum_TH is not None and sum_TH.dtype == h_TH.dtype:
                sum_TH.addmm_(x_TV, weight[block])
            elif sum_TH is not None:
                sum_TH.add_(x_TV @ weight[block])
        if weight_VH is not None:
            weight_VH[ctx.columns :] = 0.0
        hidden_gradient = None if sum_TH is None else sum_TH.to(hidden.dtype).view(hidden.shape)
        return hidden_gradient, weight_VH, None, None, None
