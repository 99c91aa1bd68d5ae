"""Log-probabilities from vocabulary-parallel logits, without gathering them.

`gpt.gpt_policy` uses `vocab_parallel_log_probs`, with the targets of `sequences.Rows`; `next_token_log_probs` is for
hosts whose sequences are whole.

Shapes: logits [..., V/tp] with any leading dimensions ([b, s] and [s, b] alike), targets [...]. Rank r of the
tensor-parallel group holds the columns [r V/tp, (r+1) V/tp). An embedding may have more rows than the tokenizer has
tokens; the columns behind these are never sampled and are no part of the distribution: their logits count as -inf.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24


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
    logits: a chunk of them; in the backward pass their gradient and a chunk.
    """
    columns = logits.shape[-1] * (dist.get_world_size(tp_group) if _parallel(tp_group) else 1)
    size = columns if vocab_size is None else vocab_size
    if not 1 <= size <= columns:
        raise ValueError(f"vocab_size: {size} tokens, but the logits have {columns} columns")
    _refuse_outside(target, size)
    return _VocabParallelLogProbs.apply(logits, target, tp_group, size)


def _refuse_outside(target: Tensor, size: int) -> None:
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


def _accumulate_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunk(vocab: int) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, vocab))


def _parallel(group: dist.ProcessGroup | None) -> bool:
    return group is not None and dist.get_world_size(group) > 1


class _VocabParallelLogProbs(torch.autograd.Function):
    """Saves the logits themselves (no copy) and their log-partition; backward recomputes the softmax by chunks."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, group: dist.ProcessGroup | None, vocab_size: int) -> Tensor:
        dtype = _accumulate_dtype(logits)
        first = dist.get_rank(group) * logits.shape[-1] if _parallel(group) else 0
        ctx.columns = min(max(vocab_size - first, 0), logits.shape[-1])
        x_TV = logits.reshape(-1, logits.shape[-1])[:, : ctx.columns]
        local_T = target.reshape(-1) - first
        mine_T = (local_T >= 0) & (local_T < ctx.columns)
        local_T = local_T.clamp(0, max(ctx.columns - 1, 0))
        max_T = x_TV.new_full(x_TV.shape[:1], -torch.inf, dtype=dtype)
        if ctx.columns:
            max_T = x_TV.amax(-1).to(dtype)
        if _parallel(group):
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        sums_2T = torch.empty(2, x_TV.shape[0], dtype=dtype, device=logits.device)
        chunk = _chunk(x_TV.shape[-1])
        for start in range(0, x_TV.shape[0], chunk):
            tokens = slice(start, start + chunk)
            shifted = x_TV[tokens].to(dtype) - max_T[tokens, None]
            picked = shifted.gather(-1, local_T[tokens, None]).squeeze(-1) if ctx.columns else 0.0
            sums_2T[1, tokens] = torch.where(mine_T[tokens], picked, 0.0)
            sums_2T[0, tokens] = shifted.exp_().sum(-1)
        if _parallel(group):
            dist.all_reduce(sums_2T, op=dist.ReduceOp.SUM, group=group)
        log_sum_T = sums_2T[0].log()
        ctx.save_for_backward(logits, local_T, mine_T, max_T, log_sum_T)
        return (sums_2T[1] - log_sum_T).view(target.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, local_T, mine_T, max_T, log_sum_T = ctx.saved_tensors
        x_TV = logits.reshape(-1, logits.shape[-1])
        grad_T = grad.reshape(-1)
        out_TV = torch.empty(x_TV.shape, dtype=logits.dtype, device=logits.device)
        out_TV[:, ctx.columns :] = 0.0
        x_TV, real_TV = x_TV[:, : ctx.columns], out_TV[:, : ctx.columns]
        chunk = _chunk(x_TV.shape[-1])
        for start in range(0, x_TV.shape[0] if ctx.columns else 0, chunk):
            tokens = slice(start, start + chunk)
            upstream = grad_T[tokens, None]
            # The two subtractions of the forward pass: their sum would round once more where the maximum is large.
            softmax = (x_TV[tokens].to(grad_T.dtype) - max_T[tokens, None]).sub_(log_sum_T[tokens, None]).exp_()
            block = softmax.mul_(-upstream)
            block.scatter_add_(-1, local_T[tokens, None], torch.where(mine_T[tokens, None], upstream, 0.0))
            real_TV[tokens] = torch.where(upstream == 0, 0.0, block)
        return out_TV.view(logits.shape), None, None, None
