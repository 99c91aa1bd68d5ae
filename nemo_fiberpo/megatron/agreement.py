"""What all ranks must agree on in a step, told by way of a reduction that happens anyway."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.objective import Riders
from nemo_fiberpo.objective.gates import constant


def agreement(axes: TokenAxes, microbatches: int, problem: str | None, device: torch.device) -> Riders:
    """Riders by which every rank raises the same refusal, instead of leaving some waiting.

    microbatches  of this rank; the ranks that represent tokens must have the same number
    problem       why this rank cannot take the step; it joins the first reduction with anything of the right size

    The numbers are: ranks with a problem, the sum of their ranks, sums of M and M^2 over all ranks. Only speakers are
    counted; the ranks with copies of their tokens have the same problem or find it out by time-out.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    bad = problem is not None
    told = (float(bad), float(rank * bad), float(microbatches), float(microbatches**2))

    def check(summed: Mapping[str, Tensor]) -> None:
        refusing, ranks, total, squares = (int(value) for value in summed["agreement"].tolist())
        if problem is not None:
            raise ValueError(problem)
        if refusing:
            who = f"rank {ranks}" if refusing == 1 else f"each of {refusing} other ranks"
            raise ValueError(f"another rank has refused its micro-batches or tokens: {who}; see the error there")
        shards = axes.num_shards
        if squares * shards != total**2:  # equal exactly where all M are
            raise ValueError(
                f"microbatches: {microbatches} on rank {rank}, but {total} on all {shards} ranks that hold tokens of "
                "their own; every rank must have the same number"
            )

    return Riders({"agreement": constant(told, torch.float64, device)}, check)
