"""Figure 4: one trajectory of ten tokens while its drift grows: ratios 1 + t Delta for t from 0 to 1.

    python docs/figures/figure4.py [folder]

Delta has mean 0, (65); every advantage has the sign of its token's Delta, and their mean is positive. The paper's
draw is not known: this one was chosen among many random ones because it comes close to the values reported there.
C+ = 0.12, C- = 0.05, k = 32, token clip 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from drawing import BLACK, BLUE, GREEN, ORANGE, RED, frame, new_figure, save, signed
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.drift import measure
from nemo_fiberpo.objective.fibration import gate_cells
from nemo_fiberpo.objective.named_regimes import GLOBAL_REGIMES, LOCAL_REGIMES, named_regimes, zeroed_from

DELTA = (-0.374, 0.247, 0.472, -0.472, 0.082, 0.204, 0.507, -0.480, 0.384, -0.570)
ADVANTAGE = (-1.69, 0.70, 0.73, -0.02, 0.96, 0.93, 1.46, -1.17, 0.56, -0.49)
BUDGET, SLOPE, TOKEN_CLIP = fpo.Budget(pos=0.12, neg=0.05), 32.0, 0.05
HIERARCHY = fpo.Hierarchy((fpo.Stratum("trajectory", BUDGET, slope=SLOPE),), TOKEN_CLIP)
ONE = HIERARCHY.cells({"trajectory": torch.zeros(len(DELTA), dtype=torch.int64)})


@dataclass(frozen=True)
class Course:
    """What happens over t, [n] each: aggregates P and N, log w, regimes, J, and J with the base weight held at 1."""

    t: Tensor
    pos: Tensor
    neg: Tensor
    log_weight: Tensor
    outer: Tensor
    local: Tensor
    value: Tensor
    without_weight: Tensor


def follow(steps: int = 1001) -> Course:
    """One trajectory per t, all in one batch; J is that of each of them alone."""
    t = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    log_ratio = torch.log1p(t[:, None] * torch.tensor(DELTA, dtype=torch.float64))
    rows = torch.arange(steps).repeat_interleave(len(DELTA))
    cells = HIERARCHY.cells({"trajectory": rows}, shape=(steps, len(DELTA)))
    gates = gate_cells(measure(log_ratio.flatten(), cells), cells, HIERARCHY)
    (regimes,) = named_regimes(log_ratio.flatten(), cells, HIERARCHY)
    log_weight = gates.value[0].sum(0)

    weighted = fpo.token_weights(ONE) * torch.tensor(ADVANTAGE, dtype=torch.float64)
    gated = fpo.gated_log_ratio(log_ratio.flatten(), cells, HIERARCHY).view(steps, -1)
    value, without_weight = (power.exp() @ weighted for power in (gated, gated - log_weight[:, None]))
    mean = gates.drift.mean[0]
    return Course(t, mean[0], -mean[1], log_weight, regimes.global_C, regimes.local_C, value, without_weight)


def events(course: Course) -> dict[str, float]:
    """The first t of each event, in the order in which they are expected."""
    names = ("G-II,r", "G-II", "G-III,r", "G-III")
    reached = {"first eps clip": course.local >= LOCAL_REGIMES.index("L-II")}
    labels = ("C- onset", "C-*", "C+ onset", "C+*")
    reached |= {label: course.outer >= GLOBAL_REGIMES.index(name) for label, name in zip(labels, names, strict=True)}
    return {label: float(course.t[where.nonzero()[0, 0]]) for label, where in reached.items()}


SHOWN = {
    "first eps clip": ("first $\\epsilon$\nclip", GREEN, ":", -1),
    "C- onset": ("$C^-$", BLACK, "--", -1),
    "C-*": ("$C_*^-$", BLACK, "-", 1),
    "C+ onset": ("$C^+$", RED, "--", -1),
    "C+*": ("$C_*^+$", RED, "-", 1),
}


def main() -> None:
    course = follow()
    happened = events(course)
    figure = new_figure(9.0, 8.2)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for axes in (top, middle, bottom):
        for name, at in happened.items():
            _, colour, dash, _ = SHOWN[name]
            axes.axvline(at, color=colour, linestyle=dash, linewidth=0.9, alpha=0.8)

    top.plot(course.t, course.pos, color=ORANGE, linewidth=2.0, label="P, upward")
    top.plot(course.t, course.neg, color=BLACK, linewidth=2.0, linestyle=(0, (4, 2)), label="N, downward")
    slope = torch.tensor(SLOPE)
    for name, budget, colour in (("+", BUDGET.pos, ORANGE), ("-", BUDGET.neg, BLACK)):
        high = float(zeroed_from(torch.tensor(budget), slope))
        top.axhspan(budget, high, color=colour, alpha=0.35, linewidth=0)
        top.text(1.005, budget, f"$C^{name}$ to $C_*^{name}$", fontsize=9, va="center")
    for name, at in happened.items():
        text, colour, _, side = SHOWN[name]
        where = "right" if side < 0 else "left"
        label = f"{text} {at:.3f}"
        height = 0.16 if name == "first eps clip" else 0.205
        top.annotate(label, (at, height), (3 * side, 0), textcoords="offset points", ha=where, fontsize=9, color=colour)
    top.set_ylim(0.0, 0.22)
    top.legend(loc="center", bbox_to_anchor=(0.45, 0.75), frameon=False, fontsize=9.5)
    frame(top, "aggregate drift of the trajectory", "", "nats per token")

    middle.plot(course.t, course.log_weight, color=BLUE, linewidth=2.0)
    peak = int(course.log_weight.argmax())
    at = (float(course.t[peak]), float(course.log_weight[peak]))
    middle.annotate(f"peak {signed(at[1])}", at, (-8, -3), textcoords="offset points", ha="right", fontsize=9.5)
    frame(middle, "log base weight", "", r"$\log w$")

    bottom.plot(course.t, course.value, color=BLUE, linewidth=2.0, label="J")
    bottom.plot(course.t, course.without_weight, color=RED, linewidth=1.3, linestyle=(0, (4, 2)), label="J with w = 1")
    marks = [0, int((course.t - happened["C- onset"]).abs().argmin()), int(course.value.argmax()), len(course.t) - 1]
    for index, offset in zip(marks, ((10, -4), (-8, 4), (-8, 2), (-2, 7)), strict=True):
        x, y = float(course.t[index]), float(course.value[index])
        bottom.plot([x], [y], "o", color=BLACK, markersize=5)
        ha = "right" if offset[0] < 0 else "left"
        bottom.annotate(f"{y:.3f}", (x, y), offset, textcoords="offset points", ha=ha, fontsize=9.5)
    bottom.set_ylim(0.18, 0.33)
    bottom.legend(loc="lower right", frameon=False, fontsize=9.5)
    frame(bottom, "objective of the trajectory", r"scale $t$ of the drift: ratios $1 + t\,\Delta$", "J")
    bottom.set_xlim(0.0, 1.0)
    save(figure, "figure4.png")


if __name__ == "__main__":
    main()
