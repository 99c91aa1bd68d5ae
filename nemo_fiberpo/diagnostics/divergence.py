"""Divergence estimators of A.3: TV and KL of the old policy against the new one, KL(old || new), in nats.

Both are means of a function of the ratio r = exp(log-ratio) under the old policy, (37) and (38):
    TV: f(r) = |r - 1| / 2        KL: f(r) = -log r
The estimators differ in what they average over: the tokens of a state (39), (40); all tokens (42); the worst state
(44); the tokens of a trajectory (47)-(49); the trajectories (51). Sums are float64.

Arguments: log_ratio [T]; mask bool [T], True for live tokens; labels of states or trajectories, int64 [T].
SPMD: only the tokens given count. Sums and counts of several ranks add up; ratios of them do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..values import nearest

KINDS = ("tv", "kl")


@dataclass(frozen=True, eq=False)
class CellDivergence:
    """Divergence of every cell that has a live token: its label, ascending, and number of live tokens, int64; and the
    mean of f, float64."""

    label_C: Tensor
    count_C: Tensor
    value_C: Tensor


def total_variation(old: Tensor, new: Tensor) -> Tensor:
    """(34): half the sum of |new - old| over the last axis, the actions. Probabilities [..., A] -> [...]."""
    return (new - old).abs().sum(-1) / 2.0


def kl_divergence(old: Tensor, new: Tensor) -> Tensor:
    """(35): sum of old log(old / new) over the last axis, the actions; 0 where old is 0. [..., A] -> [...]."""
    return (torch.xlogy(old, old) - torch.xlogy(old, new)).sum(-1)


def token_divergence(log_ratio: Tensor, kind: str) -> Tensor:
    """f(r) of each token, float64: |r - 1| / 2 for "tv", (37); -log r for "kl", (38), which can be below 0."""
    if kind not in KINDS:
        raise ValueError(f"kind: unknown divergence {kind!r}{nearest(kind, KINDS)}")
    value = log_ratio.detach().double()
    return torch.expm1(value).abs() / 2.0 if kind == "tv" else -value


def cell_divergence(log_ratio: Tensor, label: Tensor, kind: str, mask: Tensor | None = None) -> CellDivergence:
    """The mean of f over the live tokens of each cell: (39) and (40) with labels of states, (47)-(49) with those of
    trajectories. A state of a language model is a prompt with all tokens before this one: nearly all have one token."""
    value_T = token_divergence(log_ratio, kind)
    _check_like(log_ratio, label=label, mask=mask)
    if mask is not None:
        value_T, label = value_T[mask], label[mask]
    label_C, cell_T, count_C = torch.unique(label, return_inverse=True, return_counts=True)
    sum_C = value_T.new_zeros(label_C.numel()).index_add_(0, cell_T, value_T)
    return CellDivergence(label_C, count_C, sum_C / count_C)


def mean_divergence(log_ratio: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """(42): the mean of f over all live tokens, which weighs each state by its tokens; 0 without a token."""
    value_T = token_divergence(log_ratio, kind)
    _check_like(log_ratio, mask=mask)
    live_T = value_T if mask is None else value_T[mask]
    return live_T.sum() / max(live_T.numel(), 1)


def max_divergence(log_ratio: Tensor, state: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """(44): the largest of the states' estimates (39), or (40) for "kl"; 0 without a token."""
    value_C = cell_divergence(log_ratio, state, kind, mask).value_C
    return value_C.max() if value_C.numel() else value_C.new_zeros(())


def trajectory_divergence(log_ratio: Tensor, trajectory: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """(51): the mean over trajectories of their own mean of f, each trajectory counting the same; 0 without a token."""
    value_C = cell_divergence(log_ratio, trajectory, kind, mask).value_C
    return value_C.sum() / max(value_C.numel(), 1)


def kl_estimate(mean_2C: Tensor) -> Tensor:
    """KL(old || new) of cells, (40) and (49), from their signed channel means [2, ...]: log s^- - log s^+ =
    -(M^+ + M^-) = -mean(log r). Unbiased under the old policy, so it can be below 0 on a sample."""
    return -mean_2C.sum(0)


def tv_estimate(mean_2C: Tensor) -> Tensor:
    """Total variation of cells, (39) and (48) to first order: (log s^+ + log s^-) / 2 = mean|log r| / 2."""
    return (mean_2C[0] - mean_2C[1]) / 2.0


def _check_like(log_ratio: Tensor, label: Tensor | None = None, mask: Tensor | None = None) -> None:
    for name, value, dtype in (("label", label, torch.int64), ("mask", mask, torch.bool)):
        if value is not None and (value.dtype != dtype or value.shape != log_ratio.shape):
            raise ValueError(
                f"{name}: must be {dtype} of the shape of log_ratio, {list(log_ratio.shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
