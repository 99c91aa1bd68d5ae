"""Figure 3: the named regimes of a trajectory of three tokens, T = 3, C+ = 0.15, C- = 0.09, k = T.

    python docs/figures/figure3.py [folder]

Ratios are 1 + Delta with Delta of mean 0, as the identity (65) has it, so they fill a plane.
"""

from __future__ import annotations

import math

import torch
from drawing import BLACK, TINTS, frame, new_figure, save
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.named_regimes import GLOBAL_REGIMES, LOCAL_REGIMES, global_regimes, named_regimes

BUDGET = fpo.Budget(pos=0.15, neg=0.09)
TOKEN_CLIP = 0.03  # the paper's is not known
TOKENS = 3
HIERARCHY = fpo.Hierarchy((fpo.Stratum("trajectory", BUDGET),), TOKEN_CLIP)
LOCAL_TINTS = ("#FFFFFF", "#A9D2EE", "#6FB1DC")
# unit vectors of the plane of mean 0 in the space of the three deviations
AXES = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
AXES /= AXES.norm(dim=1, keepdim=True)
ACROSS = r"$(\Delta_1 - \Delta_2) / \sqrt{2}$"
UP = r"$(\Delta_1 + \Delta_2 - 2 \Delta_3) / \sqrt{6}$"


def regimes_of(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Global and local regime of trajectories with ratios 1 + delta, [n, 3] -> [n] each."""
    rows = torch.arange(len(delta)).repeat_interleave(TOKENS)
    cells = HIERARCHY.cells({"trajectory": rows}, shape=(len(delta), TOKENS))
    (found,) = named_regimes(torch.log1p(delta).flatten(), cells, HIERARCHY)
    return found.global_C, found.local_C


def plane(extent: float, steps: int) -> tuple[Tensor, Tensor]:
    """Deviations [steps * steps, 3] on a grid of the plane, and the grid's axis."""
    axis = torch.linspace(-extent, extent, steps, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1) @ AXES, axis


def shade(axes: Axes, across: Tensor, up: Tensor, index: Tensor, tints: tuple[str, ...]) -> None:
    """Areas by index; nothing where it is not a number."""
    image = index.double().view(len(up), len(across))
    colours = ListedColormap(tints)
    axes.pcolormesh(across, up, image, cmap=colours, vmin=-0.5, vmax=len(tints) - 0.5, shading="nearest")


def draw_aggregates(axes: Axes) -> None:
    """Regimes over the two aggregates, and where random trajectories lie."""
    across, up = (torch.linspace(0.0, end, 501, dtype=torch.float64) for end in (0.5, 0.25))
    pos, neg = torch.meshgrid(up, across, indexing="ij")
    budget = torch.tensor([[BUDGET.pos], [BUDGET.neg]], dtype=torch.float64)
    slope = torch.tensor([float(TOKENS)], dtype=torch.float64)
    shade(axes, across, up, global_regimes(torch.stack([pos.flatten(), -neg.flatten()]), budget, slope), TINTS)
    delta = torch.rand(3000, TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = 2.0 * (delta - delta.mean(1, keepdim=True))
    ell = torch.log1p(delta[delta.min(1).values > -0.95])
    axes.plot(-ell.clamp_max(0.0).mean(1), ell.clamp_min(0.0).mean(1), ".", color="0.25", markersize=1.6)
    axes.plot([0.0, 0.25], [0.0, 0.25], color=BLACK, linewidth=1.0)
    axes.text(0.19, 0.222, "N = P", fontsize=9.5, ha="right")
    axes.text(0.008, 0.175, "not reached\nby ratios of\nmean 1", fontsize=9)
    places = ((0.045, 0.01), (0.105, 0.025), (0.3, 0.06), (0.24, 0.172), (0.34, 0.225))
    for (x, y), name in zip(places, GLOBAL_REGIMES, strict=False):
        axes.text(x, y, name, ha="center", fontsize=10)
    axes.set_xticks([0.0, 0.09, 0.12, 0.3, 0.5], ["0", "$C^-$\n0.09", "$C_*^-$\n0.12", "0.3", "0.5"])
    axes.set_yticks([0.0, 0.15, 0.20, 0.25], ["0", "$C^+$ 0.15", "$C_*^+$ 0.20", "0.25"])
    for tick, side in zip(axes.get_xticklabels()[1:3], ("right", "left"), strict=True):
        tick.set_horizontalalignment(side)
    axes.set_xlim(0.0, 0.5)
    axes.set_ylim(0.0, 0.25)
    frame(axes, "(a) regimes over the two aggregates", r"N = $\log s^-$", r"P = $\log s^+$")


def draw_plane(axes: Axes) -> None:
    """Regimes in the plane of deviations: rings."""
    delta, axis = plane(1.05, 600)
    inside = delta.min(1).values > -1.0
    regime = torch.full((len(delta),), math.nan, dtype=torch.float64)
    regime[inside] = regimes_of(delta[inside])[0].double()
    shade(axes, axis, axis, regime, TINTS)
    for token in range(TOKENS):
        x, y = (AXES[:, token] / AXES[:, token].norm()).tolist()
        axes.plot([0.0, 0.88 * x], [0.0, 0.88 * y], color="0.35", linewidth=0.7, linestyle=":")
        axes.text(0.97 * x, 0.97 * y, rf"$\Delta_{token + 1}$", ha="center", va="center", fontsize=10)
    handles = [Patch(color=tint, label=name) for tint, name in zip(TINTS, GLOBAL_REGIMES[:5], strict=False)]
    axes.legend(handles=handles, loc="lower left", fontsize=9, frameon=False, handlelength=1.1)
    axes.set_aspect("equal")
    frame(axes, r"(b) all ratios $1 + \Delta$ of mean 1", ACROSS, UP)


def draw_local(axes: Axes) -> None:
    """The middle of (b), with the local regimes inside G-I."""
    delta, axis = plane(0.34, 500)
    outer, local = regimes_of(delta)
    shade(axes, axis, axis, torch.where(outer == 0, local, len(LOCAL_TINTS) + outer), (*LOCAL_TINTS, *TINTS))
    axes.contour(axis, axis, outer.view(len(axis), -1), levels=[0.5, 1.5], colors=BLACK, linewidths=0.9)
    parts = [(f"G-I, {name}", tint) for name, tint in zip(LOCAL_REGIMES, LOCAL_TINTS, strict=True)]
    parts += [(GLOBAL_REGIMES[at], TINTS[at]) for at in (1, 2)]
    handles = [Patch(facecolor=tint, edgecolor="0.6", label=name) for name, tint in parts]
    axes.legend(handles=handles, loc="upper right", fontsize=8.5, framealpha=0.9, handlelength=1.1)
    axes.set_aspect("equal")
    frame(axes, rf"(c) the middle of (b), $\epsilon$ = {TOKEN_CLIP:g}", ACROSS, UP)


def main() -> None:
    figure = new_figure(14.0, 4.7)
    first, second, third = figure.subplots(1, 3)
    draw_aggregates(first)
    draw_plane(second)
    draw_local(third)
    save(figure, "figure3.png")


if __name__ == "__main__":
    main()
