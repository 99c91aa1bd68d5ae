"""What the communication of a step grows with, counted; and the simulated ranks of benchmarks/growth.py against real
ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.growth import Job, step_reductions, world_of
from benchmarks.token_coefficients import HIERARCHY
from nemo_fiberpo.megatron import optimistic, step
from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.groups import Reducer
from nemo_fiberpo.megatron.step import StepTokens, exact_step
from nemo_fiberpo.objective import SharedCells
from tests.support import distributed

JOBS = [Job(4, 40), Job(4, 32, tensor=2), Job(2, 24, steps=2)]


def figures(shared: list[SharedCells]) -> list[tuple[Any, ...]]:
    """What the other ranks decide about this rank's cells."""
    found: list[tuple[Any, ...]] = []
    for cells in shared:
        for level in cells.levels:
            own = (level.label_C, level.count_C, level.owned_C, level.slots.held, level.slots.place)
            found.append((level.name, level.num_cells, level.slots.total, *(value.tolist() for value in own)))
    return found


def worker(rank: int, world: int, jobs: list[Job]) -> list[Any]:
    found = []
    for job in jobs:
        shared, axes = exchange(job.cells(rank), job.axes(rank)), job.axes(rank)
        reducer = step_reductions(shared[0], axes, 1)
        found.append((figures(shared), reducer.calls, reducer.bytes))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_simulated_rank_has_the_cells_and_reductions_of_a_real_one(ranks: int) -> None:
    jobs = [job for job in JOBS if job.ranks == ranks]
    for rank, found in enumerate(distributed.run(worker, ranks, jobs)):
        for job, (real, calls, size) in zip(jobs, found, strict=True):
            with world_of(job) as world, world.replaying():
                shared, axes = exchange(job.cells(rank), job.axes(rank)), job.axes(rank)
                assert figures(shared) == real
                if axes.represents:  # others give zeros, which simulated all-reduces do not replace
                    reducer = step_reductions(shared[0], axes, 1)
                    assert (reducer.calls, reducer.bytes) == (calls, size)


def step_of(job: Job, microbatches: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """All-reduces of an exact step, their bytes, and the shared cells; the model's passes are left out."""
    with world_of(job) as world, world.replaying():
        cells = exchange(job.cells(0), job.axes(0))[0]
        values = [torch.zeros(1, cells.num_tokens // microbatches)] * microbatches
        tokens = StepTokens(values, values, [value == 0 for value in values], cells)
        monkeypatch.setattr(step, "current_log_probs", lambda policy, given: values)
        policy: Any = SimpleNamespace(config=SimpleNamespace())
        reducer = Reducer(job.axes(0))
        exact_step(policy, range(microbatches), tokens, HIERARCHY, reducer, forward_only=True)
    return reducer.calls, reducer.bytes, cells.forests[0].slots.total


def test_micro_batches_change_neither_all_reduces_nor_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {step_of(Job(4, 64), number, monkeypatch) for number in (1, 2, 4, 8, 16)}
    assert len(found) == 1 and found.pop()[0] == 2


def test_bytes_grow_by_32_for_every_shared_cell_and_by_152_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared cell has two channels of 8 bytes in both all-reduces. For every rank the report has 8 bytes for the
    largest log-ratio and, of three strata, for 6 maxima each. Cells of one rank, as trajectories, add nothing."""
    rest = set()
    for ranks, groups in ((2, 4), (2, 5), (2, 24), (4, 4), (4, 32), (8, 8), (8, 40)):
        calls, size, shared = step_of(Job(ranks, 8 * groups), 1, monkeypatch)
        assert calls == 2 and groups < shared <= groups + 8
        rest.add(size - 32 * shared - 8 * (1 + 6 * 3) * ranks)
    assert len(rest) == 1


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 4), (4, 8)])
def test_an_optimistic_step_adds_8_bytes_for_every_micro_batch_of_every_rank(ranks: int, microbatches: int) -> None:
    job = Job(ranks, 8 * ranks * microbatches)
    with world_of(job) as world, world.replaying():
        cells = exchange(job.cells(0), job.axes(0))[0]
        values = [torch.zeros(1, 8)] * microbatches
        tokens = StepTokens(values, values, [value == 0 for value in values], cells)
        reducer = Reducer(job.axes(0))
        touched = optimistic._touched([value + 1.0 for value in values], values, tokens, reducer)
    assert (reducer.calls, reducer.bytes) == (1, 8 * ranks * microbatches)
    assert touched[0] == [True] * microbatches and not any(any(row) for row in touched[1:])
