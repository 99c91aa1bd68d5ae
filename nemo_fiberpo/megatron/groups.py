"""Which ranks hold which tokens, said once, and the only collectives of the objective.

    axis   tokens      who speaks for them                            parameter gradients
    tp     replicated  rank 0: vocab-parallel log-probs are equal      each rank has its own shard
                       on all tensor-parallel ranks
    pp     replicated  the last stage, the only one with log-probs     each rank has its own layers
    cp     sharded     everybody: a sequence is split over the axis    averaged by Megatron's DDP
    dp     sharded     everybody; expert-parallel ranks lie inside     averaged by Megatron's DDP
                       dp x cp and shard tokens as these do

A host that hands over log-probs which it has gathered over cp makes that axis replicated: rank 0 speaks, every rank
computes the same loss, and what the backward pass of the gather does decides the scale of the gradient (`GATHERED`).

A rank represents its tokens if it is the speaker on every replicated axis. Sums run over one group that spans all axes;
ranks that do not represent their tokens contribute zeros. So every rank gets the same bits, takes the same decisions
and raises the same errors, and nobody waits for a rank that left.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

GATHERED = ("slice", "sum")
"""What the backward pass of a gather of log-probs does with the gradient [b, s] that every rank of the axis computes:

    slice   each rank keeps the part of its own tokens (verl; `sequences.gather_rows`)
    sum     gradients of all ranks are added up first, so that each counts as often as the axis has ranks (NeMo-RL)
"""


@dataclass(frozen=True)
class Axis:
    """A parallel dimension: this rank's place on it, and whether its ranks hold different tokens or copies of them.

    speaker    the rank that speaks for copies
    group      the axis's process group
    averaged   Megatron's DDP averages parameter gradients over it
    backward   of the gather that made the copies, one of `GATHERED`; None where nothing was gathered
    """

    name: str
    size: int
    rank: int
    sharded: bool
    speaker: int = 0
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    averaged: bool = False
    backward: str | None = None

    def __post_init__(self) -> None:
        if self.backward is not None and (self.backward not in GATHERED or self.sharded):
            raise ValueError(
                f"backward: of the gathered axis {self.name} must be one of {GATHERED}, got {self.backward!r}"
            )

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
            product = math.prod(axis.size for axis in self.axes)
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
        """Ranks that represent tokens."""
        return math.prod(axis.size for axis in self.axes if axis.sharded)

    @property
    def num_averaged(self) -> int:
        """Ranks over which Megatron's DDP averages a parameter's gradient: data parallel times context parallel."""
        return math.prod(axis.size for axis in self.axes if axis.averaged)

    @property
    def copies(self) -> int:
        """How often the gradient of a token's log-prob reaches the parameters, because the backward pass of a gather
        adds up what all ranks of the axis computed."""
        return math.prod(axis.size for axis in self.axes if axis.backward == "sum")

    def axis(self, name: str) -> Axis:
        """The axis of that name; ValueError if there is none."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise ValueError(f"axes: none is called {name!r}; there are {[axis.name for axis in self.axes]}")

    @classmethod
    def from_parallel_state(
        cls, group: dist.ProcessGroup | None = None, gathered: Mapping[str, str] | None = None
    ) -> TokenAxes:
        """The axes of megatron-core's initialised `parallel_state`.

        gathered   {"cp": "slice" or "sum"} where the host's log-probs are gathered over cp, see `GATHERED`
        """
        from megatron.core import parallel_state as mpu

        backward = dict(gathered or {})
        if set(backward) - {"cp"}:
            raise ValueError(f"gathered: log-probs can be gathered over cp alone, got {sorted(backward)}")
        stages = mpu.get_pipeline_model_parallel_world_size()
        stage = mpu.get_pipeline_model_parallel_rank()
        tp = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        cp = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        dp = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        return cls(
            (
                Axis("tp", *tp, sharded=False, group=mpu.get_tensor_model_parallel_group()),
                Axis("pp", stages, stage, False, speaker=stages - 1, group=mpu.get_pipeline_model_parallel_group()),
                Axis(
                    "cp",
                    *cp,
                    sharded="cp" not in backward,
                    group=mpu.get_context_parallel_group(),
                    averaged=True,
                    backward=backward.get("cp"),
                ),
                Axis("dp", *dp, sharded=True, group=mpu.get_data_parallel_group(), averaged=True),
            ),
            group,
        )


def collective_device(group: dist.ProcessGroup | None) -> torch.device:
    if "nccl" in dist.get_backend(group):  # a group of several is called "cpu:gloo,cuda:nccl"
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextlib.contextmanager
def named_failure(what: str) -> Iterator[None]:
    """A collective of ours that fails says which one it was, and where to look for the cause."""
    try:
        yield
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"{what} did not complete on rank {dist.get_rank()}: another rank died, left, or did not come to it within "
            f"the time-out of the process group. The rank that failed first says why. ({said})"
        ) from error


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
        device = collective_device(self.axes.group)
        total = (
            buffer.detach().to(device, copy=True) if self.axes.represents else torch.zeros_like(buffer, device=device)
        )
        with named_failure("a reduction of the gates"):
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.axes.group)
        return total.to(buffer.device)
