"""Vocab-parallel log-probs against torch's log_softmax on the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron import logprobs
from nemo_fiberpo.megatron.logprobs import next_token_log_probs, shift_labels, vocab_parallel_log_probs
from tests.support import distributed

B, S, V = 3, 5, 12


def data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and upstream gradient; one row is far from 0, one target's upstream gradient is 0."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(B, S, V, generator=generator, dtype=torch.float64) * 4).to(dtype)
    logits[0, 0] += 1000.0
    upstream = torch.randn(B, S, generator=generator, dtype=torch.float64)
    upstream[1, 2] = 0.0
    return logits, torch.randint(0, V, (B, S), generator=generator), upstream


def expected(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits, target, upstream = data(dtype)
    x = logits.double().requires_grad_()
    values = x.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    values.backward(upstream)
    return values.detach(), x.grad


def parallel_worker(rank: int, world: int, dtype: torch.dtype, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs.CHUNK_ELEMENTS = chunk
    logits, target, upstream = data(dtype)
    local = logits.chunk(world, dim=-1)[rank].contiguous()
    before = local.clone()
    local.requires_grad_()
    values = vocab_parallel_log_probs(local, target, dist.group.WORLD)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    values.backward(upstream.to(values.dtype))
    assert torch.equal(local.detach(), before), "the logits were modified"
    assert local.grad.dtype == dtype
    return values.detach(), local.grad


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("chunk", [1 << 24, 13])
def test_two_shards_give_the_log_softmax_of_the_whole(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    values, grad = expected(dtype)
    results = distributed.run(parallel_worker, 2, dtype, chunk)
    assert torch.equal(results[0][0], results[1][0])
    # Values are computed in float32 at least, whatever the logits' dtype; their gradient has the logits' dtype.
    torch.testing.assert_close(results[0][0].double(), values, rtol=min(tolerance, 2e-6), atol=min(tolerance, 2e-6))
    both = torch.cat([result[1] for result in results], dim=-1).double()
    torch.testing.assert_close(both, grad, rtol=tolerance, atol=tolerance)


SIZES = (11, 7, 3)
"""Vocabularies of 12 columns; of four shards the last, the last two or the last three have no token, or too few."""


def padded_worker(rank: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The columns behind the vocabulary hold what no distribution has."""
    results = []
    for size in SIZES:
        logits, target, upstream = data(torch.float64)
        logits[..., size:] = torch.tensor([math.nan, math.inf, 1e4]).repeat(4)[: V - size]
        local = logits.chunk(world, dim=-1)[rank].clone().requires_grad_()
        values = vocab_parallel_log_probs(local, target % size, dist.group.WORLD, size)
        values.backward(upstream)
        results.append((values.detach(), local.grad))
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, 4])
def test_columns_that_pad_the_vocabulary_are_no_part_of_the_distribution(world: int) -> None:
    ranks = distributed.run(padded_worker, world)
    for size, results in zip(SIZES, zip(*ranks, strict=True), strict=True):
        logits, target, upstream = data(torch.float64)
        x = logits[..., :size].clone().requires_grad_()
        wanted = x.log_softmax(-1).gather(-1, (target % size)[..., None]).squeeze(-1)
        wanted.backward(upstream)
        for values, _ in results:
            torch.testing.assert_close(values, wanted.detach(), rtol=1e-14, atol=1e-14)
        grad = torch.cat([result[1] for result in results], dim=-1)
        torch.testing.assert_close(grad[..., :size], x.grad, rtol=1e-14, atol=1e-14)
        assert grad[..., size:].eq(0).all()


def test_the_probabilities_of_all_tokens_add_up_to_1() -> None:
    logits, size = data(torch.float64)[0], 9
    every = [vocab_parallel_log_probs(logits, torch.full((B, S), token), None, size).exp() for token in range(size)]
    torch.testing.assert_close(sum(every), torch.ones(B, S, dtype=torch.float64), rtol=1e-14, atol=0)


OUTSIDE = [(-1, None), (-100, None), (V, None), (V + 5, None), (8, 8), (V, 8)]


def outside_worker(rank: int, world: int) -> list[str]:
    messages = []
    for target, size in OUTSIDE:
        targets = torch.zeros(B, S, dtype=torch.int64)
        targets[1, 2] = target
        with pytest.raises(ValueError) as error:
            vocab_parallel_log_probs(torch.zeros(B, S, V // world), targets, dist.group.WORLD, size)
        messages.append(str(error.value))
    return messages


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_a_target_outside_the_vocabulary_is_refused_on_every_rank(world: int) -> None:
    for messages in distributed.run(outside_worker, world):
        for (target, size), message in zip(OUTSIDE, messages, strict=True):
            said = f"target: {target} at position [1, 2] is no token of the vocabulary of {size or V}"
            assert message.startswith(said)


@pytest.mark.parametrize("size", [0, V + 1])
def test_a_vocabulary_that_the_logits_do_not_have_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"^vocab_size: {size} tokens, but the logits have {V} columns"):
        vocab_parallel_log_probs(torch.zeros(1, V), torch.tensor([0]), None, size)


def test_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4; d log p_1 / d logits = (-1/4, 1 - 3/4)."""
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    value = vocab_parallel_log_probs(logits, torch.tensor([1]))
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(0.75), rel=1e-15)
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))


def test_gradcheck() -> None:
    logits, target, _ = data(torch.float64)
    x = (logits[1:] / 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: vocab_parallel_log_probs(y, target[1:]), x)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_positions_without_upstream_gradient_get_exactly_none(poison: float) -> None:
    logits, target, upstream = data(torch.float64)
    logits[1, 2] = poison
    x = logits.requires_grad_()
    vocab_parallel_log_probs(x, target).backward(upstream)
    assert x.grad[1, 2].eq(0).all() and x.grad.isfinite().all()
    torch.testing.assert_close(x.grad, expected(torch.float64)[1])


def test_labels_are_shifted_by_one() -> None:
    tokens = torch.tensor([[3, 1, 2], [0, 2, 1]])
    assert shift_labels(tokens).tolist() == [[1, 2, 0], [2, 1, 0]]
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    got = next_token_log_probs(logits, tokens)
    assert got.shape == (2, 2)
    assert got[1, 0] == pytest.approx(logits[1, 0].log_softmax(-1)[2].item())


def test_leading_dimensions_are_free() -> None:
    logits, target, _ = data(torch.float64)
    batch_first = vocab_parallel_log_probs(logits, target)
    sequence_first = vocab_parallel_log_probs(logits.transpose(0, 1), target.T)
    assert torch.equal(batch_first, sequence_first.T)
