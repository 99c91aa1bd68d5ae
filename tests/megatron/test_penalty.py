"""The KL penalty by hand: near the initial policy, far from it, and at masked tokens."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_fiberpo.megatron.penalty import kl_penalty


def batch(init, weights, mask):
    return {"init_log_probs": torch.tensor(init), "weights": torch.tensor(weights), "mask": torch.tensor(mask)}


def of_differences(differences: list[float], dtype: torch.dtype = torch.float64) -> tuple[float, list[float]]:
    """Value and derivative with respect to log pi, of one token for each difference d = log pi_init - log pi."""
    current = torch.tensor([differences], dtype=dtype).neg().requires_grad_()
    of = batch([[0.0] * len(differences)], [[1.0] * len(differences)], [[True] * len(differences)])
    value = kl_penalty(current, of, coefficient=1.0)
    value.backward()
    return value.item(), current.grad[0].tolist()


def test_by_hand():
    # d = init - current = log 2 and 0: exp(d) - d - 1 = 1 - log 2 and 0
    current = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    init = [[-1.0 + math.log(2.0), -2.0]]
    value = kl_penalty(current, batch(init, [[0.5, 0.5]], [[True, True]]), coefficient=0.1)
    assert value.item() == pytest.approx(0.1 * 0.5 * (1 - math.log(2.0)), rel=1e-6)


def test_it_pulls_towards_the_initial_policy():
    _, (below, above) = of_differences([0.5, -0.5])
    # d/d log pi of exp(d) - d - 1 is 1 - exp(d); a step goes against it
    assert below == pytest.approx(1 - math.exp(0.5)) and above == pytest.approx(1 - math.exp(-0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_masked_token_is_nothing(value):
    current = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    penalty = kl_penalty(current, batch([[-0.5, value]], [[1.0, 0.0]], [[True, False]]), coefficient=1.0)
    penalty.backward()
    assert torch.isfinite(penalty) and current.grad[0, 1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_derivative_never_turns_however_far_off_a_token_is(dtype):
    differences = [-1e4, -100.0, -1.0, 0.0, 1.0, 10.0, 19.999, 20.0, 20.001, 25.0, 100.0, 1e4, 1e30]
    value, derivatives = of_differences(differences, dtype)
    assert math.isfinite(value)
    assert derivatives == sorted(derivatives, reverse=True)
    assert derivatives[3] == 0.0 and derivatives[0] == pytest.approx(1.0)
    assert derivatives[-1] == pytest.approx(1 - math.exp(20.0)) == pytest.approx(derivatives[7])


def test_beyond_twenty_nats_it_is_the_tangent():
    """exp(20) (1 + 22 - 20) - 22 - 1 = 3 exp(20) - 23, and no step at the seam."""
    assert of_differences([22.0])[0] == pytest.approx(3 * math.exp(20.0) - 23, rel=1e-15)
    assert of_differences([20.0 + 1e-9])[0] == pytest.approx(of_differences([20.0 - 1e-9])[0], rel=1e-8)


def test_small_differences_do_not_cancel_in_float32():
    """d = 2^-12: k3 = d^2/2 (1 + d/3 + ...), of which float32 would keep two digits."""
    d = 2.0**-12
    assert of_differences([d], torch.float32)[0] == pytest.approx(d * d / 2 * (1 + d / 3), rel=1e-6)
