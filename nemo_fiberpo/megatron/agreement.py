"""What all ranks must agree on in a step, told by way of a reduction that happens anyway."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.groups import Reducer


@dataclass
class Agreeing:
    """The reducer of one step, whose first call raises the same refusal on every rank instead of leaving some waiting.

    microbatches  of this rank; the ranks that represent tokens must have the same number
    problem       why this rank cannot take the step; it joins the first reduction with anything of the right size

    Four numbers ride in that reduction: ranks with a problem, the sum of their ranks, sums of M and M^2 over all ranks.
    Speakers alone are counted; the ranks with copies of their tokens have the same problem or find it out by time-out.
    """

    reducer: Reducer
    microbatches: int
    problem: str | None = None
    _agreed: bool = field(default=False, init=False)

    def __call__(self, buffer: Tensor) -> Tensor:
        if self._agreed:
            return self.reducer(buffer)
        number, rank = self.microbatches, dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        bad = self.problem is not None
        told = buffer.new_tensor([float(bad), float(rank * bad), float(number), float(number**2)])
        total = self.reducer(torch.cat([buffer, told]))
        self._agreed = True
        refusing, ranks, sum_, squares = (int(value) for value in total[-4:].tolist())
        if bad:
            raise ValueError(self.problem)
        if refusing:
            who = f"rank {ranks}" if refusing == 1 else f"each of {refusing} other ranks"
            raise ValueError(f"another rank has refused its micro-batches or tokens: {who}; see the error there")
        shards = self.reducer.axes.num_shards
        if squares * shards != sum_**2:  # equal exactly where all M are
            raise ValueError(
                f"microbatches: {number} on rank {rank}, but {sum_} on all {shards} ranks that hold tokens of their "
                "own; every rank must have the same number"
            )
        return total[:-4]
