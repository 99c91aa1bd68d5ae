"""Ranks as threads that meet in every reduction, so that the core's collective protocol runs without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Meeting:
    """A sum over `world_size` threads; counts its calls and keeps the length of each buffer, per rank."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.buffers: list[Tensor | None] = [None] * world_size
        self.sizes: list[list[int]] = [[] for _ in range(world_size)]

    def reducer(self, rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(buffer: Tensor) -> Tensor:
            assert buffer.ndim == 1 and buffer.dtype == torch.float64
            self.sizes[rank].append(buffer.numel())
            self.buffers[rank] = buffer.clone()
            self.barrier.wait()
            total = torch.stack([held for held in self.buffers if held is not None]).sum(0)
            self.barrier.wait()
            return total

        return reduce


def on_ranks(world_size: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> tuple[list[Any], Meeting]:
    """work(rank, reduce) on every rank at once; its results (or the exception it raised) in rank order."""
    meeting = Meeting(world_size)

    def run(rank: int) -> Any:
        try:
            return work(rank, meeting.reducer(rank))
        except ValueError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size))), meeting
