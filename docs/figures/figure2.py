"""Figure 2: the aggregate gate (10), and the log base weight (8) while the drift of a trajectory grows.

    python docs/figures/figure2.py [folder]

The settings are those of the paper's caption: k = 2, and in (b) C+ = 0.20 and C- = 0.10. The path in (b) is ours: both
aggregates grow along the ray N = 1.1 P, which passes through the five named regimes.
"""

from __future__ import annotations

import itertools

import torch
from drawing import BLACK, BLUE, PASS, ROLLBACK, TINTS, ZEROED, frame, new_figure, save
from matplotlib.axes import Axes
from torch import Tensor

from nemo_fiberpo.diagnostics.regimes import GLOBAL_REGIMES, global_regimes
from nemo_fiberpo.objective.gates import aggregate_gate, zeroed_from

SLOPE = torch.tensor([2.0], dtype=torch.float64)
BUDGET = torch.tensor([[0.20], [0.10]], dtype=torch.float64)  # C+, C-
RAY = 1.1  # N / P along the path
END = 0.36  # of P


def on_ray(pos: Tensor) -> Tensor:
    """Signed channel means [2, n] at the aggregates (P, N) = (pos, 1.1 pos)."""
    return torch.stack([pos, -RAY * pos])


def log_base_weight(mean_2C: Tensor) -> Tensor:
    """log w of (8): the sum of the gated channel means."""
    return aggregate_gate(mean_2C, BUDGET, SLOPE)[0].sum(0)


def regime_names(mean_2C: Tensor) -> list[str]:
    return [GLOBAL_REGIMES[at] for at in global_regimes(mean_2C, BUDGET, SLOPE).tolist()]


def borders() -> dict[str, float]:
    """P on the ray where a channel reaches C or C*, in the order in which that happens."""
    (pos, neg), (pos_end, neg_end) = BUDGET[:, 0].tolist(), zeroed_from(BUDGET, SLOPE)[:, 0].tolist()
    return {"C-": neg / RAY, "C-*": neg_end / RAY, "C+": pos, "C+*": pos_end}


def draw_gate(axes: Axes) -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    drift = torch.linspace(-2.0, 2.0, 2001, dtype=torch.float64)
    zeroed = float(zeroed_from(one, SLOPE))
    ends = [1.0, zeroed, 2.0]
    for sign in (-1.0, 1.0):
        for low, high, tint in zip([0.0, *ends], ends, (PASS, ROLLBACK, ZEROED), strict=False):
            axes.axvspan(*sorted((sign * low, sign * high)), color=tint, linewidth=0)
    axes.axhline(0.0, color="0.3", linewidth=0.7)
    axes.plot([-1.15, 1.15], [-1.15, 1.15], color="0.55", linestyle=":", linewidth=1.2)
    axes.plot(drift, aggregate_gate(drift, one, SLOPE)[0], color=BLUE, linewidth=2.4)
    axes.annotate("", (1.0, -0.22), (zeroed, -0.22), arrowprops={"arrowstyle": "<->", "linewidth": 0.9})
    axes.text((1.0 + zeroed) / 2, -0.24, "width\n$C/k$", ha="center", va="top", fontsize=10)
    for x in (1.0, zeroed):
        axes.plot([x, x], [-0.3, 0.0], color=BLACK, linewidth=0.8)
    axes.text(0.41, 0.55, "slope 1", rotation=41, fontsize=10, ha="center", va="center")
    axes.text(1.31, 0.55, "slope $-k$", rotation=-63, fontsize=10, ha="center", va="center")
    for x, text in ((0.0, "pass-through\n$|x| \\leq C$"), (1.25, "rollback"), (1.75, "zeroed\n$|x| \\geq C_*$")):
        axes.text(x, 1.38, text, ha="center", va="top", fontsize=9.5)
    ticks = [-2.0, -zeroed, -1.0, 0.0, 1.0, zeroed, 2.0]
    axes.set_xticks(ticks, ["$-2C$", "$-C_*$", "$-C$", "0", "$C$", "$C_*$", "$2C$"])
    axes.set_yticks([-1.0, 0.0, 1.0], ["$-C$", "0", "$C$"])
    axes.set_xlim(-2.0, 2.0)
    axes.set_ylim(-1.15, 1.45)
    frame(axes, "(a) the gate of a cell's drift, k = 2", "drift x, here $C_* = C (1 + 1/k) = 1.5\\,C$", "$g(x; C, k)$")


def draw_base_weight(axes: Axes) -> None:
    pos = torch.linspace(0.0, END, 3601, dtype=torch.float64)
    at = borders()
    formulas = ("$P - N$", "$P - g(N)$", "$P$", "$g(P)$", "$0$")
    edges = [0.0, *at.values(), END]
    parts = zip(itertools.pairwise(edges), GLOBAL_REGIMES, formulas, TINTS, strict=False)
    for (low, high), name, formula, tint in parts:
        axes.axvspan(low, high, color=tint, linewidth=0)
        axes.text((low + high) / 2, 0.262, f"{name}\n{formula}", ha="center", va="top", fontsize=9.5, linespacing=1.5)
    axes.axhline(0.0, color="0.3", linewidth=0.7)
    weight = log_base_weight(on_ray(pos))
    axes.plot(pos, weight, color=BLUE, linewidth=2.4)
    corners = torch.tensor(list(at.values()), dtype=torch.float64)
    axes.plot(corners, log_base_weight(on_ray(corners)), "o", color=BLACK, markersize=5)
    axes.axhline(at["C+"], color="0.45", linewidth=0.8, linestyle=":")
    names = ("$N = C^-$", "$N = C_*^-$", "$P = C^+$", "$P = C_*^+$")
    axes.set_xticks([0.0, *at.values()], ["0", *names], fontsize=9)
    axes.set_yticks([0.0, 0.1, 0.2], ["0", "0.1", "0.2 = $C^+$"])
    axes.set_xlim(0.0, END)
    axes.set_ylim(-0.03, 0.27)
    frame(axes, "(b) the base weight along a ray of ours, N = 1.1 P", "drift of the trajectory", r"$\log w$")


def main() -> None:
    figure = new_figure(12.0, 4.4)
    left, right = figure.subplots(1, 2)
    draw_gate(left)
    draw_base_weight(right)
    save(figure, "figure2.png")


if __name__ == "__main__":
    main()
