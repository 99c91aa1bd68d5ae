"""Time and peak memory of the objective against an eager clipped GRPO loss, forward and backward, on the same tensors.

    OMP_NUM_THREADS=1 python benchmarks/token_coefficients.py          (and with OMP_NUM_THREADS=2)

A batch of 64 x 8192 float32 tokens in 2 domains, 8 prompt groups and 64 trajectories, responses of unequal length
under a mask. Rows: `token_coefficients` and the building of cells, with and without `shape`, with the tokens of all
trajectories shuffled, and the surrogate with its report. Times are medians of interleaved repetitions in one process;
memory is the peak of live allocations above what was there before, counted from the allocator's events, internal
temporaries included.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import nemo_fiberpo as fpo

HIERARCHY = fpo.load_hierarchy(
    {
        "token_clip": 0.04,
        "strata": {
            "domain": {"budget": {"pos": 0.02, "neg": 0.015}},
            "prompt_group": {"budget": {"pos": 0.04, "neg": 0.03}},
            "trajectory": {"budget": {"pos": 0.12, "neg": 0.05}},
        },
    }
)


def grpo(log_ratio: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Gradient of the clipped GRPO loss, weights included in `advantage`."""
    leaf = log_ratio.detach().requires_grad_()
    ratio = leaf.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    (loss if mask is None else loss * mask).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes alive at once during `work`, its result included."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    assert prof.profiler is not None and prof.profiler.kineto_results is not None
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns so that a slow spell of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent[1:]) for name, spent in times.items()}


def processor() -> str:
    """Name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--drift", type=float, default=0.05, help="standard deviation of the log-ratio")
    args = parser.parse_args()
    torch.manual_seed(0)
    num = args.rows * args.length
    trajectory = torch.arange(args.rows).repeat_interleave(args.length)
    labels = {"domain": trajectory // 32, "prompt_group": trajectory // 8, "trajectory": trajectory}
    lengths = torch.randint(args.length // 4, args.length + 1, (args.rows, 1))
    mask = (torch.arange(args.length) < lengths).view(-1)
    log_ratio, advantage = torch.randn(num) * args.drift, torch.randn(num) / num
    order = torch.randperm(num)
    shuffled = {name: label[order] for name, label in labels.items()}
    shape = (args.rows, args.length)

    def cells(labels: dict[str, torch.Tensor], **kwargs: object) -> Callable[[], fpo.Cells]:
        return lambda: HIERARCHY.cells(labels, **kwargs)  # type: ignore[arg-type]

    build = {
        "rows, shape given": cells(labels, mask=mask, shape=shape),
        "rows, no shape": cells(labels, mask=mask),
        "rows, no mask, no shape": cells(labels),
        "shuffled tokens": cells(shuffled, mask=mask),
    }
    works: dict[str, Callable[[], object]] = {"eager GRPO": lambda: grpo(log_ratio, advantage, mask)}
    works["eager GRPO, no mask"] = lambda: grpo(log_ratio, advantage, None)
    for name, make in build.items():
        works[f"cells: {name}"] = make
    for name, make in build.items():
        works[f"token_coefficients: {name}"] = partial(fpo.token_coefficients, log_ratio, advantage, make(), HIERARCHY)
    rows = build["rows, shape given"]()
    works["surrogate with report: rows"] = lambda: fpo.surrogate(log_ratio, advantage, rows, HIERARCHY)

    seconds = medians(works, args.repeats)
    peaks = {name: peak_bytes(work) for name, work in works.items()}
    base = "eager GRPO"
    print(
        f"{args.rows} x {args.length} tokens, float32, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    print(f"{processor()}, {os.cpu_count()} cores")
    print(f"{'':<46}{'ms':>8}{'x time':>9}{'bytes/token':>13}{'x memory':>10}")
    for name in works:
        ratio, memory = seconds[name] / seconds[base], peaks[name] / peaks[base]
        print(f"{name:<46}{seconds[name] * 1e3:>8.2f}{ratio:>9.2f}{peaks[name] / num:>13.1f}{memory:>10.2f}")


if __name__ == "__main__":
    main()
