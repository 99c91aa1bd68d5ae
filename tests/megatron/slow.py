"""The objective of a batch by loops, and metrics compared."""

from __future__ import annotations

import math
from functools import partial

import torch

from nemo_fiberpo.objective import Hierarchy
from nemo_fiberpo.verification.loops import objective_by_loops
from tests.megatron.batches import NAMES, Batch, labels_of, shares_of


def slow_objective(log_ratio: torch.Tensor, batch: Batch, chain: Hierarchy) -> torch.Tensor:
    """J of a batch, by loops."""
    labels = {name: labels_of(batch, name) for name in {*chain.columns, "trajectory"}}
    return objective_by_loops(
        log_ratio, batch["mask"], batch["advantage"], labels, chain, NAMES, partial(shares_of, batch)
    )


def same_metrics(one: dict[str, float], other: dict[str, float], rel: float = 1e-9) -> bool:
    """Whether two reports say the same, number by number; what has no value (NaN) has none in both."""
    return one.keys() == other.keys() and all(
        math.isclose(value, other[name], rel_tol=rel, abs_tol=1e-14) or (math.isnan(value) and math.isnan(other[name]))
        for name, value in one.items()
    )
