"""How the objective's communication grows with ranks and cells, with thousands of ranks simulated.

    OMP_NUM_THREADS=1 nice python -m benchmarks.growth [--ranks 8 64 512 4096] [--steps 1] [--samples 8]

One process plays one rank of a job, in torch's "fake" process group. The code is that of a run: `exchange`, with
torch's `all_gather_object` in it, then one evaluation of the objective with `Reducer`. What the other ranks send in the
exchange has been recorded from the same code on their samples; all-reduces act as if every rank had the same sums.
Samples are one token each, since neither cells nor buffers depend on tokens. There are three tables:

    fixed per rank          samples of an optimizer step on a rank, so that groups and trajectories grow with ranks
    fixed batch             samples of an optimizer step over all ranks, as many as the first table has at most
    fixed per rank, TP 8    as the first, but eight tensor-parallel ranks have the same samples

Prompt groups are dealt to the ranks in turn, so that nearly all of them are shared. Bytes are counted, those of the
all-reduces per optimizer step. Processor time and memory are those of the exchange of a rollout on one rank; memory is
the sum of the peaks of torch's allocations and of Python's.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.token_coefficients import HIERARCHY, peak_bytes, processor
from nemo_fiberpo.megatron.agreement import agreement
from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.groups import Axis, Reducer, TokenAxes
from nemo_fiberpo.objective import Cells, Hierarchy, SharedCells, build_cells, surrogate

GROUP, DOMAINS, TENSOR_PARALLEL = 8, 8, 8
COLUMNS = (
    "ranks", "cells", "shared", "all-reduces", "their bytes", "sent, bytes", "gathered, MiB", "memory, MiB", "CPU, s",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """`ranks` in all, of which `tensor` hold copies of the same tokens; `samples` of an optimizer step over all ranks,
    `steps` optimizer steps per rollout."""

    ranks: int
    samples: int
    steps: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // self.tensor

    def axes(self, rank: int) -> TokenAxes:
        place = Axis("dp", self.data, rank // self.tensor, sharded=True)
        return TokenAxes((Axis("tp", self.tensor, rank % self.tensor, sharded=False), place))

    def cells(self, rank: int, hierarchy: Hierarchy = HIERARCHY) -> list[Cells]:
        """What a rank exchanges once per rollout: for every step its cells, and the trajectories of its weights."""
        sample = torch.arange(self.samples)[rank // self.tensor :: self.data]
        group, groups = sample // GROUP, -(-self.samples // GROUP)
        columns = {"domain": group * DOMAINS // groups, "prompt_group": group, "trajectory": sample}
        names = {"domain": [f"domain {number}" for number in range(DOMAINS)]}
        of_step = hierarchy.cells({name: columns[name] for name in hierarchy.columns}, names=names)
        return [of_step, build_cells(["trajectory"], {"trajectory": sample})] * self.steps


class _Recorded(BaseException):
    """Ends the exchange of a rank whose message has been recorded."""


class World:
    """The process group of a job, in one process; `messages` are what its ranks send in an `all_gather_object`."""

    def __init__(self, job: Job):
        self.job = job
        self.messages: list[Tensor] = []
        self.gathered = 0  # bytes that a rank has received in all-gathers

    def record(self, send: Callable[[int], object]) -> None:
        """Record the message of every rank; `send` leads to one `all_gather_object`."""

        def all_gather_object(outputs: list[object], own: object, group: Any = None) -> None:
            message, _ = distributed_c10d._object_to_tensor(own, torch.device("cpu"), group)
            self.messages.append(message)
            raise _Recorded

        with mock.patch.object(dist, "all_gather_object", all_gather_object):
            for rank in range(self.job.ranks):
                with contextlib.suppress(_Recorded):
                    send(rank)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """All-gathers give the recorded messages, all-reduces what they give if every rank has the same."""

        def all_gather(outputs: list[Tensor], own: Tensor, group: Any = None) -> None:
            self.gathered += sum(output.nbytes for output in outputs)
            for output, message in zip(outputs, self.messages, strict=True):
                if own.dtype == torch.uint8:
                    output[: len(message)] = message
                else:
                    output.fill_(len(message))

        def all_reduce(total: Tensor, **options: Any) -> None:
            total *= self.job.data

        with (
            mock.patch.object(distributed_c10d, "all_gather", all_gather),
            mock.patch.object(dist, "all_reduce", all_reduce),
        ):
            yield


@contextlib.contextmanager
def world_of(job: Job) -> Iterator[World]:
    dist.init_process_group("fake", rank=0, world_size=job.ranks, store=FakeStore())
    try:
        world = World(job)
        world.record(lambda rank: exchange(job.cells(rank), job.axes(rank)))
        yield world
    finally:
        dist.destroy_process_group()


def step_reductions(
    cells: SharedCells, axes: TokenAxes, microbatches: int, hierarchy: Hierarchy = HIERARCHY
) -> Reducer:
    """One evaluation of the objective; the reducer has counted calls and bytes."""
    reducer, nothing = Reducer(axes), torch.zeros(cells.num_tokens)
    riders = agreement(axes, microbatches, None, nothing.device)
    surrogate(nothing, nothing, cells, hierarchy, reducer, riders=riders)
    return reducer


def peak_of_python(work: Callable[[], object]) -> int:
    """Most bytes that Python's allocators hold at once during `work`, beyond those before it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def measure(job: Job, rank: int = 0) -> tuple[int | float, ...]:
    """The figures of `COLUMNS`, for one rank."""
    with world_of(job) as world, world.replaying():
        own, axes = job.cells(rank), job.axes(rank)

        def work() -> list[SharedCells]:
            return exchange(own, axes)

        times = []
        for _ in range(3):
            world.gathered, start = 0, time.process_time()
            shared = work()
            times.append(time.process_time() - start)
        gathered = world.gathered
        reducer = step_reductions(shared[0], axes, 1)
        memory = peak_bytes(work) + peak_of_python(work)
    slots = shared[0].forests[0].slots.total
    cells = sum(level.num_cells for level in shared[0].levels)
    figures = (job.ranks, cells, slots, reducer.calls, reducer.bytes, len(world.messages[rank]))
    return (*figures, gathered / 2**20, memory / 2**20, min(times))


def row(figures: Sequence[int | float]) -> str:
    return f"| {' | '.join(f'{value:,}' if isinstance(value, int) else f'{value:.3g}' for value in figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--samples", type=int, default=8, help="of an optimizer step on a data-parallel rank")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a rollout")
    args = parser.parse_args()
    most = args.samples * max(args.ranks)
    jobs = {
        "fixed per rank": lambda ranks: Job(ranks, args.samples * ranks, args.steps),
        "fixed batch": lambda ranks: Job(ranks, most, args.steps),
        f"fixed per rank, TP {TENSOR_PARALLEL}": lambda ranks: Job(
            ranks, args.samples * ranks // TENSOR_PARALLEL, args.steps, TENSOR_PARALLEL
        ),
    }
    print(
        f"{args.samples} samples per rank and optimizer step, {args.steps} step(s) per rollout, groups of {GROUP}, "
        f"{DOMAINS} domains, chain of {len(HIERARCHY.active)} strata; {processor()}, torch {torch.__version__}"
    )
    for name, job in jobs.items():
        print(f"\n{name}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for ranks in args.ranks:
            print(row(measure(job(ranks))), flush=True)


if __name__ == "__main__":
    main()
