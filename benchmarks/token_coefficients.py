"""Time and peak memory of the objective against an eager clipped GRPO loss, forward and backward, on the same tensors.

    OMP_NUM_THREADS=1 python benchmarks/token_coefficients.py          (and with OMP_NUM_THREADS=2)

A batch of 64 x 8192 float32 tokens in 2 domains, 8 prompt groups and 64 trajectories, responses of unequal length
under a mask. Rows: GRPO compiled; the building of cells; `token_coefficients` and the surrogate with its report, eager
and compiled, on rows (`shape` given), without `shape`, and with the tokens of all trajectories shuffled.

Times are the CPU time of this thread (with one thread) or wall time, medians of interleaved repetitions in one process;
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
from nemo_fiberpo.objective.kernels import compile_passes

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


def peak_bytes(work: Callable[[], object], on_gpu: bool = False) -> int:
    """Most bytes alive at once during `work`, its result included, beyond those before it."""
    work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return {name: statistics.median(spent) for name, spent in timed(works, repeats, clock).items()}


def timed(
    works: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float], warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each in every round, in which they run in turns, after one round that is not counted; without that
    round where all have run before."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values() if warm_up else ():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            start = clock()
            work()
            times[name].append(clock() - start)
    return times


def with_passes(mode: str, work: Callable[[], object]) -> Callable[[], object]:
    """`work` with the objective's passes compiled ("1") or not ("0")."""

    def run() -> object:
        compile_passes(mode)
        return work()

    return run


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
        "rows": cells(labels, mask=mask, shape=shape),
        "rows without shape": cells(labels, mask=mask),
        "shuffled tokens": cells(shuffled, mask=mask),
    }
    compiled_grpo = torch.compile(grpo)
    works: dict[str, Callable[[], object]] = {"GRPO, eager": lambda: grpo(log_ratio, advantage, mask)}
    works["GRPO, compiled"] = lambda: compiled_grpo(log_ratio, advantage, mask)
    works |= {f"cells: {name}": (lambda make=make: make().shared) for name, make in build.items()}  # type: ignore[misc]
    for mode, kind in (("0", "eager"), ("1", "compiled")):
        for name, make in build.items():
            for function in (fpo.token_coefficients, fpo.surrogate):
                work = partial(function, log_ratio, advantage, make().shared, HIERARCHY)
                works[f"{function.__name__}, {kind}: {name}"] = with_passes(mode, work)

    seconds = medians(works, args.repeats)
    peaks = {name: peak_bytes(work) for name, work in works.items()}
    base = "GRPO, eager"
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
