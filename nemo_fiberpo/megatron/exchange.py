"""What ranks tell each other once per rollout: their cells, which all share, and what is wrong with any rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.groups import TokenAxes, named_failure
from nemo_fiberpo.objective import Cells, SharedCells


def non_finite(name: str, value: Tensor, mask: Tensor) -> str | None:
    """What to tell `exchange` about a tensor of live tokens: None, or where its first non-finite entry is.

    `value` and `mask` (bool, True for live tokens) have the same shape, [B, S] or [T]; rows are named as samples.
    """
    bad = (~torch.isfinite(value) & mask).nonzero()
    if not len(bad):
        return None
    where = bad[0].tolist()
    place = f"sample {where[0]}, token position {where[1]}" if len(where) == 2 else f"token {where[-1]}"
    return f"{name} is {float(value[tuple(where)])} at {place} ({len(bad)} live tokens in all); it must be finite"


def _digest(censuses: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for census in censuses:
        total.update(str(tuple(census.shape)).encode())
        total.update(census.contiguous().numpy().tobytes())
    return total.hexdigest()


def _agree(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise, on every rank alike, what is wrong with any rank."""
    problems = [f"rank {rank}: {entry['problem']}" for rank, entry in enumerate(entries) if entry["problem"]]
    if problems:
        raise ValueError("; ".join(problems))
    for name in sorted({name for entry in entries for name in entry["facts"]}):
        values = [entry["facts"].get(name) for entry in entries]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{name}: must be equal on all ranks, but is {values[0]} on rank 0 and {values[other]} on rank {other}"
            )


def _representatives(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[int, ...], Mapping[str, Any]]:
    """Entry of the representative of each shard, in the order of the shards; checks that the copies agree with it."""
    found: dict[tuple[int, ...], Mapping[str, Any]] = {}
    for rank, entry in enumerate(entries):
        if entry["censuses"] is not None:
            if entry["shard"] in found:
                raise ValueError(
                    f"rank {rank} represents the tokens of shard {entry['shard']}, which another rank does already"
                )
            found[entry["shard"]] = entry
    for rank, entry in enumerate(entries):
        speaker = found.get(entry["shard"])
        if speaker is None:
            raise ValueError(f"rank {rank}: no rank represents the tokens of its shard {entry['shard']}")
        if entry["digest"] != speaker["digest"]:
            raise ValueError(
                f"rank {rank}: its labels or mask differ from those of the rank that represents its tokens; "
                "tensor- and pipeline-parallel ranks must be given the same batch"
            )
    return dict(sorted(found.items()))


def gather_censuses(
    cells: Sequence[Cells], axes: TokenAxes, facts: Mapping[str, Any] | None = None, problem: str | None = None
) -> dict[tuple[int, ...], list[Tensor]]:
    """Censuses of `cells` on every shard, in the order of the shards; arguments and errors as `exchange`.

    SPMD: every rank of `axes.group` calls this. One all_gather_object.
    """
    entries = _gather(cells, axes, facts, problem)
    shards = _representatives(entries).items()
    return {shard: [torch.from_numpy(census) for census in entry["censuses"]] for shard, entry in shards}


def exchange_notes(
    note: Any, axes: TokenAxes, facts: Mapping[str, Any] | None = None, problem: str | None = None
) -> list[Any]:
    """What every rank has to tell the others, such as the names that it found in its data, in the order of the ranks;
    `facts`, `problem` and errors as in `exchange`.

    SPMD: every rank of `axes.group` calls this. One all_gather_object.
    """
    return [entry["note"] for entry in _gather([], axes, facts, problem, note)]


def _gather(
    cells: Sequence[Cells], axes: TokenAxes, facts: Mapping[str, Any] | None, problem: str | None, note: Any = None
) -> list[dict[str, Any]]:
    censuses = [entry.census().cpu() for entry in cells]
    own = {
        "shard": axes.shard,
        # As arrays: every rank unpickles those of all ranks, which takes many times as long for tensors.
        "censuses": [census.numpy() for census in censuses] if axes.represents else None,
        "digest": _digest(censuses),
        "facts": {"number of cells exchanged": len(censuses), **(facts or {})},
        "problem": problem,
        "note": note,
    }
    entries: list[Any] = [own]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(axes.group) > 1:
        entries = [None] * dist.get_world_size(axes.group)
        with named_failure("the exchange of cells"):
            dist.all_gather_object(entries, own, group=axes.group)
    _agree(entries)
    return entries


def exchange(
    cells: Sequence[Cells],
    axes: TokenAxes,
    facts: Mapping[str, Any] | None = None,
    problem: str | None = None,
) -> list[SharedCells]:
    """Agree on the cells of all minibatches of a rollout: global counts and slots, by one exchange.

    Args
        cells    this rank's cells, one entry per minibatch (and any further cells whose global counts are wanted, such
                 as those of the trajectories for the weights' denominators), built from local tokens
        facts    what must be equal on all ranks, such as {"micro-batches per step": 4, "minibatches": 2}
        problem  what is wrong with this rank's data, see `non_finite`; it stops every rank. A rank that could not even
                 build its cells joins with an empty `cells` and the reason

    Returns the shared cells, in the same order. On a rank that does not represent its tokens they are those of the rank
    that does.

    Raises ValueError, with the same message on every rank, for a problem on any rank, facts that differ, ranks of one
    shard with different labels or masks, and a cell that nests differently on two ranks. Errors are looked for after
    the exchange, by every rank in everybody's data: none is left waiting.

    SPMD: every rank of `axes.group` calls this, with or without tokens. One all_gather_object.
    """
    shards = gather_censuses(cells, axes, facts, problem)
    index = list(shards).index(axes.shard)
    return [entry.share([censuses[i] for censuses in shards.values()], index) for i, entry in enumerate(cells)]
