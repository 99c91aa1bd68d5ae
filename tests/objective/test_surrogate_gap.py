"""The surrogate and its gap, (1) and (53)-(56), on small Markov decision processes where both are known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_fiberpo.diagnostics.divergence import total_variation

F64 = torch.float64


def visits(policy: Tensor, moves: Tensor, gamma: float) -> Tensor:
    """Discounted share of each state, starting evenly: d = (1 - gamma) (I - gamma P^T)^-1 d_0."""
    between = torch.einsum("sa,sat->st", policy, moves)
    start = torch.full((len(policy),), 1.0 / len(policy), dtype=F64)
    return (1.0 - gamma) * torch.linalg.solve(torch.eye(len(policy), dtype=F64) - gamma * between.T, start)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("step", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_equation_1_bounds_the_gap_of_the_surrogate(seed: int, step: float, gamma: float):
    generator = torch.Generator().manual_seed(seed)
    moves = torch.rand(5, 3, 5, generator=generator, dtype=F64)
    moves /= moves.sum(-1, keepdim=True)
    reward = torch.randn(5, 3, generator=generator, dtype=F64)
    logits = torch.randn(5, 3, generator=generator, dtype=F64)
    old, new = logits.softmax(-1), (logits + step * torch.randn(5, 3, generator=generator, dtype=F64)).softmax(-1)

    def value(policy: Tensor) -> float:  # (53)
        return float((visits(policy, moves, gamma)[:, None] * policy * reward).sum() / (1.0 - gamma))

    between = torch.einsum("sa,sat->st", old, moves)
    state_value = torch.linalg.solve(torch.eye(5, dtype=F64) - gamma * between, (old * reward).sum(-1))
    advantage = reward + gamma * moves @ state_value - state_value[:, None]
    torch.testing.assert_close((old * advantage).sum(-1), torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)

    shares = visits(old, moves, gamma)[:, None] * old
    surrogate = value(old) + float((shares * (new / old) * advantage).sum()) / (1.0 - gamma)  # (54)
    constant = 4.0 * gamma * float(advantage.abs().max()) / (1.0 - gamma) ** 2
    penalty = constant * float(total_variation(old, new).max()) ** 2
    assert abs(value(new) - surrogate) <= penalty
    # (56): what the penalised objective gains is a gain of the return
    assert value(new) >= surrogate - penalty
