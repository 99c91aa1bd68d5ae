"""States of an autoregressive policy: a label for every prefix."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_state_labels(tokens: Tensor, group: Tensor) -> Tensor:
    """Labels of the states of an autoregressive policy, for a stratum of states: one per prefix and prompt group.

    Args: `tokens` int64 [b, s]; `group` int64 [b], the label of each row's prompt group.
    Returns int64 [b, s - 1]: entry t belongs to the choice of tokens[:, t + 1] and is a 63-bit hash of the group and of
    tokens[:, :t + 1], so that ranks agree on it without communication.

    A state lies in one prompt group, but trajectories share it and pass through many: a chain with states, such as
    domain, prompt_group, state, has no stratum of trajectories.
    """
    place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    prefix = _mix(tokens[:, :-1] + _mix(place)).cumsum(1)  # int64 arithmetic wraps around
    return _mix(prefix + _mix(place + _mix(group)[:, None])) & (2**63 - 1)


def _mix(value: Tensor) -> Tensor:
    """The mixing step of splitmix64, a bijection of int64."""
    value = value - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor  # a logical shift: zeros move in
    return value
