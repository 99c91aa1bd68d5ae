"""What the paper claims of its gates, and what PPO's minimum adds: force on a drift, surviving gradient, independence.

    python docs/figures/claims.py [folder]

No policy is trained: log-ratios are set, and the package's own coefficients dJ/dlogp are drawn. The slope of the
rollback is 8 instead of the token count, 32, so that its window can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from drawing import BLACK, BLUE, GREEN, ORANGE, RED, frame, new_figure, save
from torch import Tensor

import nemo_fiberpo as fpo

LENGTH = 32  # tokens of a trajectory
BUDGET = 0.24  # C+; drifts here are upward
SPREAD = 0.03  # standard deviation of a token's log-ratio around the drift of its trajectory
DRIFTS = torch.linspace(0.0, 3 * BUDGET, 145, dtype=torch.float64)


def hierarchy(gate: str, *names: str, slope: float | fpo.SlopeCap | None = 8.0) -> fpo.Hierarchy:
    """A chain of `names`, each with the same budgets and gate."""
    strata = [fpo.Stratum(name, fpo.Budget(BUDGET, BUDGET / 2), slope=slope, gate=gate) for name in names]
    return fpo.Hierarchy(tuple(strata), token_clip=0.2)


@dataclass(frozen=True)
class Objective:
    label: str
    style: dict[str, Any]
    hierarchy: fpo.Hierarchy
    gating: fpo.RatioGating | None = None
    use_min: bool = False

    def coefficients(self, log_ratio: Tensor, advantage: Tensor, **labels: Tensor) -> Tensor:
        """[T], N dJ/dlogp with weights 1/N: 1 for every token on-policy at advantage 1."""
        mask = torch.ones(len(log_ratio), dtype=torch.bool)
        cells = self.hierarchy.cells(labels, mask)
        result = fpo.surrogate(
            log_ratio, advantage / len(log_ratio), cells, self.hierarchy, gating=self.gating, use_min=self.use_min
        )
        return result.coefficients * len(log_ratio)


ROLLBACK, CLIP = hierarchy("rollback", "trajectory"), hierarchy("clip", "trajectory")
PAPER = Objective("FiberPO, the paper's", {"color": RED}, ROLLBACK)
MINIMUM = Objective("rollback, with the minimum", {"color": ORANGE, "linestyle": "--"}, ROLLBACK, use_min=True)
DEFAULT = Objective("clip, with the minimum", {"color": BLUE}, CLIP, use_min=True)
GRPO = Objective("GRPO", {"color": BLACK, "linestyle": ":"}, CLIP, gating=fpo.PpoClip(0.2, 0.2))
OBJECTIVES = (PAPER, MINIMUM, DEFAULT, GRPO)


def tokens(drift: float, seed: int = 0) -> Tensor:
    """Log-ratios of a trajectory, of mean `drift` to the last digit."""
    noise = torch.randn(LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * SPREAD
    return noise - noise.mean() + drift


def of_trajectory(objective: Objective, drift: float, advantage: float) -> Tensor:
    trajectory = torch.zeros(LENGTH, dtype=torch.int64)
    return objective.coefficients(tokens(drift), torch.full((LENGTH,), advantage).double(), trajectory=trajectory)


def force(objective: Objective, advantage: float) -> list[float]:
    """By drift, the push of an ascent step on a trajectory's mean log-ratio: above 0 further out, below 0 back."""
    return [float(of_trajectory(objective, float(drift), advantage).mean()) for drift in DRIFTS]


def survival(objective: Objective) -> list[float]:
    """By drift, the share of a trajectory's tokens with a coefficient that is not 0, advantages of both signs alike."""
    both = [
        [(of_trajectory(objective, float(drift), sign) != 0).double().mean() for drift in DRIFTS]
        for sign in (1.0, -1.0)
    ]
    return torch.tensor(both).mean(0).tolist()


def neighbour(objective: Objective, trajectories: int = 8) -> list[float]:
    """By drift of domain 0, the mean absolute coefficient of domain 1, which stays at half its budget."""
    trajectory = torch.arange(2 * trajectories).repeat_interleave(LENGTH)
    domain = trajectory // trajectories
    advantage = torch.where(trajectory % 2 == 0, 1.0, -1.0).double()
    still = torch.cat([tokens(BUDGET / 2, seed) for seed in range(trajectories)])
    names = {"domain": domain, "batch": torch.zeros_like(domain)}
    labels = {stratum.name: names[stratum.name] for stratum in objective.hierarchy.strata}
    out = []
    for drift in DRIFTS:
        moved = torch.cat([tokens(float(drift), seed) for seed in range(trajectories)])
        found = objective.coefficients(torch.cat([moved, still]), advantage, **labels)
        out.append(float(found[domain == 1].abs().mean()))
    return out


DOMAINS = Objective("a budget for each domain", {"color": BLUE}, hierarchy("clip", "domain"), use_min=True)
BATCH = Objective(
    "one budget for the batch", {"color": GREEN, "linestyle": "--"}, hierarchy("clip", "batch"), use_min=True
)


def draw() -> None:
    figure = new_figure(12, 8)
    (outward, inward), (survives, independent) = figure.subplots(2, 2)
    used = DRIFTS / BUDGET
    for objective in OBJECTIVES:
        style = {"linewidth": 1.8, "label": objective.label, **objective.style}
        outward.plot(used, force(objective, 1.0), **style)
        inward.plot(used, force(objective, -1.0), **style)
        survives.plot(used, survival(objective), **style)
    for objective in (DOMAINS, BATCH):
        independent.plot(used, neighbour(objective), linewidth=1.8, label=objective.label, **objective.style)
    x, push = "drift of the trajectory / its budget", "push on the drift"
    frame(outward, "(a) Advantage +1: the gradient drives the drift", x, push)
    frame(inward, f"(b) Advantage {chr(0x2212)}1: the gradient should pull it back", x, push)
    frame(survives, "(c) Tokens that still learn", x, "share of the tokens")
    frame(independent, "(d) The other domain", "drift of one domain / budget", "mean |coefficient| in the other")
    independent.set_ylim(bottom=0)
    for axes in (outward, inward):
        axes.axhline(0.0, color=BLACK, linewidth=0.6)
        axes.axvline(1.0, color=BLACK, linewidth=0.6, alpha=0.4)
    for axes in (inward, survives, independent):
        axes.legend(frameon=False, fontsize=9)
    save(figure, "claims.png")


if __name__ == "__main__":
    draw()
