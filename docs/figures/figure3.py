"""Figure 3: the named regimes of a trajectory of three tokens whose ratios have mean 1, as (65) has it.

    python docs/figures/figure3.py [folder]

The settings are those of the paper's caption: T = 3, eps = 0.025, C+ = 0.15, C- = 0.09, k = 3, so C* = (1 + 1/3) C;
(a) the local regimes within 0.18 of the centroid, (b) the global regimes on the whole simplex. That the simplex of the
ratios has sides of length 1 is ours. Nothing here is random: every point is a trajectory.
"""

from __future__ import annotations

import math

import torch
from drawing import BLACK, RED, TINTS, frame, new_figure, save
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.diagnostics.regimes import GLOBAL_REGIMES, LOCAL_REGIMES, named_regimes

BUDGET = fpo.Budget(pos=0.15, neg=0.09)
TOKEN_CLIP = 0.025
TOKENS = 3
SLOPE = 3.0
HIERARCHY = fpo.Hierarchy((fpo.Stratum("trajectory", BUDGET, slope=SLOPE),), TOKEN_CLIP)
ZOOM = 0.18
LOCAL_TINTS = ("#FFFFFF", "#A9D2EE", "#6FB1DC")
# corners of a triangle of side 1 around the origin; corner t is the trajectory in which token t has all, r_t = 3
CORNERS = torch.tensor([[-0.5, -(3**-0.5) / 2], [0.5, -(3**-0.5) / 2], [0.0, 3**-0.5]], dtype=torch.float64)


def ratios_at(points: Tensor) -> Tensor:
    """Ratios [n, 3] of mean 1 at points [n, 2] of the triangle's plane; one of them is negative outside."""
    return 1.0 + 2.0 * points @ CORNERS.T * TOKENS


def regimes_of(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Global and local regime of trajectories with these positive ratios, [n, 3] -> [n] each."""
    rows = torch.arange(len(ratios)).repeat_interleave(TOKENS)
    cells = HIERARCHY.cells({"trajectory": rows}, shape=(len(ratios), TOKENS))
    (found,) = named_regimes(ratios.log().flatten(), cells, HIERARCHY)
    return found.global_C, found.local_C


def aggregates(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """P = log s+ and N = log s- (9)."""
    log_ratio = ratios.log()
    return log_ratio.clamp_min(0.0).mean(1), -log_ratio.clamp_max(0.0).mean(1)


def grid(across: Tensor, up: Tensor) -> Tensor:
    """Points [n, 2], row after row."""
    y, x = torch.meshgrid(up, across, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def shade(axes: Axes, across: Tensor, up: Tensor, index: Tensor, tints: tuple[str, ...]) -> None:
    """Areas by index; nothing where it is not a number."""
    image = index.double().view(len(up), len(across))
    colours = ListedColormap(tints)
    axes.pcolormesh(across, up, image, cmap=colours, vmin=-0.5, vmax=len(tints) - 0.5, shading="nearest")


def draw_local(axes: Axes) -> None:
    axis = torch.linspace(-ZOOM, ZOOM, 721, dtype=torch.float64)
    ratios = ratios_at(grid(axis, axis))
    shade(axes, axis, axis, regimes_of(ratios)[1], LOCAL_TINTS)
    handles = [
        Patch(facecolor=tint, edgecolor="0.6", label=f"{name}: {text}")
        for name, tint, text in zip(LOCAL_REGIMES, LOCAL_TINTS, ("no token clipped", "some", "all"), strict=True)
    ]
    for value, budget, colour, label in zip(
        aggregates(ratios), (BUDGET.pos, BUDGET.neg), (RED, BLACK), ("$P = C^+$", "$N = C^-$"), strict=True
    ):
        image = value.view(len(axis), len(axis))
        axes.contour(axis, axis, image, levels=[budget], colors=colour, linestyles="dashed", linewidths=1.4)
        handles.append(
            Line2D([], [], color=colour, linestyle="dashed", linewidth=1.4, label=f"rollback begins: {label}")
        )
    axes.plot([0.0], [0.0], "+", color=BLACK, markersize=7)
    axes.set_xticks([-0.18, -0.09, 0.0, 0.09, 0.18])
    axes.set_yticks([-0.18, -0.09, 0.0, 0.09, 0.18])
    axes.set_aspect("equal")
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False)
    title = rf"(a) local regimes around the centroid, $\epsilon$ = {TOKEN_CLIP:g}"
    frame(axes, title, "from the centroid, in sides of the triangle", "")


def draw_global(axes: Axes) -> None:
    (left, bottom), (right, top) = CORNERS.min(0).values.tolist(), CORNERS.max(0).values.tolist()
    across = torch.linspace(left, right, 901, dtype=torch.float64)
    up = torch.linspace(bottom, top, 781, dtype=torch.float64)
    ratios = ratios_at(grid(across, up))
    inside = ratios.min(1).values > 0.0
    regime = torch.full((len(ratios),), math.nan, dtype=torch.float64)
    regime[inside] = regimes_of(ratios[inside])[0].double()
    shade(axes, across, up, regime, TINTS)
    outline = torch.cat([CORNERS, CORNERS[:1]])
    axes.plot(outline[:, 0], outline[:, 1], color=BLACK, linewidth=1.0, solid_joinstyle="round")
    square = [[-ZOOM, -ZOOM], [ZOOM, -ZOOM], [ZOOM, ZOOM], [-ZOOM, ZOOM], [-ZOOM, -ZOOM]]
    axes.plot(*zip(*square, strict=True), color="0.35", linewidth=0.9, linestyle=":")
    axes.plot([0.0], [0.0], "+", color=BLACK, markersize=7)
    for token, (ha, va) in enumerate((("right", "top"), ("left", "top"), ("center", "bottom"))):
        x, y = (1.03 * CORNERS[token]).tolist()
        axes.text(x, y, f"$r_{token + 1} = 3$", ha=ha, va=va, fontsize=10)
    handles = [Patch(facecolor=tint, label=name) for tint, name in zip(TINTS, GLOBAL_REGIMES[:5], strict=False)]
    handles.append(Line2D([], [], color="0.35", linestyle=":", label="part shown in (a)"))
    axes.legend(handles=handles, loc="upper left", fontsize=9, frameon=False, handlelength=1.3)
    axes.set_aspect("equal")
    axes.set_xlim(left - 0.12, right + 0.12)
    axes.set_ylim(bottom - 0.07, top + 0.07)
    frame(axes, rf"(b) global regimes, $C^+$ = {BUDGET.pos:g}, $C^-$ = {BUDGET.neg:g}, k = {SLOPE:g}", "", "")
    axes.set_axis_off()


def main() -> None:
    figure = new_figure(12.5, 4.9)
    local, whole = figure.subplots(1, 2)
    draw_local(local)
    draw_global(whole)
    save(figure, "figure3.png")


if __name__ == "__main__":
    main()
