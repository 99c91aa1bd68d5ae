"""Log-probabilities from vocabulary-parallel logits, without gathering them.

`gpt.gpt_policy` uses `vocab_parallel_log_probs`, with the targets of `sequences.Rows`, where logits are small;
`linear_logprobs` is for large ones. `next_token_log_probs` is for hosts whose sequences are whole.

Shapes: logits [..., V/tp] with any leading dimensions ([b, s] and [s, b] alike), targets [...]. Rank r of the
tensor-parallel group holds the columns [r V/tp, (r+1) V/tp). An embedding may have more rows than the tokenizer has
tokens; the columns behind these are never sampled and are no part of the distribution: their logits count as -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.logits import CHUNK_ELEMENTS, CHUNKS


def shift_labels(tokens: Tensor) -> Tensor:
    """Targets of next-token prediction: target[:, t] = tokens[:, t + 1]; the last column predicts nothing and is 0.

    tokens [b, s] of whole sequences: shift before a sequence is split over context-parallel ranks, not after.
    """
    return torch.cat([tokens[:, 1:], tokens.new_zeros(tokens.shape[0], 1)], dim=1)


def next_token_log_probs(
    logits: Tensor, tokens: Tensor, tp_group: dist.ProcessGroup | None = None, vocab_size: int | None = None
) -> Tensor:
    """log pi(tokens[:, t+1] | tokens[:, :t+1]), [b, s-1], from logits [b, s, V/tp] and tokens [b, s].

    Sequences are whole. The convention of NeMo-Aligner: entry t belongs to the token at position t + 1.
    """
    return vocab_parallel_log_probs(logits, shift_labels(tokens), tp_group, vocab_size)[:, :-1]


def vocab_parallel_log_probs(
    logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup | None = None, vocab_size: int | None = None
) -> Tensor:
    """log softmax(logits)[target] for each position, differentiable with respect to the logits.

        log pi = x_target - log sum_{v < vocab_size} exp(x_v)

    Args
        logits      [..., V/tp], any floating dtype; not modified
        target      int64 [...], tokens
        tp_group    the tensor-parallel group; None where the vocabulary is not sharded
        vocab_size  of the tokenizer, at most V; None: V

    Returns [...], float64 for float64 logits, else float32, which is also what is computed in. The gradient has the
    dtype of the logits and is exactly 0 at positions whose upstream gradient is 0, whatever their logits hold, and in
    the columns from vocab_size on, whatever these hold.

    Raises ValueError, on every rank of the group, for a target outside [0, vocab_size) at any position; on a GPU, where
    the host does not wait, it is a device-side assertion.

    SPMD: logits are sharded over `tp_group` along the last dimension, target and result are replicated; positions are
    the caller's. One MAX and one SUM all-reduce in the forward pass, none in the backward pass. Memory beyond the
    logits, at most 4 bytes per logit for float32 and bfloat16: a chunk of them in the forward pass; in the backward
    pass their gradient and, for bfloat16, a chunk. Beside it a few numbers per token.
    """
    size = vocabulary(logits.shape[-1], tp_group, vocab_size)
    refuse_outside(target, size)
    log_probs: Tensor = _VocabParallelLogProbs.apply(logits, target, tp_group, size)
    return log_probs


def vocabulary(local: int, tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> int:
    """The number of tokens, where each rank has `local` columns. ValueError where that is more than the columns."""
    columns = local * (dist.get_world_size(tp_group) if parallel(tp_group) else 1)
    size = columns if vocab_size is None else vocab_size
    if not 1 <= size <= columns:
        raise ValueError(f"vocab_size: {size} tokens, but the logits have {columns} columns")
    return size


def own_columns(local: int, tp_group: dist.ProcessGroup | None, size: int) -> tuple[int, int]:
    """The first token of this rank's columns, and how many of them are tokens of the vocabulary."""
    first = dist.get_rank(tp_group) * local if parallel(tp_group) and tp_group is not None else 0
    return first, min(max(size - first, 0), local)


def refuse_outside(target: Tensor, size: int) -> None:
    """The host does not wait for a GPU here: there the device asserts, and the error comes with a later read."""
    inside = (target >= 0) & (target < size)
    try:
        torch._assert_async(inside.all(), f"target: outside the vocabulary of {size}")
    except RuntimeError:
        place = (~inside).nonzero()[0].tolist()
        raise ValueError(
            f"target: {int(target[tuple(place)])} at position {place} is no token of the vocabulary of {size} "
            f"({int((~inside).sum())} such targets)"
        ) from None


def accumulate_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _chunk(x_TV: Tensor) -> int:
    """Tokens at a time."""
    tokens, columns = x_TV.shape
    return max(1, min(CHUNK_ELEMENTS // max(1, columns), -(-tokens // CHUNKS)))


def parallel(group: dist.ProcessGroup | None) -> bool:
    return group is not None and dist.get_world_size(group) > 1


class _VocabParallelLogProbs(torch.autograd.Function):
    """Saves the logits themselves (no copy) and their log-partition; backward recomputes the softmax by chunks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, vocab_size: int) -> Tensor:
        dtype = accumulate_dtype(logits)
        first, ctx.columns = own_columns(logits.shape[-1], group, vocab_size)
        x_TV = logits.reshape(-1, logits.shape[-1])[:, : ctx.columns]
        local_T = target.reshape(-1) - first
        mine_T = (local_T >= 0) & (local_T < ctx.columns)
        local_T = local_T.clamp(0, max(ctx.columns - 1, 0))
        max_T = x_TV.new_full(x_TV.shape[:1], -torch.inf, dtype=dtype)
        if ctx.columns:
            max_T = x_TV.amax(-1).to(dtype)
        if parallel(group):
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        sums_2T = torch.empty(2, x_TV.shape[0], dtype=dtype, device=logits.device)
        chunk = _chunk(x_TV)
        for start in range(0, x_TV.shape[0], chunk):
            tokens = slice(start, start + chunk)
            shifted = x_TV[tokens].to(dtype, copy=True).sub_(max_T[tokens, None])
            picked = shifted.gather(-1, local_T[tokens, None]).squeeze(-1) if ctx.columns else 0.0
            sums_2T[1, tokens] = torch.where(mine_T[tokens], picked, 0.0)
            sums_2T[0, tokens] = shifted.exp_().sum(-1)
            del shifted  # before the next chunk is made
        if parallel(group):
            dist.all_reduce(sums_2T, op=dist.ReduceOp.SUM, group=group)
        log_sum_T = sums_2T[0].log()
        ctx.save_for_backward(logits, local_T, mine_T, max_T, log_sum_T)
        return (sums_2T[1] - log_sum_T).view(target.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, local_T, mine_T, max_T, log_sum_T = ctx.saved_tensors
        x_TV = logits.reshape(-1, logits.shape[-1])
        grad_T = grad.reshape(-1)
        out_TV = torch.empty(x_TV.shape, dtype=logits.dtype, device=logits.device)
        out_TV[:, ctx.columns :] = 0.0
        x_TV, real_TV = x_TV[:, : ctx.columns], out_TV[:, : ctx.columns]
        in_place = logits.dtype == max_T.dtype
        chunk = _chunk(x_TV)
        for start in range(0, x_TV.shape[0] if ctx.columns else 0, chunk):
            tokens = slice(start, start + chunk)
            block = real_TV[tokens].copy_(x_TV[tokens]) if in_place else x_TV[tokens].to(max_T.dtype)
            to_log_prob_gradient(
                block, local_T[tokens], mine_T[tokens], max_T[tokens], log_sum_T[tokens], grad_T[tokens]
            )
            if not in_place:
                real_TV[tokens] = block
            del block  # before the next chunk is made
        return out_TV.view(logits.shape), None, None, None


def to_log_prob_gradient(
    x_TV: Tensor, local_T: Tensor, mine_T: Tensor, max_T: Tensor, log_sum_T: Tensor, upstream_T: Tensor
) -> None:
    """Logits become, in place, the gradient with respect to them of sum_T upstream log pi:  upstream (1[target] - pi).

    local_T are targets as columns of `x_TV`, and mine_T where they are among them. Exactly 0 where upstream is.
    """
    # The two subtractions of the forward pass: their sum would round once more where the maximum is large.
    x_TV.sub_(max_T[:, None]).sub_(log_sum_T[:, None]).exp_().mul_(-upstream_T[:, None])
    x_TV.scatter_add_(-1, local_T[:, None], torch.where(mine_T, upstream_T, 0.0)[:, None])
    x_TV.masked_fill_((upstream_T == 0)[:, None], 0.0)
