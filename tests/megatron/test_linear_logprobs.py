"""Log-probs from hidden states against torch's log_softmax of all logits, in values, gradients and memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.token_coefficients import peak_bytes
from nemo_fiberpo import logits as pieces
from nemo_fiberpo.logits import AUTO_BYTES, check_choice, is_large
from nemo_fiberpo.megatron.liger import liger_fits, liger_installed, liger_log_probs
from nemo_fiberpo.megatron.linear_logprobs import linear_log_probs
from nemo_fiberpo.megatron.logprobs import vocab_parallel_log_probs
from tests.support import distributed

B, S, H, V = 3, 5, 6, 12
SIZES = (12, 11, 7, 3)
"""Vocabularies of 12 columns; of four shards the last, the last two or the last three have no token, or too few."""
Result = tuple[Tensor, Tensor, Tensor]


def data(size: int = V, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets and upstream gradient; one position's logits are large, one's upstream is 0."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(B, S, H, generator=generator, dtype=torch.float64)
    hidden[0, 0] *= 300.0
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    target = torch.randint(0, size, (B, S), generator=generator)
    upstream = torch.randn(B, S, generator=generator, dtype=torch.float64)
    upstream[1, 2] = 0.0
    return hidden.to(dtype), weight.to(dtype), target, upstream


def expected(size: int = V, dtype: torch.dtype = torch.float64) -> Result:
    """One token at a time, in float64."""
    hidden, weight, target, upstream = (value.clone() for value in data(size, dtype))
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    rows = []
    for row in range(B):
        places = []
        for place in range(S):
            scores = torch.stack([(hidden[row, place] * weight[token]).sum() for token in range(size)])
            places.append(scores.log_softmax(0)[target[row, place]])
        rows.append(torch.stack(places))
    values = torch.stack(rows)
    values.backward(upstream)
    return values.detach(), hidden.grad, weight.grad


def gradients_of(function: Any, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, *more: Any) -> Result:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    values = function(hidden, weight, target, *more)
    return values.detach(), *torch.autograd.grad(values, (hidden, weight), upstream.to(values.dtype))


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return vocab_parallel_log_probs(hidden @ weight.T, target)


def worker(rank: int, world: int) -> list[Result]:
    pieces.LEAST_COLUMNS = 2
    results = []
    for size in SIZES:
        hidden, weight, target, upstream = data(size)
        weight[size:] = torch.tensor([math.nan, math.inf, 1e4])[: V - size].repeat(4)[: V - size, None]
        local = weight.chunk(world)[rank].contiguous()
        before = hidden.clone(), local.clone()
        results.append(gradients_of(linear_log_probs, hidden, local, target, upstream, dist.group.WORLD, size))
        assert torch.equal(hidden, before[0]) and torch.equal(local.nan_to_num(), before[1].nan_to_num())
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_give_the_log_softmax_of_the_whole(world: int) -> None:
    ranks = distributed.run(worker, world)
    for size, results in zip(SIZES, zip(*ranks, strict=True), strict=True):
        wanted, of_hidden, of_weight = expected(size)
        for values, _, _ in results:
            torch.testing.assert_close(values, wanted, rtol=1e-13, atol=1e-13)
        # Each rank has its part of the gradient of hidden states, and that of its rows of the weight.
        torch.testing.assert_close(sum(found[1] for found in results), of_hidden, rtol=1e-12, atol=1e-12)
        whole = torch.cat([found[2] for found in results])
        torch.testing.assert_close(whole[:size], of_weight[:size], rtol=1e-12, atol=1e-12)
        assert whole[size:].eq(0).all()


@pytest.mark.parametrize("columns", [1, 5, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_is_the_plain_path_to_rounding(
    monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(pieces, "LEAST_COLUMNS", columns)
    found, wanted = gradients_of(linear_log_probs, *data(V, dtype)), gradients_of(plain, *data(V, dtype))
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


def test_by_hand() -> None:
    """Logits (0, ln 3) from a hidden state of 1: probabilities 1/4, 3/4; d log p_1 / d logits = (-1/4, 1/4), so that of
    the hidden state is ln 3 / 4."""
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    values = gradients_of(linear_log_probs, hidden, weight, torch.tensor([1]), torch.ones(1))
    assert values[0].item() == pytest.approx(math.log(0.75), rel=1e-15)
    assert values[1].item() == pytest.approx(math.log(3.0) / 4, rel=1e-15)
    torch.testing.assert_close(values[2], torch.tensor([[-0.25], [0.25]], dtype=torch.float64))


def test_frozen_parameters_get_no_gradient() -> None:
    hidden, weight, target, upstream = data()
    wanted = expected()
    for frozen in (0, 1):
        leaves = [hidden.clone().requires_grad_(frozen != 0), weight.clone().requires_grad_(frozen != 1)]
        linear_log_probs(*leaves, target).backward(upstream)
        assert leaves[frozen].grad is None
        torch.testing.assert_close(leaves[1 - frozen].grad, wanted[2 - frozen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.full((B, S), V)}, f"target: {V} at position [0, 0] is no token of the vocabulary of {V}"),
        ({"vocab_size": V + 1}, f"vocab_size: {V + 1} tokens, but the logits have {V} columns"),
        ({"weight": torch.zeros(V, H)}, "hidden: torch.float64, but weight is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    hidden, weight, target, _ = data()
    with pytest.raises(ValueError) as error:
        linear_log_probs(**{"hidden": hidden, "weight": weight, "target": target} | change)
    assert str(error.value).startswith(message)


WIDE, TOKENS, UNITS = 1 << 17, 128, 16


def wide(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, UNITS, generator=generator, dtype=dtype)
    weight = torch.randn(WIDE, UNITS, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(0, WIDE, (TOKENS,), generator=generator), torch.ones(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_small_part_of_the_logits(dtype: torch.dtype) -> None:
    """At a vocabulary of 128k: at most 0.15 of float32 logits, which the plain path holds, beside inputs and their
    gradients."""
    given = wide(dtype)
    gradients = sum(value.numel() * value.element_size() for value in given[:2])
    found = peak_bytes(lambda: gradients_of(linear_log_probs, *given)) - gradients
    share = found / (4 * TOKENS * WIDE)
    print(f"{share:.3f} of the logits")
    assert share <= 0.15
    assert peak_bytes(lambda: gradients_of(plain, *given)) - gradients > TOKENS * WIDE * given[0].element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_plain_path_needs_four_bytes_per_logit_beside_the_logits(dtype: torch.dtype, rows: int) -> None:
    """Forward and backward pass from logits as Megatron returns them, which it has transposed."""
    logits = torch.randn(TOKENS // rows, rows, 1 << 14).to(dtype).requires_grad_()
    target = torch.zeros(rows, TOKENS // rows, dtype=torch.int64)

    def work() -> Tensor:
        given = logits.detach().transpose(0, 1).contiguous().requires_grad_()
        return torch.autograd.grad(vocab_parallel_log_probs(given, target).sum(), given)[0]

    copy = 0 if rows == 1 else logits.numel() * logits.element_size()  # one row is contiguous already
    per_logit = (peak_bytes(work) - copy) / logits.numel()
    print(f"{per_logit:.3f} bytes per logit")
    assert per_logit <= 4 + 64 / logits.shape[-1]  # 64 bytes per token: targets, maxima, sums


@pytest.mark.skipif(not liger_installed(), reason="Liger and Triton are not installed")
@pytest.mark.parametrize("size", [V, 7])
def test_ours_is_what_liger_computes(size: int) -> None:
    hidden, weight, target, upstream = data(size, torch.float32)
    given = hidden.flatten(0, 1) / 10, weight, target.flatten(), upstream.flatten(), None, size
    for one, other in zip(gradients_of(linear_log_probs, *given), gradients_of(liger_log_probs, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_liger_is_left_out_where_its_kernel_has_no_code() -> None:
    hidden, weight, _, _ = data(V, torch.bfloat16)
    assert not liger_fits(hidden, weight)


def test_the_choice() -> None:
    assert is_large(2048, 1 << 17) and not is_large(2047, 1 << 17)
    assert AUTO_BYTES == 2**30
    for value in ("chunk", 1, None):
        with pytest.raises(ValueError, match="model.logprobs: .* is unknown"):
            check_choice(value, "model.logprobs")
