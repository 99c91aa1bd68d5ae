"""Which ranks hold which tokens, said once, and the only collectives of the objective.

    axis   tokens      who speaks for them
    tp     replicated  rank 0: vocab-parallel log-probs are equal on all tensor-parallel ranks
    pp     replicated  the last stage, the only one that has log-probs
    cp     sharded     everybody: a sequence is split over the axis
    dp     sharded     everybody; the expert-parallel axis lies inside dp and shards tokens as it does

A rank represents its tokens if it is the speaker on every replicated axis. Sums run over one group that spans all axes;
ranks that do not represent their tokens contribute zeros. So every rank gets the same bits, takes the same decisions
and raises the same errors, and nobody waits for a rank that left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.objective.cells import Cells


@dataclass(frozen=True)
class Axis:
    """A parallel dimension: this rank's place on it, and whether its ranks hold different tokens or copies of them."""

    name: str
    size: int
    rank: int
    sharded: bool
    speaker: int = 0

    @property
    def represents(self) -> bool:
        return self.sharded or self.rank == self.speaker


@dataclass(frozen=True)
class TokenAxes:
    """The axes of a job and the process group that spans them all (None: the default group, all ranks)."""

    axes: tuple[Axis, ...]
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if dist.is_available() and dist.is_initialized():
            product = 1
            for axis in self.axes:
                product *= axis.size
            size = dist.get_world_size(self.group)
            if product != size:
                sizes = " x ".join(f"{axis.name} {axis.size}" for axis in self.axes)
                raise ValueError(
                    f"group: has {size} ranks, but the axes {sizes} make {product}; it must span all of them"
                )

    @property
    def represents(self) -> bool:
        """Whether this rank's tokens count: it is the speaker on every replicated axis."""
        return all(axis.represents for axis in self.axes)

    @property
    def shard(self) -> tuple[int, ...]:
        """Place on the sharded axes: equal on the ranks that hold copies of the same tokens."""
        return tuple(axis.rank for axis in self.axes if axis.sharded)

    @property
    def num_shards(self) -> int:
        """Ranks that represent tokens: data parallel times context parallel. What Megatron's DDP averages over."""
        number = 1
        for axis in self.axes:
            number *= axis.size if axis.sharded else 1
        return number

    def size(self, name: str) -> int:
        return next((axis.size for axis in self.axes if axis.name == name), 1)

    @classmethod
    def from_parallel_state(cls, group: dist.ProcessGroup | None = None) -> TokenAxes:
        """The axes of megatron-core's initialised `parallel_state`."""
        from megatron.core import parallel_state as mpu

        stages = mpu.get_pipeline_model_parallel_world_size()
        return cls(
            (
                Axis(
                    "tp",
                    mpu.get_tensor_model_parallel_world_size(),
                    mpu.get_tensor_model_parallel_rank(),
                    sharded=False,
                ),
                Axis("pp", stages, mpu.get_pipeline_model_parallel_rank(), sharded=False, speaker=stages - 1),
                Axis("cp", mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank(), sharded=True),
                Axis("dp", mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank(), sharded=True),
            ),
            group,
        )


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass
class Reducer:
    """`reduce(buffer)`: the sum of a float64 buffer over the ranks that represent tokens, the same bits on every rank.

    One all-reduce per call, also on ranks without tokens. `calls` and `bytes` count them, in a job of one rank too.
    """

    axes: TokenAxes
    calls: int = field(default=0, init=False)
    bytes: int = field(default=0, init=False)

    def __call__(self, buffer: Tensor) -> Tensor:
        assert buffer.dtype == torch.float64 and buffer.dim() == 1, "reductions run on flat float64 buffers"
        self.calls += 1
        self.bytes += buffer.numel() * buffer.element_size()
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.axes.group) == 1:
            return buffer
        device = _collective_device(self.axes.group)
        total = (
            buffer.detach().to(device, copy=True) if self.axes.represents else torch.zeros_like(buffer, device=device)
        )
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.axes.group)
        return total.to(buffer.device)


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


def exchange(
    cells: Sequence[Cells],
    axes: TokenAxes,
    facts: Mapping[str, Any] | None = None,
    problem: str | None = None,
) -> list[Cells]:
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
    censuses = [entry.census().cpu() for entry in cells]
    own = {
        "shard": axes.shard,
        "censuses": censuses if axes.represents else None,
        "digest": _digest(censuses),
        "facts": {"number of cells exchanged": len(censuses), **(facts or {})},
        "problem": problem,
    }
    entries: list[Any] = [own]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(axes.group) > 1:
        entries = [None] * dist.get_world_size(axes.group)
        dist.all_gather_object(entries, own, group=axes.group)
    _agree(entries)
    shards = _representatives(entries)
    index = list(shards).index(axes.shard)
    gathered = [entry["censuses"] for entry in shards.values()]
    return [entry.share([censuses[i] for censuses in gathered], index) for i, entry in enumerate(cells)]
