"""Divergence estimators of A.3 from channel means: TV and KL of the old policy against the new one, per token."""

from __future__ import annotations

from torch import Tensor


def kl_estimate(mean_2C: Tensor) -> Tensor:
    """KL(old || new) of a cell, (40) and (49): log s^- - log s^+ = -(M^+ + M^-) = -mean(log r).

    `mean_2C` [2, ...] holds the signed channel means; nats per token. Unbiased under the old policy, so it can be below
    0 on a sample.
    """
    return -mean_2C.sum(0)


def tv_estimate(mean_2C: Tensor) -> Tensor:
    """Total variation of a cell, (39) and (48) to first order: (log s^+ + log s^-) / 2 = mean|log r| / 2."""
    return (mean_2C[0] - mean_2C[1]) / 2.0
