"""The exchange of censuses and the reducer, on ranks over gloo: what is wrong with one rank is raised on all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from nemo_fiberpo.megatron.exchange import exchange, non_finite
from nemo_fiberpo.megatron.groups import Axis, Reducer, TokenAxes
from nemo_fiberpo.objective import build_cells
from tests.support import distributed

pytestmark = pytest.mark.distributed


def axes(rank: int, tp: int, pp: int, dp: int) -> TokenAxes:
    """Ranks in Megatron's order, tensor-parallel fastest, then data, then pipeline parallel."""
    return TokenAxes(
        (
            Axis("tp", tp, rank % tp, sharded=False),
            Axis("pp", pp, rank // (tp * dp), sharded=False, speaker=pp - 1),
            Axis("cp", 1, 0, sharded=True),
            Axis("dp", dp, rank // tp % dp, sharded=True),
        )
    )


def tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def reduce_worker(rank: int, world: int, tp: int, pp: int, dp: int) -> tuple[list[float], int, int, list[float]]:
    reducer = Reducer(axes(rank, tp, pp, dp))
    given = torch.tensor([1.0, 10.0 * (reducer.axes.shard[1] + 1)], dtype=torch.float64)
    total = reducer(given)
    reducer(torch.zeros(3, dtype=torch.float64))
    return total.tolist(), reducer.calls, reducer.bytes, given.tolist()


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_a_sum_counts_every_shard_once(tp: int, pp: int, dp: int) -> None:
    """Two shards hold (1, 10) and (1, 20): the sum is (2, 30) with any number of copies."""
    for total, calls, size, given in distributed.run(reduce_worker, tp * pp * dp, tp, pp, dp):
        assert total == ([2.0, 30.0] if dp == 2 else [1.0, 10.0])
        assert (calls, size) == (2, 40)
        assert given[0] == 1.0


def exchange_worker(rank: int, world: int, case: str) -> tuple[str, list]:
    place = axes(rank, 2, 1, 1) if case == "copies" else axes(rank, 1, 1, 2)
    problem, facts = None, {"micro-batches per step": 2}
    domain, group = tensor([0, 0, 1]), tensor([5, 5, 6])
    if case == "nesting" and rank == 1:
        domain = tensor([1, 1, 1])
    if case == "facts" and rank == 1:
        facts = {"micro-batches per step": 3}
    if case == "problem" and rank == 1:
        problem = non_finite("old_log_probs", torch.tensor([[0.0, torch.nan]]), torch.ones(1, 2, dtype=torch.bool))
    if case == "copies" and rank == 1:
        group = tensor([5, 5, 7])
    cells = [build_cells(["domain", "prompt_group"], {"domain": domain, "prompt_group": group})]
    try:
        shared = exchange([] if problem else cells, place, facts, problem)
    except ValueError as error:
        return str(error), []
    finally:
        dist.barrier()
    return "", [(level.label_C.tolist(), level.count_C.tolist()) for level in shared[0].levels]


def test_shared_cells_count_all_ranks() -> None:
    """Both ranks hold 2 tokens of domain 0, group 5, and 1 of domain 1, group 6."""
    for message, levels in distributed.run(exchange_worker, 2, "agreement"):
        assert message == ""
        assert levels == [([0, 1], [4.0, 2.0]), ([5, 6], [4.0, 2.0])]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("nesting", lambda message: "prompt_group" in message and "5" in message and "domain 0" in message),
        ("facts", lambda message: message.startswith("micro-batches per step: ") and "3 on rank 1" in message),
        ("problem", lambda message: message.startswith("rank 1: old_log_probs is nan at sample 0, token position 1")),
        ("copies", lambda message: message.startswith("rank 1: its labels or mask differ")),
    ],
)
def test_what_is_wrong_with_one_rank_is_raised_on_all(case: str, expected: Callable[[str], bool]) -> None:
    messages = [message for message, _ in distributed.run(exchange_worker, 2, case)]
    assert messages[0] == messages[1]
    assert expected(messages[0]), messages[0]


def test_the_group_must_span_the_axes() -> None:
    with pytest.raises(distributed.RanksFailed, match="it must span all of them"):
        distributed.run(reduce_worker, 2, 2, 1, 2)


def hanging_worker(rank: int, world: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 leaves")
    dist.recv(torch.zeros(1), src=1)


def test_a_rank_that_leaves_fails_the_run_with_its_traceback() -> None:
    with pytest.raises(distributed.RanksFailed, match="rank 1 leaves"):
        distributed.run(hanging_worker, 2, timeout=20)
