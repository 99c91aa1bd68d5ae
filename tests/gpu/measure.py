"""Launches, time, bandwidth and memory of the objective on the device, against a copy of as many bytes.

    python -m tests.gpu.measure [--rows 1024 --length 16384] [--eager-only] [--out FILE]

The floor. Float32 tokens that lie in rows take three passes, each of which must read or write, in bytes a token:

    measure   log-ratio 4, weight 4, mask 1                      9
    weigh     log-ratio 4, weight 4, mask 1; writes y 4         13
    pull      y 4, log-ratio 4, mask 1; writes coefficients 4   13      35 in all

Sums of cells need all of pass 1 before any token of pass 2, and the adjoint all of pass 2 before pass 3, so that none
of these bytes can be left out by fusing passes; at 16M tokens they are 590 MB, beyond any cache. A device copy of n
bytes reads n and writes n: the floor of b bytes is the time of a copy of b / 2.

GRPO is the clipped loss with its backward pass on the same tensors. On a GPU launches are kernels, "kernel ms" is their
time without the gaps between them, and the host waits for the device as often as "waits" says. On a CPU launches are
operations of torch, the other two are missing, and the batch is small: it shows that this runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.token_coefficients import HIERARCHY, peak_bytes
from nemo_fiberpo import surrogate, token_coefficients
from nemo_fiberpo.objective import fibration, kernels
from tests.gpu import device
from tests.gpu.device import DEVICE, ON_GPU
from tests.gpu.traffic import launches, watched

BYTES = {"measure": 9, "weigh": 13, "pull": 13}
FLOOR = sum(BYTES.values())
COLUMNS = ("ms", "kernel ms", "launches", "waits", "GB/s", "x floor", "x GRPO compiled", "bytes/token")
BASE = "GRPO, compiled"
Work = Callable[[], object]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(work: Work, repeats: int) -> float:
    """Median time of a call, until the device is done."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def clipped_loss(log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    ratio = log_ratio.exp()
    return -(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * mask).sum()


def gradient(loss: Callable[..., Tensor], log_ratio: Tensor, *others: Tensor) -> Tensor:
    leaf = log_ratio.detach().requires_grad_()
    loss(leaf, *others).backward()
    assert leaf.grad is not None
    return leaf.grad


def works(rows: int, length: int, modes: list[str]) -> dict[str, tuple[Work, str, int | None]]:
    """By name: what to call, whether passes are eager or compiled in it, and the bytes a token that it must move."""
    torch.manual_seed(0)
    num = rows * length
    trajectory = torch.arange(rows, device=DEVICE).repeat_interleave(length)
    labels = {"domain": trajectory // 32, "prompt_group": trajectory // 8, "trajectory": trajectory}
    lengths = torch.randint(length // 4, length + 1, (rows, 1), device=DEVICE)
    mask = (torch.arange(length, device=DEVICE) < lengths).view(-1)
    log_ratio, weighted = torch.randn(num, device=DEVICE) * 0.05, torch.randn(num, device=DEVICE) / num
    cells = HIERARCHY.cells(labels, mask, shape=(rows, length)).shared
    order = torch.randperm(num, device=DEVICE)
    mixed = HIERARCHY.cells({name: label[order] for name, label in labels.items()}, mask[order]).shared
    tokens = fibration.Tokens.of(cells, log_ratio, weighted)
    drift, _ = fibration.measure(tokens, cells, None)
    gates = fibration.gate_cells(drift, cells, HIERARCHY)
    weighed, entries = fibration.weigh(tokens, cells, drift, gates), cells.layout.entries
    adjoint = torch.zeros(rows, 2, device=DEVICE)
    found: dict[str, tuple[Work, str, int | None]] = {}
    for mode in modes:
        loss = clipped_loss if mode == "eager" else torch.compile(clipped_loss)
        found |= {
            f"GRPO, {mode}": (partial(gradient, loss, log_ratio, weighted, mask), mode, None),
            f"token_coefficients, {mode}": (
                partial(token_coefficients, log_ratio, weighted, cells, HIERARCHY), mode, FLOOR,
            ),
            f"surrogate with report, {mode}": (partial(surrogate, log_ratio, weighted, cells, HIERARCHY), mode, FLOOR),
            f"pass measure, {mode}": (
                partial(kernels.run, kernels.measure, tokens.log_ratio_PS, tokens.weight_PS, entries), mode, 9,
            ),
            f"pass weigh, {mode}": (partial(fibration.weigh, tokens, cells, drift, gates), mode, 13),
            f"pass pull, {mode}": (
                partial(kernels.run, kernels.pull, weighed.passed, tokens.log_ratio_PS, adjoint, entries), mode, 13,
            ),
            f"token_coefficients, tokens in any order, {mode}": (
                partial(token_coefficients, log_ratio[order], weighted[order], mixed, HIERARCHY), mode, None,
            ),
        }  # fmt: skip
    build = partial(HIERARCHY.cells, labels, mask, shape=(rows, length))
    return found | {"building cells of rows": (lambda: build().shared, "eager", None)}


def measured(work: Work, mode: str, num: int) -> dict[str, float | None]:
    """The figures of a call, without those that compare it with others."""
    spent = seconds(work, 20 if ON_GPU else 5)
    number: int | None = None
    kernel_ms, waits = None, None
    if ON_GPU or mode == "eager":  # what is compiled for a CPU cannot be counted
        number, kernel_ms = launches(work, DEVICE)
    if ON_GPU:
        with watched(DEVICE) as places:
            work()
        waits = len(places)
    figures = {"ms": spent * 1e3, "kernel ms": kernel_ms, "launches": number, "waits": waits}
    return figures | {"bytes/token": peak_bytes(work, ON_GPU) / num}


def copy_seconds(number: int) -> float:
    """Time of a copy on the device that reads and writes `number` bytes together."""
    source = torch.zeros(number // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), 20)


def measure(rows: int, length: int, modes: list[str]) -> dict[str, Any]:
    """All figures, see the module."""
    num = rows * length
    table: dict[str, dict[str, float | None]] = {}
    with device.passes("eager"):
        calls = works(rows, length, modes)
    copies = {size: copy_seconds(size * num) for size in {FLOOR, *BYTES.values()}}
    for name, (work, mode, size) in calls.items():
        with device.passes(mode), contextlib.suppress(torch.OutOfMemoryError):
            table[name] = measured(work, mode, num)
            if size:
                spent = (table[name]["ms"] or 0.0) / 1e3
                table[name] |= {"GB/s": size * num / spent / 1e9, "x floor": spent / copies[size]}
    base = table[BASE]["ms"] if BASE in table else None
    for figures in table.values():
        figures["x GRPO compiled"] = figures["ms"] / base if base and figures["ms"] else None
    return {
        "device": device.describe(),
        "torch": torch.__version__,
        "rows": rows,
        "length": length,
        "floor": {"bytes per token": FLOOR, "ms": copies[FLOOR] * 1e3, "GB/s": FLOOR * num / copies[FLOOR] / 1e9},
        "fell back to eager": kernels.run.failed,
        "table": {name: {column: figures.get(column) for column in COLUMNS} for name, figures in table.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    floor = result["floor"]
    lines = [
        f"{result['rows']} x {result['length']} tokens, float32, on {result['device']}, torch {result['torch']}.",
        f"The floor, {floor['bytes per token']} bytes a token, is {floor['ms']:.3f} ms at the {floor['GB/s']:.0f} GB/s "
        "of a device copy.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    if result["fell back to eager"]:
        lines.insert(2, "**torch.compile failed: what is called compiled ran eagerly.**")
    for name, figures in result["table"].items():
        cells = ["" if figures[column] is None else f"{figures[column]:.4g}" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024 if ON_GPU else 64)
    parser.add_argument("--length", type=int, default=16384 if ON_GPU else 2048)
    parser.add_argument("--eager-only", action="store_true", help="where there is no compiler, or no time")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    reason = "--eager-only" if args.eager_only else device.no_compiler()
    result = measure(args.rows, args.length, ["eager"] if reason else ["eager", "compiled"])
    result["not compiled"] = reason
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    print(markdown(result))


if __name__ == "__main__":
    main()
