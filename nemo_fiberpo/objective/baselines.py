"""CISPO, SAPO, DPPO-TV and GMPO as ratio-gating maps, beside those of ratio_gating.py.

    objective   map       weights           couples the tokens of
    CISPO       Cispo     token_mean        nothing
    SAPO        Sapo      trajectory_mean   nothing
    DPPO-TV     DppoTv    token_mean        nothing
    GMPO        Gmpo      trajectory_mean   a trajectory

CISPO and DPPO-TV have a stop-gradient sg in their formulas: sg(f(r)) A log pi. Their value here is w A f(r), that of
sg(f(r)) A (1 + log pi - sg(log pi)), and their coefficient the gradient of both, w A f(r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fields import setting
from .ratio_gating import Gated, _Checked, _exp, _TokenWise


@dataclass(frozen=True)
class Cispo(_TokenWise):
    """Clipped importance sampling: the ratio is a weight, which is clipped, and every token keeps a gradient.

        J_i = sg(clip(r_i, 1 - low, 1 + high)) A_i log pi_i

    MiniMax 2025, MiniMax-M1, arXiv 2506.13585.
    """

    _below_one: ClassVar[tuple[str, ...]] = ("low",)

    low: float = setting(above=0, at_most=1)
    """Ratios are clipped at 1 - low from below; 1 clips nothing there, as the paper has it."""

    high: float = setting(above=0)
    """Ratios are clipped at 1 + high from above."""

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        ratio = _exp(x)
        weight = ratio.clamp(1.0 - self.low, 1.0 + self.high)
        return Gated(weight, weight, weight != ratio)


@dataclass(frozen=True)
class Sapo(_TokenWise):
    """A soft gate: the gradient falls off on both sides of r = 1, the faster the larger tau is.

        G_i = 1 + (4 / tau) (sigmoid(tau (r_i - 1)) - 1/2),     tau = tau_pos where A_i >= 0, tau_neg where A_i < 0

    The paper's gate is G - 1 + 2 / tau; the constant makes G(1) = 1. No token counts as clipped.
    Gao et al. 2025, Soft Adaptive Policy Optimization, arXiv 2511.20347.
    """

    tau_pos: float = setting(above=0)
    """How fast the gradient falls off, at advantages of 0 and above."""

    tau_neg: float = setting(above=0)
    """The same at advantages below 0."""

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        ratio = _exp(x)
        tau = torch.where(positive, torch.full_like(x, self.tau_pos), torch.full_like(x, self.tau_neg))
        above, below = torch.sigmoid(tau * (ratio - 1.0)), torch.sigmoid(tau * (1.0 - ratio))
        gated = 1.0 + 4.0 / tau * (above - 0.5)
        return Gated(gated, 4.0 * above * below * ratio, torch.zeros_like(positive))


@dataclass(frozen=True)
class DppoTv(_TokenWise):
    """Divergence PPO with the binary total variation: a token is dropped once its probability, not its ratio, has moved
    too far in the direction of its advantage.

        J_i = sg(min(r_i, cap)) A_i log pi_i      where sign(A_i) (pi_i - pi_old_i) <= delta,     0 elsewhere

    Needs `old_log_probs` in `surrogate`. Dropped tokens, and those at the cap, count as clipped.
    Qi et al. 2026, Rethinking the Trust Region in LLM Reinforcement Learning, arXiv 2602.04879.
    """

    delta: float = setting(above=0)
    """How far a token's probability may move in the direction of its advantage."""

    cap: float = setting(at_least=1)
    """Largest ratio, as a weight; 1 is that of on-policy."""

    def against(self, old_log_probs: Tensor) -> DppoTvOfTokens:
        """The map of tokens with these log-probs under the old policy, float64 [T]."""
        return DppoTvOfTokens(self, old_log_probs)

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        raise AssertionError("the map of tokens is `against(old_log_probs)`")


@dataclass(frozen=True, eq=False)
class DppoTvOfTokens(_TokenWise):
    """`DppoTv` of tokens whose old log-probs are known."""

    settings: DppoTv
    old_log_probs: Tensor

    def __post_init__(self) -> None:
        """Nothing to check: the settings are."""

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        ratio = _exp(x)
        moved = self.old_log_probs.exp() * (ratio - 1.0)  # pi - pi_old
        dropped = torch.where(positive, moved, -moved) > self.settings.delta
        weight = torch.where(dropped, 0.0, ratio.clamp_max(self.settings.cap))
        return Gated(weight, weight, dropped | (ratio > self.settings.cap))


@dataclass(frozen=True)
class Gmpo(_Checked):
    """The geometric mean of a trajectory's ratios, each clipped before: one wild token moves it little.

        G_i = exp( (1 / T_tau) sum_{j in tau} f_j ),
        use_min   f_j = min(ell_j, high) where A_j >= 0,   max(ell_j, -low) where A_j < 0
        else      f_j = clip(ell_j, -low, high)

    Zhao et al. 2025, Geometric-Mean Policy Optimization, arXiv 2507.20673.
    """

    low: float = setting(above=0)
    """Log-ratios are clipped at -low, in nats."""

    high: float = setting(above=0)
    """Log-ratios are clipped at high, in nats."""

    use_min: bool = setting(True)
    """Whether a log-ratio is clipped only on the side to which its advantage pushes it."""

    stratum: str = setting("trajectory")
    """The active stratum whose cells' tokens are averaged."""

    def _clipped(self, x: Tensor, positive: Tensor) -> Tensor:
        above, below = x > self.high, x < -self.low
        return torch.where(positive, above, below) if self.use_min else above | below

    def feature(self, x: Tensor, positive: Tensor, count: Tensor) -> Tensor:
        return torch.where(self._clipped(x, positive), x.clamp(-self.low, self.high), x)

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        ratio, clipped = _exp(total / count), self._clipped(x, positive)
        return Gated(ratio, torch.zeros_like(x), clipped, ratio, torch.where(clipped, 0.0, 1.0 / count))
