"""States with several sampled actions, as sample-based TV-TRPO and APC-Obj see them (2, D): (65)-(75) written out."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import nemo_fiberpo as fpo

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Sampled:
    """Actions _A sampled `count` times in all; state, advantage and the chain with states alone."""

    state: Tensor
    count: Tensor
    advantage: Tensor
    hierarchy = fpo.Hierarchy((fpo.Stratum("state", fpo.Budget(1, 1)),), 1.0)

    @property
    def seen(self) -> Tensor:
        """n_s of the state of each action."""
        return torch.zeros(int(self.state.max()) + 1, dtype=F64).index_add_(0, self.state, self.count)[self.state]

    def centred(self, value: Tensor) -> Tensor:
        """`value` minus its mean over the samples of the state: (65) and (66)."""
        mean = torch.zeros_like(value).index_add_(0, self.state, self.count * value)[self.state] / self.seen
        return value - mean

    def tv(self, delta: Tensor) -> Tensor:
        """D_TV^(s) = (1 / 2 n_s) sum_a n(s, a) |Delta|, one per state."""
        states = int(self.state.max()) + 1
        return torch.zeros(states, dtype=F64).index_add_(0, self.state, self.count / (2 * self.seen) * delta.abs())

    def unit(self) -> tuple[Tensor, float]:
        """(69): the maximiser of a linear objective on the unit TV ball moves the best action against the worst; and
        cbar, the value of all states with weights n_s / N."""
        out, cbar = torch.zeros_like(self.advantage), 0.0
        for state in self.state.unique():
            at = (self.state == state).nonzero().squeeze(1)
            best, worst = at[self.advantage[at].argmax()], at[self.advantage[at].argmin()]
            out[best] += self.seen[best] / self.count[best]
            out[worst] -= self.seen[worst] / self.count[worst]
            share = self.seen[best] / self.count.sum()
            cbar += float(share * (self.advantage[best] - self.advantage[worst]))
        return out, cbar

    def radius(self, gamma: float) -> float:
        """delta_A = (1 - gamma) cbar / (8 gamma |A|_inf), Theorem D.3."""
        return (1 - gamma) * self.unit()[1] / (8 * gamma * float(self.advantage.abs().max()))

    def tv_trpo(self, delta: Tensor, gamma: float) -> float:
        """(67) without its constant, with the weights n_s / N."""
        gain = (self.count * delta * self.advantage).sum() / self.count.sum()
        penalty = 4 * gamma * self.advantage.abs().max() / (1 - gamma) ** 2 * self.tv(delta).max() ** 2
        return float(gain / (1 - gamma) - penalty)

    def tokens(self, value: Tensor) -> Tensor:
        """One entry per sample."""
        return value.repeat_interleave(self.count.long())

    @functools.cached_property
    def cells(self) -> fpo.Cells:
        return self.hierarchy.cells({"state": self.tokens(self.state)})

    def apc(self, delta: Tensor, radius: float) -> float:
        """APC-Obj (3) by the package."""
        weighted = self.tokens(self.advantage) / self.count.sum()
        log_ratio = self.tokens(delta).log1p()
        gating = fpo.Apc(radius, stratum="state")
        return fpo.surrogate(log_ratio, weighted, self.cells, self.hierarchy, gating=gating).value

    def censored(self, delta: Tensor, radius: float) -> Tensor:
        """C_delta (73) of every action, by the package: one token of each action tells."""
        log_ratio = self.tokens(delta).log1p()
        gated = fpo.gated_ratio(log_ratio, log_ratio, self.cells, fpo.Apc(radius, stratum="state"))
        first = self.count.long().cumsum(0) - self.count.long()
        return gated[first] - 1.0


def sample(seed: int, states: int = 4) -> Sampled:
    rng = generator(seed)
    actions = torch.randint(2, 5, (states,), generator=rng)
    state = torch.arange(states).repeat_interleave(actions)
    count = torch.randint(1, 4, state.shape, generator=rng).to(F64)
    problem = Sampled(state, count, torch.randn(state.shape, generator=rng, dtype=F64))
    problem.advantage = problem.centred(problem.advantage)
    return problem


def directions(problem: Sampled, seed: int) -> list[Tensor]:
    """Feasible ones: every exchange between two actions of a state, and random ones."""
    out = []
    for a, b in itertools.permutations(range(len(problem.state)), 2):
        if problem.state[a] == problem.state[b]:
            move = torch.zeros_like(problem.count)
            move[a], move[b] = 1.0 / problem.count[a], -1.0 / problem.count[b]
            out.append(move)
    rng = generator(seed)
    out += [problem.centred(torch.randn(problem.count.shape, generator=rng, dtype=F64)) for _ in range(40)]
    return out
