"""The KL penalty: an extra loss of the exact step that keeps the policy near an initial one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LINEAR_FROM = 20.0


def kl_penalty(log_probs: Tensor, batch: Mapping[str, Tensor], *, coefficient: float) -> Tensor:
    """coefficient * sum_i w_i k3(d_i), d = log pi_init - log pi: an estimate of KL(pi || pi_init).

        k3(d) = exp(d) - d - 1                        for d <= 20
              = exp(20) (1 + d - 20) - d - 1          beyond: the tangent of the exponential

    Args
        log_probs  [b, s], of the current policy
        batch      init_log_probs, weights (with their global denominator) and mask, [b, s] each

    float64, so that k3 does not cancel near 0. Its derivative with respect to log pi, 1 - exp(d), never rises with d
    and stays at 1 - exp(20), about -5e8, beyond: a token that the policy gave up is pulled back however far off it is.
    Masked tokens add nothing, whatever their values; live ones must be finite.
    """
    mask = batch["mask"].to(log_probs.device)
    difference = batch["init_log_probs"].to(log_probs.device, torch.float64) - log_probs.double()
    difference = torch.where(mask, difference, 0.0)
    near = difference.clamp(max=LINEAR_FROM)
    exponential = near.exp() * (1.0 + difference - near)
    estimate = exponential - difference - 1.0
    return coefficient * (batch["weights"].to(log_probs.device) * estimate).sum()
