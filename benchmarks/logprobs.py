"""Time and peak memory of log-probs and both their gradients, from hidden states and the output layer's weight.

    OMP_NUM_THREADS=1 python -m benchmarks.logprobs [--tokens 256 --hidden 512 --vocab 131072] [--dtype bfloat16]

Rows: in blocks of the vocabulary (`linear_log_probs`, ours), Liger's function where it is installed, from all logits
(`vocab_parallel_log_probs`, ours), and from all logits by NeMo-Aligner's `from_parallel_logits_to_logprobs` where that
is installed. Forward and backward pass, and the forward pass by itself, without gradient.

The floor of the time is the three matrix products without which there are no gradients, 6 flops per token, column and
hidden unit, done by `torch.mm` into buffers in the same process; blocks need a fourth. The floor of the memory is the
inputs and their two gradients: what is held beyond them is given as a part of the float32 logits.

Times are the CPU time of this thread (with one thread), or wall time until the device is done; ratios are medians of
those within a round, in which all run in turns. Memory is the peak of live allocations, from the allocator's events on
a CPU and from `torch.cuda.max_memory_allocated` on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.token_coefficients import peak_bytes, processor, timed
from nemo_fiberpo.megatron.liger import liger_installed, liger_log_probs
from nemo_fiberpo.megatron.linear_logprobs import linear_log_probs
from nemo_fiberpo.megatron.logprobs import vocab_parallel_log_probs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
COLUMNS = ("ms", "x floor", "x logits", "beyond, x logits")
FLOOR, PLAIN = "floor: three matrix products", "logits"
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
Work = Callable[[], object]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def from_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As Megatron and its Float16Module hand logits on: in float32."""
    logits = (hidden @ weight.T).float()[None]
    return vocab_parallel_log_probs(logits, target[None])[0]


def aligner() -> LogProbs | None:
    """NeMo-Aligner's function on one rank; None where it is not installed."""
    try:
        from megatron.core import parallel_state
        from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
    except ImportError:
        return None
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if ON_GPU else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()[None]
        values: Tensor = from_parallel_logits_to_logprobs(logits, target[None], ignore_last=False)[0]
        return values

    return function


def functions(with_aligner: bool) -> dict[str, LogProbs]:
    found: dict[str, LogProbs] = {"chunked": linear_log_probs}
    if liger_installed():
        found["Liger"] = liger_log_probs
    found[PLAIN] = from_logits
    if with_aligner and (function := aligner()) is not None:
        found["NeMo-Aligner, logits"] = function
    return found


def gradients(function: LogProbs, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Any:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(function(*leaves, target), leaves, upstream)


def values(function: LogProbs, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return function(hidden, weight, target)


def products(hidden: Tensor, weight: Tensor) -> Work:
    """The floor: logits, and from as many numbers as there are logits both gradients, into buffers."""
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def work() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.T, hidden, out=of_weight)

    return work


def measure(tokens: int, units: int, vocab: int, dtype: torch.dtype, repeats: int, with_aligner: bool) -> dict:
    """All figures, see the module."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, units, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, units, device=DEVICE) / units**0.5).to(dtype)
    target = torch.randint(0, vocab, (tokens,), device=DEVICE)
    upstream, found = torch.randn(tokens, device=DEVICE), functions(with_aligner)
    works: dict[str, Work] = {FLOOR: products(hidden, weight)}
    works |= {name: partial(gradients, function, hidden, weight, target, upstream) for name, function in found.items()}
    forward: dict[str, Work] = {
        f"{name}, forward only": partial(values, function, hidden, weight, target) for name, function in found.items()
    }
    logits, kept = 4 * tokens * vocab, (hidden.numel() + weight.numel()) * hidden.element_size()
    beyond = {name: (peak_bytes(work, ON_GPU) - kept) / logits for name, work in works.items() if name != FLOOR}
    beyond |= {name: peak_bytes(work, ON_GPU) / logits for name, work in forward.items()}
    every = works | forward
    clock = time.thread_time if not ON_GPU and torch.get_num_threads() == 1 else time.perf_counter

    def finished(work: Work) -> Work:
        def run() -> None:
            work()
            synchronize()

        return run

    times = timed({name: finished(work) for name, work in every.items()}, repeats, clock)
    table = {}
    for name, spent in times.items():
        base = f"{PLAIN}, forward only" if name.endswith("only") else PLAIN

        def ratio(other: str, spent: list[float] = spent) -> float:
            return statistics.median(one / two for one, two in zip(spent, times[other], strict=True))

        floor = None if name.endswith("only") else ratio(FLOOR)
        figures = (statistics.median(spent) * 1e3, floor, ratio(base), beyond.get(name))
        table[name] = dict(zip(COLUMNS, figures, strict=True))
    where = torch.cuda.get_device_name() if ON_GPU else f"{processor()}, {torch.get_num_threads()} thread(s)"
    flops = 6 * tokens * vocab * units
    return {
        "tokens": tokens, "hidden": units, "vocab": vocab, "dtype": str(dtype).removeprefix("torch."), "device": where,
        "torch": torch.__version__, "floor": {"flops": flops, "bytes": 2 * kept, "logit bytes": logits}, "table": table,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    floor = result["floor"]
    lines = [
        f"{result['tokens']} tokens, hidden size {result['hidden']}, vocabulary {result['vocab']}, {result['dtype']}, "
        f"on {result['device']}, torch {result['torch']}.",
        f"Floor: {floor['flops'] / 1e9:.0f} Gflop; inputs and gradients {floor['bytes'] / 2**20:.0f} MiB; float32 "
        f"logits would be {floor['logit bytes'] / 2**20:.0f} MiB.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, figures in result["table"].items():
        cells = ("" if figures[column] is None else f"{figures[column]:.3g}" for column in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if ON_GPU else 256)
    parser.add_argument("--hidden", type=int, default=4096 if ON_GPU else 512)
    parser.add_argument("--vocab", type=int, default=1 << 17)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--repeats", type=int, default=20 if ON_GPU else 5)
    parser.add_argument("--no-aligner", action="store_true", help="leave out NeMo-Aligner, whose import takes long")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    sizes = args.tokens, args.hidden, args.vocab
    result = measure(*sizes, getattr(torch, args.dtype), args.repeats, not args.no_aligner)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    print(markdown(result))


if __name__ == "__main__":
    main()
