"""Token weights that correct for responses sampled by another program than the one being trained.

With the same weights, an engine such as TensorRT-LLM or vLLM computes slightly different log-probs than the trainer.
With d_j = log pi_old(j) - log pi_rollout(j), both of the weights that sampled, rho_j = exp(d_j) and the live tokens tau
of a trajectory, a token's weighted advantage is multiplied by the constant

    tis             min(rho_j, high)                        truncated importance sampling
    icepop          rho_j [low <= rho_j <= high]            IcePop
    sequence_mask   rho_j [low <= rho_tau <= high],         rho_tau = exp( (1 / T_tau) sum_{j in tau} d_j )

and without `keep_weight` by the bracket alone. `sequence_ratio: extremes` asks instead that every token of the
trajectory has low <= rho_j <= high. A token that is masked stays in its cells and in the denominators: it has drifted
like the others, and the papers divide by all tokens.

Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (tis); Ling Team 2025, Every
Step Evolves, arXiv 2510.18855 (icepop); NeMo-RL's `seq-mask-tis`, verl's `seq_mean_k1` (geometric mean).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fields import check, setting
from .inputs import checked
from .sharing import Cells, Reduce, SharedCells, sum_nodes

KINDS = ("none", "tis", "icepop", "sequence_mask")
_BOUNDS = {"tis": ("high",), "icepop": ("low", "high"), "sequence_mask": ("low", "high")}
_USUAL = {"tis": "2", "icepop": "0.5 and 5", "sequence_mask": "0.999 and 1.002 for the geometric mean"}


@dataclass(frozen=True)
class RolloutCorrection:
    """Constant weights on tokens, for the mismatch between the engine that samples responses and the model that is
    trained. rho = pi_old / pi_rollout, both with the weights that sampled; `docs/method.md` has the formulas."""

    kind: str = setting("none", choices=KINDS)
    """`tis`: a token's weight is min(rho, high). `icepop`: tokens with rho outside [low, high] are masked.
    `sequence_mask`: trajectories with `sequence_ratio` outside [low, high] are masked. Masked tokens have weight 0 in
    the loss; they stay in cells and denominators."""

    low: float | None = setting(None, above=0)
    """Smallest ratio that is not masked. Required for `icepop` and `sequence_mask`, and only there."""

    high: float | None = setting(None, above=0)
    """Largest ratio that is not masked; for `tis` the largest weight. Required unless `kind` is `none`."""

    keep_weight: bool = setting(True)
    """Whether tokens that are not masked keep the weight rho; `false`: 1. Not for `tis`."""

    sequence_ratio: str = setting("geometric_mean", choices=("geometric_mean", "extremes"))
    """For `sequence_mask`: the geometric mean of a trajectory's ratios, or its smallest and its largest, so that one
    token masks its trajectory."""

    def __post_init__(self) -> None:
        check(self)
        wanted = _BOUNDS.get(self.kind, ())
        for name in ("low", "high"):
            given = getattr(self, name) is not None
            if given and name not in wanted:
                raise ValueError(f"{name}: is not for kind {self.kind}; leave it out")
            if name in wanted and not given:
                raise ValueError(f"{name}: is required for kind {self.kind}; usual are {_USUAL[self.kind]}")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low: {self.low:g} must be smaller than high = {self.high:g}")
        if self.kind == "tis" and not self.keep_weight:
            raise ValueError("keep_weight: false is not for kind tis, which consists of weights only; use icepop")
        if self.kind != "sequence_mask" and self.sequence_ratio != "geometric_mean":
            raise ValueError(f"sequence_ratio: is for kind sequence_mask, got {self.sequence_ratio} with {self.kind}")

    @property
    def active(self) -> bool:
        return self.kind != "none"


@dataclass(frozen=True, eq=False)
class Corrected:
    """Weights of this rank's tokens, float64 [T], 0 at tokens that the batch masks; and `sums`, float64 [4], which a
    host adds up over the ranks and minibatches for `correction_metrics`."""

    weight: Tensor
    sums: Tensor


def correction_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    trajectories: Cells | SharedCells,
    correction: RolloutCorrection,
    reduce: Reduce | None = None,
) -> Corrected:
    """The weights of a correction that is active, to multiply weighted advantages by.

    Args
        old_log_probs      [T], of the model that is trained, with the weights that sampled
        rollout_log_probs  [T], as the engine gave them
        trajectories       cells with a level "trajectory", as for `token_weights`
        reduce             needed where several ranks hold tokens of one trajectory, as with context parallelism

    A log-prob that is not finite on a live token makes its weight NaN, which the objective refuses on every rank. SPMD:
    sharded like the tokens. One call of `reduce` for `sequence_mask`, whatever the ranks hold, none for the others.
    """
    cells = checked(
        trajectories, None, old_log_probs=old_log_probs.detach(), rollout_log_probs=rollout_log_probs.detach()
    )
    layout = cells.layout
    d = layout.masked(old_log_probs.detach().double() - rollout_log_probs.detach().double())
    assert correction.high is not None, "a correction that is active has a bound"
    low, high = -math.inf if correction.low is None else math.log(correction.low), math.log(correction.high)
    if correction.kind == "tis":
        touched = d > high
        weight = torch.where(touched, correction.high, d.clamp_max(high).exp())
    else:
        outside = (d < low) | (d > high)
        touched = outside if correction.kind == "icepop" else _of_trajectories(d, outside, cells, correction, reduce)
        weight = torch.where(touched, 0.0, d.exp() if correction.keep_weight else torch.ones_like(d))
    weight = layout.masked(torch.where(d.isfinite(), weight, math.nan))
    live = layout.masked(torch.ones_like(d))
    return Corrected(weight, torch.stack([live.sum(), (live * touched).sum(), d.abs().sum(), weight.sum()]))


def _of_trajectories(
    d: Tensor, outside: Tensor, cells: SharedCells, correction: RolloutCorrection, reduce: Reduce | None
) -> Tensor:
    """Whether each token's trajectory is masked, bool [T]."""
    level, mean = cells.hard_level("trajectory"), correction.sequence_ratio == "geometric_mean"
    own_C = level.sums(cells.layout.sum_tokens(d if mean else outside.double()))
    # The rider: a buffer is not empty on any rank.
    (total_C,), _ = sum_nodes([(level.slots, own_C)], reduce, {"rider": d.new_zeros(1)})
    if mean:
        assert correction.low is not None and correction.high is not None
        mean_C = total_C / level.count_C.clamp_min(1.0)
        masked_C = (mean_C < math.log(correction.low)) | (mean_C > math.log(correction.high))
    else:
        masked_C = total_C > 0
    return cells.layout.at_tokens(level.at(masked_C.double())) > 0.5


def correction_metrics(sums: Tensor) -> Mapping[str, Tensor]:
    """Of `Corrected.sums` over all ranks: the share of live tokens that were truncated or masked, the mean of
    |log pi_old - log pi_rollout|, and the mean weight."""
    live = sums[0].clamp_min(1.0)
    return {"touched": sums[1] / live, "abs_log_ratio": sums[2] / live, "mean_weight": sums[3] / live}
