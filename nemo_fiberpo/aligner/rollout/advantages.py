"""Advantages of whole responses from their rewards, by prompt group.

All tensors are 1-D over the samples of a rollout, [N], on one device; `valid` (bool) marks samples that have a reward.
The others take no part in a baseline and have advantage 0. SPMD: give every rank the whole rollout.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_STD = 1e-6


def _group_sums(value: Tensor, index: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64, device=value.device).index_add_(0, index, value.double())


def group_normalized(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """(r - mean) / std over the valid samples of the prompt group, float64 [N]; std with denominator n.

    0 if all rewards of the group are equal, or only one sample is valid.
    """
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0
    count = _group_sums(valid, index, groups).clamp(min=1)
    rewards = torch.where(valid, rewards.double(), 0.0)
    centred = torch.where(valid, rewards - (_group_sums(rewards, index, groups) / count)[index], 0.0)
    std = (_group_sums(centred.square(), index, groups) / count).sqrt()[index]
    return torch.where(std > _SMALLEST_STD, centred / std.clamp(min=_SMALLEST_STD), 0.0)


def rloo(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """r minus the mean reward of the group's other valid samples, float64 [N]; 0 if there are none."""
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0
    rewards = torch.where(valid, rewards.double(), 0.0)
    others = _group_sums(valid, index, groups)[index] - 1
    baseline = (_group_sums(rewards, index, groups)[index] - rewards) / others.clamp(min=1)
    return torch.where(valid & (others > 0), rewards - baseline, 0.0)


def given(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """The reward is the advantage, float64 [N]."""
    return torch.where(valid, rewards.double(), 0.0)


ESTIMATORS = {"group_normalized": group_normalized, "rloo": rloo, "given": given}
