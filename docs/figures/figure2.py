"""Figure 2: the aggregate gate (10), and the base weight (8) while the drift of a trajectory grows.

    python docs/figures/figure2.py [folder]

(b) has five points on one ray N = 1.1 P, one in each named regime, with k = 2, C+ = 0.20 and C- = 0.12.
"""

from __future__ import annotations

import itertools

import torch
from drawing import (
    BLACK,
    BLUE,
    ORANGE,
    PASS,
    RED,
    ROLLBACK,
    TINTS,
    ZEROED,
    frame,
    new_figure,
    save,
    signed,
)
from matplotlib.axes import Axes
from torch import Tensor

from nemo_fiberpo.objective.gates import aggregate_gate
from nemo_fiberpo.objective.named_regimes import GLOBAL_REGIMES, global_regimes, zeroed_from

SLOPE = torch.tensor([2.0], dtype=torch.float64)
BUDGET = torch.tensor([[0.20], [0.12]], dtype=torch.float64)
RATIO = 1.1  # N / P along the ray
POINTS = torch.tensor([0.10, 0.140625, 0.20, 0.24, 0.33], dtype=torch.float64)  # P, one point per regime


def on_ray(pos: Tensor) -> Tensor:
    """Signed channel means [2, n] at the aggregates (P, N) = (pos, 1.1 pos)."""
    return torch.stack([pos, -RATIO * pos])


def log_base_weight(mean_2C: Tensor) -> Tensor:
    """log w of (8): the sum of the gated channel means."""
    return aggregate_gate(mean_2C, BUDGET, SLOPE)[0].sum(0)


def values() -> list[tuple[str, float]]:
    """Regime and log w of the five points."""
    mean = on_ray(POINTS)
    names = [GLOBAL_REGIMES[at] for at in global_regimes(mean, BUDGET, SLOPE).tolist()]
    return list(zip(names, log_base_weight(mean).tolist(), strict=True))


def draw_gate(axes: Axes) -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    drift = torch.linspace(-2.0, 2.0, 2001, dtype=torch.float64)
    ends = [1.0, float(zeroed_from(one, SLOPE)), 2.0]
    for sign in (-1.0, 1.0):
        for low, high, tint in zip([0.0, *ends], ends, (PASS, ROLLBACK, ZEROED), strict=False):
            axes.axvspan(*sorted((sign * low, sign * high)), color=tint, linewidth=0)
    axes.plot(drift, drift, color="0.55", linestyle=":", linewidth=1.2)
    for slope, colour, dash in ((32.0, ORANGE, (0, (4, 2))), (8.0, RED, "-."), (2.0, BLUE, "-")):
        value = aggregate_gate(drift, one, torch.tensor(slope, dtype=torch.float64))[0]
        axes.plot(
            drift, value, color=colour, linestyle=dash, linewidth=2.4 if slope == 2 else 1.3, label=f"k = {slope:g}"
        )
    for x, text in zip(ends[:2], ("$C$", "$C_*$"), strict=True):
        axes.text(x, -0.2, text, ha="center", fontsize=11)
        axes.plot([x, x], [-0.06, 0.06], color=BLACK, linewidth=1.2)
    axes.annotate("", (1.0, 1.1), (ends[1], 1.1), arrowprops={"arrowstyle": "<->", "linewidth": 0.8})
    axes.text(1.25, 1.13, "$C/k$", ha="center", fontsize=9.5)
    axes.text(1.95, -0.5, "$C_* = C(1 + 1/k)$\nmarked for k = 2", ha="right", fontsize=9.5)
    axes.annotate("slope 1", (0.42, 0.5), rotation=38, fontsize=9.5, ha="center")
    axes.annotate("slope $-k$", (1.34, 0.62), fontsize=9.5, color=BLUE)
    for x, text in ((0.0, "pass-through"), (1.25, "rollback"), (1.75, "zeroed")):
        axes.text(x, 1.31, text, ha="center", fontsize=9.5)
    axes.axhline(0.0, color="0.3", linewidth=0.7)
    axes.set_xlim(-2.0, 2.0)
    axes.set_ylim(-1.2, 1.42)
    axes.legend(loc="lower right", frameon=False, fontsize=9.5)
    frame(
        axes,
        "(a) the gate g(x; C, k) of a cell's drift",
        "drift x of the cell beyond its parent's, in units of C",
        "g / C",
    )


def draw_base_weight(axes: Axes) -> None:
    pos = torch.linspace(0.0, 0.36, 3601, dtype=torch.float64)
    mean = on_ray(pos)
    regime = global_regimes(mean, BUDGET, SLOPE)
    starts = [0, *(1 + torch.nonzero(regime.diff()).squeeze(1)).tolist(), len(pos) - 1]
    for low, high in itertools.pairwise(starts):
        at = int(regime[low])
        axes.axvspan(float(pos[low]), float(pos[high]), color=TINTS[at], linewidth=0)
        axes.text(float(pos[low] + pos[high]) / 2, 0.235, GLOBAL_REGIMES[at], ha="center", fontsize=9.5)
    axes.plot(pos, log_base_weight(mean), color=BLUE, linewidth=2.4)
    for x, (_, value) in zip(POINTS.tolist(), values(), strict=True):
        axes.plot([x], [value], "o", color=BLACK, markersize=6)
        offset = (7, 6) if value > 0 else (-12, -16) if value < 0 else (-3, 7)
        axes.annotate(signed(value), (x, value), offset, textcoords="offset points", fontsize=10)
    axes.axhline(0.0, color="0.3", linewidth=0.7)
    ends = torch.cat([BUDGET, zeroed_from(BUDGET, SLOPE)], 1)  # [2, 2]: pos, neg by C, C*
    where = {"$C^-$": ends[1, 0] / RATIO, "$C_*^-$": ends[1, 1] / RATIO}
    where |= {"$C^+$": ends[0, 0], "$C_*^+$": ends[0, 1]}
    axes.set_xticks([0.0, *map(float, where.values())], ["0", *where])
    axes.set_xlim(0.0, 0.36)
    axes.set_ylim(-0.035, 0.26)
    frame(
        axes,
        "(b) log base weight along a ray, N = 1.1 P, k = 2",
        "aggregate P; at $C^-$ and $C_*^-$ it is N that passes its border",
        r"$\log w$",
    )


def main() -> None:
    figure = new_figure(12.0, 4.4)
    left, right = figure.subplots(1, 2)
    draw_gate(left)
    draw_base_weight(right)
    save(figure, "figure2.png")


if __name__ == "__main__":
    main()
