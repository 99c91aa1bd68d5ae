"""Log-probs from hidden states on the device: against float64 on the CPU, and the bytes that they hold.

On a GPU the bytes are those of `torch.cuda.max_memory_allocated`, and Liger's native kernel is compared where it is
installed and fits. On a CPU the sizes are small and the bytes are those of torch's profiler.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import logprobs as benchmark
from benchmarks.token_coefficients import peak_bytes
from nemo_fiberpo.megatron.liger import liger_fits, liger_log_probs
from nemo_fiberpo.megatron.linear_logprobs import linear_log_probs
from nemo_fiberpo.megatron.logprobs import vocab_parallel_log_probs
from tests.gpu.device import CPU, DEVICE, ON_GPU

TOKENS, UNITS, VOCAB = (4096, 2048, 1 << 17) if ON_GPU else (96, 32, 1 << 14)
DTYPES = [torch.float32, torch.bfloat16]
LOG_PROBS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Bound on differences of log-probs, in nats: TF32 is off by default, and bf16 rounds logits of about 10 to 2^-5."""
GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.03}
"""Bound on |g - g'| / |g'| of either gradient."""


def data(dtype: torch.dtype, tokens: int = TOKENS, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets, upstream gradient; the same numbers on every device, all of bf16."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, UNITS, generator=generator).bfloat16()
    weight = (torch.randn(vocab, UNITS, generator=generator) * 2 / UNITS**0.5).bfloat16()
    target, upstream = torch.randint(0, vocab, (tokens,), generator=generator), torch.randn(tokens, generator=generator)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE), upstream.to(DEVICE)


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return vocab_parallel_log_probs(hidden @ weight.T, target)


def compare(function: benchmark.LogProbs, dtype: torch.dtype) -> None:
    hidden, weight, target, upstream = data(dtype, min(TOKENS, 96), 1 << 14)
    values = benchmark.values(function, hidden, weight, target)
    found = benchmark.gradients(function, hidden, weight, target, upstream)
    wide = [value.to(CPU, torch.float64).requires_grad_() for value in (hidden, weight)]
    wanted = (wide[0] @ wide[1].T).log_softmax(-1).gather(-1, target.to(CPU)[:, None])[:, 0]
    assert float((values.to(CPU) - wanted.detach()).abs().max()) <= LOG_PROBS[dtype]
    for one, other in zip(found, torch.autograd.grad(wanted, wide, upstream.to(CPU, torch.float64)), strict=True):
        assert float((one.to(CPU, torch.float64) - other).norm() / other.norm()) <= GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [linear_log_probs, plain], ids=["chunked", "logits"])
def test_values_and_gradients_are_those_of_float64(function: benchmark.LogProbs, dtype: torch.dtype):
    compare(function, dtype)


def test_ligers_kernel_is_one_of_them():
    hidden, weight, _, _ = data(torch.bfloat16, 8, 64)
    if not liger_fits(hidden, weight):
        pytest.skip("Liger is not installed, or its native kernel has no code for this device")
    compare(liger_log_probs, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_hold_a_small_part_of_the_logits(dtype: torch.dtype):
    hidden, weight, target, upstream = data(dtype)
    kept = (hidden.numel() + weight.numel()) * hidden.element_size()
    step = partial(benchmark.gradients, linear_log_probs, hidden, weight, target, upstream)
    share = (peak_bytes(step, ON_GPU) - kept) / (4 * TOKENS * VOCAB)
    print(f"{share:.3f} of float32 logits beyond inputs and gradients")
    assert share <= 0.15


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_path_holds_four_bytes_per_logit_beyond_them(dtype: torch.dtype):
    logits = torch.randn(TOKENS, VOCAB, device=DEVICE).to(dtype).requires_grad_()
    target = torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE)
    found = peak_bytes(lambda: torch.autograd.grad(vocab_parallel_log_probs(logits, target).sum(), logits), ON_GPU)
    print(f"{found / logits.numel():.3f} bytes per logit beyond the logits")
    assert found / logits.numel() <= 4 + 128 / VOCAB


def test_the_benchmark_has_every_row():
    result = benchmark.measure(64, 32, 4096, torch.float32, 2, with_aligner=False)
    names = {benchmark.FLOOR, "chunked", benchmark.PLAIN, "chunked, forward only", f"{benchmark.PLAIN}, forward only"}
    assert names <= set(result["table"])
    assert all(figures["ms"] > 0 for figures in result["table"].values())
    assert all(name in benchmark.markdown(result) for name in names)
    table = result["table"]
    assert table["chunked"]["beyond, x logits"] < table[benchmark.PLAIN]["beyond, x logits"]
