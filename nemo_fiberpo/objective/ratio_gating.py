"""PPO, GRPO, GSPO, Truly-PPO and APC-Obj as ratio-gating maps: the other objectives of the framework. Later ones are in
baselines.py.

Ratio gating framework, (2), with ell_i the log-ratio and r_i = exp(ell_i) of live token i:
    J = sum_i w_i A_i G(r)_i,        c_j = dJ / d ell_j = sum_i w_i A_i dG_i / d ell_j
A class here is a map G; the weights w are the caller's (`token_weights`). FiberPO's map is `gated_log_ratio`.

    objective   map         weights (C.4, C.5)   couples the tokens of
    PPO         PpoClip     token_mean           nothing
    GRPO        PpoClip     trajectory_mean      nothing
    GSPO        Gspo        trajectory_mean      a trajectory
    Truly-PPO   TrulyPpo    token_mean           nothing
    APC-Obj     Apc         token_mean           a state, or a trajectory

The forms with a minimum, min(G A, r A), are a gate times A, since the gate may depend on the sign of A: that of the
weighted advantage, as w >= 0. Every map is the identity to first order at log-ratio 0, so `on_policy_coefficients`
serves them all; GSPO's Jacobian there is the mean over the trajectory, which is the identity on weighted advantages
that are the same for all tokens of a trajectory, the ones it is defined for.

Ratios are float64. Those of PpoClip and TrulyPpo are unbounded, as in the papers: a token of negative advantage whose
ratio has grown adds r A to J and c = w A r, e^200 at 200 nats. FiberPO and Apc are bounded. Exponents are cut at
`LARGEST_EXPONENT`; a coefficient beyond the range of its dtype becomes its largest number.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..fields import check, setting
from .hierarchy import Hierarchy

LARGEST_EXPONENT = 500.0


@dataclass(frozen=True, eq=False)
class Gated:
    """A map G at the tokens of this rank, float64 [T], and its derivatives in the form
    dG_i / d ell_j = diagonal_i [i = j] + left_i right_j [same cell, and i != j if `others_only`]
    """

    ratio: Tensor  # G_i
    diagonal: Tensor
    clipped: Tensor  # bool: the gate has cut the token's own ratio
    left: Tensor | None = None  # None, as `right`, for a map that couples no tokens
    right: Tensor | None = None
    others_only: bool = False


class RatioGating(Protocol):
    """A map G that is a function of each token's log-ratio and of one sum over the tokens of its cell of `stratum`."""

    @property
    def stratum(self) -> str | None:
        """The stratum whose cells couple tokens; None for a map that acts token by token."""

    def feature(self, x: Tensor, positive: Tensor, count: Tensor) -> Tensor:
        """What is summed over a cell, from log-ratios, whether the advantage is >= 0, and the token counts of cells."""

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        """G from the log-ratios, whether the advantage is >= 0, and each token's cell's sum and count."""


class _Checked:
    """Refuses wrong arguments, ValueError by name."""

    _below_one: ClassVar[tuple[str, ...]] = ()  # distances of a clip below the ratio 1

    def __post_init__(self) -> None:
        for name in self._below_one:
            value = getattr(self, name)
            if isinstance(value, int | float) and 1.0 < value < float("inf"):
                raise ValueError(
                    f"{name}: must be at most 1, since a ratio is at least 0 = 1 - 1, got {float(value)!r}"
                )
        check(self)
        if getattr(self, "stratum", None) == "":
            raise ValueError("stratum: must be the name of a stratum, got ''")


class _TokenWise(_Checked):
    """A map that couples no tokens."""

    stratum: ClassVar[str | None] = None

    def feature(self, x: Tensor, positive: Tensor, count: Tensor) -> Tensor:
        raise AssertionError("a token-wise map sums nothing")


def _exp(x: Tensor) -> Tensor:
    return x.clamp_max(LARGEST_EXPONENT).exp()


@dataclass(frozen=True)
class PpoClip(_TokenWise):
    """The clip of PPO and GRPO (C.4), with low = high in the papers and low < high as DAPO's clip-higher.

        use_min   G_i = min(r_i, 1 + high) where A_i >= 0,   max(r_i, 1 - low) where A_i < 0
        else      G_i = clip(r_i, 1 - low, 1 + high)

    Schulman et al. 2017, arXiv 1707.06347, (7); Shao et al. 2024, arXiv 2402.03300; Yu et al. 2025, arXiv 2503.14476.
    There is no dual clip: max(r, 1 - low) has no upper bound.
    """

    _below_one: ClassVar[tuple[str, ...]] = ("low",)

    low: float = setting(above=0, at_most=1)
    """Clip of the ratio from below, at 1 - `low`."""

    high: float = setting(above=0)
    """Clip of the ratio from above, at 1 + `high`."""

    use_min: bool = setting(True)
    """Whether PPO's minimum is taken. `false`: the ratio is clipped whatever the sign of the advantage."""

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        ratio, low, high = _exp(x), 1.0 - self.low, 1.0 + self.high
        above, below = ratio > high, ratio < low
        clipped = torch.where(positive, above, below) if self.use_min else above | below
        gated = torch.where(clipped, ratio.clamp(low, high), ratio)
        return Gated(gated, torch.where(clipped, 0.0, ratio), clipped)


@dataclass(frozen=True)
class Gspo(_Checked):
    """Sequence-level clip (C.5) of the geometric mean of a trajectory's ratios, the same for all of its tokens.

        s_tau = exp( (1 / T_tau) sum_{i in tau} ell_i ),     G_i = PpoClip's gate of s_tau instead of r_i

    Zheng et al. 2025, arXiv 2507.18071, who clip at 3e-4 below and 4e-4 above. |log s_tau| <= eps bounds the sample's
    KL_tau by eps, and in expectation TV_tau by sqrt(eps / 2) (Claim 3.5). The sign is that of each token's own
    advantage; in GSPO it is one per trajectory.
    """

    _below_one: ClassVar[tuple[str, ...]] = ("low",)

    low: float = setting(above=0, at_most=1)
    """Clip of the ratio from below, at 1 - `low`."""

    high: float = setting(above=0)
    """Clip of the ratio from above, at 1 + `high`."""

    use_min: bool = setting(True)
    """Whether PPO's minimum is taken. `false`: the ratio is clipped whatever the sign of the advantage."""

    stratum: str = setting("trajectory")
    """Stratum whose cells are clipped as one; an active one of the hierarchy."""

    def feature(self, x: Tensor, positive: Tensor, count: Tensor) -> Tensor:
        return x

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        whole = PpoClip(self.low, self.high, self.use_min).gate(total / count, positive, total, count)
        return Gated(whole.ratio, torch.zeros_like(x), whole.clipped, left=whole.diagonal, right=1.0 / count)


@dataclass(frozen=True)
class TrulyPpo(_TokenWise):
    """PPO with rollback: beyond the clip the gate falls with slope -alpha instead of staying flat.

        F(r) = -alpha r + (1 + alpha)(1 + eps)   r >= 1 + eps
             = -alpha r + (1 + alpha)(1 - eps)   r <= 1 - eps
             = r                                 between
        use_min   G_i A_i = min(r_i A_i, F(r_i) A_i): F beyond 1 + eps where A_i >= 0 and beyond 1 - eps where A_i < 0
        else      G_i = F(r_i)

    Wang et al. 2019, Truly Proximal Policy Optimization, arXiv 1903.07940, there PPO-RB.
    """

    _below_one: ClassVar[tuple[str, ...]] = ("eps",)

    eps: float = setting(above=0, at_most=1)
    """Clip of the ratio, at 1 - `eps` and 1 + `eps`."""

    alpha: float = setting(above=0)
    """Slope with which the objective falls beyond the clip."""

    use_min: bool = setting(True)
    """Whether PPO's minimum is taken. `false`: the ratio is gated whatever the sign of the advantage."""

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        ratio, low, high = _exp(x), 1.0 - self.eps, 1.0 + self.eps
        above, below = ratio >= high, ratio <= low
        clipped = torch.where(positive, above, below) if self.use_min else above | below
        rolled = (1.0 + self.alpha) * ratio.clamp(low, high) - self.alpha * ratio
        diagonal = torch.where(clipped, -self.alpha * ratio, ratio)
        return Gated(torch.where(clipped, rolled, ratio), diagonal, clipped)


@dataclass(frozen=True)
class Apc(_Checked):
    """Aggregational policy censoring, APC-Obj (3), (57)-(63): a budget of total variation that a cell's tokens share.

        Delta_i = r_i - 1,     B = 2 n delta,     C1_i = sum_{j in cell, j != i} |Delta_j|,     n tokens in the cell
        G_i = 1 + clip( Delta_i, +-[B - C1_i]_+ )
        pass (61)       |Delta_i| <= B - C1_i            G_i = r_i: the cell's TV, C1 + |Delta_i| = 2 n TV, is in budget
        rollback (62)   |Delta_i| > B - C1_i > 0         G_i = 1 + sgn(Delta_i)(B - C1_i): falls as the others drift
        zeroed (63)     C1_i >= B                        G_i = 1: the others have used the budget up

    stratum   the cells. States, (3): a stratum with a label per state. With an autoregressive policy a state is the
              whole prefix (`prefix_state_labels`), so nearly all states are seen once; then n = 1 and C1 = 0, and the
              map is a per-token clip, 1 + clip(r - 1, +-2 delta). Trajectories: where the paper moves the budget then
    delta     the radius, > 0. The paper's delta_A = (1 - gamma) cbar / (8 gamma |A|_inf) is 0 at gamma = 1, as in the
              training of language models, where nothing would move; a number instead of it is the paper's relaxation
    space     `ratio` as above; `log`: Delta_i = ell_i and G_i = exp(clip(...)), where FiberPO starts (E.5). The paper's
              prose does not fix which of the two it calls the relaxation

    No minimum and no sign of A: the censoring depends on the ratios only. Bounded by |G - 1| <= B (log: |log G|).
    """

    delta: float = setting(above=0)
    """Radius: the mean total variation that the tokens of a cell share."""

    stratum: str = setting("trajectory")
    """Stratum whose cells share the budget; an active one of the hierarchy. With `state` this is APC-Obj at the level
    of states, see `hierarchy=state`."""

    space: str = setting("ratio", choices=("ratio", "log"))
    """What is budgeted: the deviation r - 1 of the ratio, or its logarithm."""

    def _deviation(self, x: Tensor) -> Tensor:
        return x if self.space == "log" else x.clamp_max(LARGEST_EXPONENT).expm1()

    def feature(self, x: Tensor, positive: Tensor, count: Tensor) -> Tensor:
        # A token beyond B zeroes all others whatever its size, and what is left of C1 after subtracting one of e^200
        # would be rounding. At 2 B it still zeroes them when the sum has been rounded.
        return torch.minimum(self._deviation(x).abs(), 4.0 * self.delta * count)

    def gate(self, x: Tensor, positive: Tensor, total: Tensor, count: Tensor) -> Gated:
        deviation = self._deviation(x)
        others = (total - self.feature(x, positive, count)).clamp_min(0.0)
        room = (2.0 * self.delta * count - others).clamp_min(0.0)
        passes = (deviation.abs() <= room) & (room > 0.0)
        sign = deviation.sign()
        clipped = torch.where(passes, deviation, sign * room)
        ratio, one = _exp(clipped) if self.space == "log" else 1.0 + clipped, torch.ones_like(x)
        outer, inner = (ratio, one) if self.space == "log" else (one, _exp(x))  # dG / d clipped, d Delta / d ell
        diagonal = torch.where(passes, outer * inner, 0.0)
        left = torch.where(~passes & (room > 0.0), -sign * outer, 0.0)
        return Gated(ratio, diagonal, ~passes, left, right=sign * inner, others_only=True)


def check_gating(gating: RatioGating | None, hierarchy: Hierarchy, soft: Collection[str] = ()) -> None:
    """ValueError where the map couples the tokens of a stratum that is not an active one of the hierarchy, or whose
    cells are made from one of the columns `soft`, in which tokens have memberships instead of a label."""
    if gating is None or gating.stratum is None:
        return
    name, kind = gating.stratum, type(gating).__name__
    active = {stratum.name: stratum for stratum in hierarchy.active}
    if name not in active:
        raise ValueError(
            f"gating.stratum: {kind} acts on the cells of {name!r}, but the hierarchy's active strata are "
            f"{list(active)}; add it there"
        )
    if active[name].only:
        raise ValueError(
            f"gating.stratum: {name!r} is missing in parts of the tree (`only`); name one that every token has"
        )
    spread = set(active[name].columns) & set(soft)
    if spread:
        raise ValueError(
            f"gating.stratum: {name!r} spreads a token over several cells by its membership in {spread.pop()!r}; "
            f"{kind} needs each token in one: set membership: hard"
        )
