"""The picture of several runs: a colour for each group, a thick line for its mean and a thin one for each of its runs,
and a band for the 95 percent interval over its seeds. Two seeds have too wide an interval to be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nemo_fiberpo.analysis.picture import COLOURS, MARKERS, plain_log_ticks, save, smooth, step_ticks
from nemo_fiberpo.analysis.summary import TRAILING, Curve, Summary, largest_drift, over_seeds, values

Groups = Mapping[str, Sequence[Summary]]
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
COLUMNS = 3
NOTE = (
    f"lines: means over {TRAILING} RL steps, thick for a group, thin for its runs; reward: training samples; markers: "
    "held-out reward at T = 1 after training;\nbands and bars: 95 percent interval over 3 or more seeds; dots: runs"
)


@rc_context({"text.parse_math": False})  # a $ in the name of a domain is a $
def plot_comparison(groups: Groups, strata: Sequence[str], path: Path, title: str = "") -> None:
    """Write the picture: reward per domain, entropy, the largest drift of each stratum, and how often each is beyond
    its budget."""
    domains = sorted(
        {name for members in groups.values() for one in members for (name,) in one.run.curves["train_reward"]}
    )
    panels: list[Callable[[Axes], None]] = [partial(_reward, groups=groups, domain=domain) for domain in domains]
    panels.append(partial(_entropy, groups=groups))
    panels += [partial(_drift, groups=groups, stratum=stratum) for stratum in strata]
    if strata:
        panels.append(partial(_beyond, groups=groups, strata=strata))
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(14, 3.5 * rows + 0.6 + 0.25 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, groups, title)
    figure.supxlabel(NOTE, fontsize=9.5, color="0.35")
    save(figure, path)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[(number // len(COLOURS)) % len(DASHES)]}


def _legend(figure: Figure, groups: Groups, title: str) -> None:
    handles = []
    for number, (group, members) in enumerate(groups.items()):
        runs = "1 run" if len(members) == 1 else f"{len(members)} runs"
        handles.append(figure.axes[0].plot([], [], **_style(number), linewidth=2.5, label=f"{group} ({runs})")[0])
    columns = 1 if len(groups) < 4 else 2
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    figure.legend(handles=handles, title=title or None, title_fontsize=13, **place)


def _curves(axes: Axes, groups: Groups, curve_of: Callable[[Summary], Curve], log: bool = False) -> None:
    """Means over TRAILING RL steps. The axis covers the runs, not the bands. With `log`, means and intervals are
    those of logarithms."""
    heights: list[float] = []
    for number, members in enumerate(groups.values()):
        at: dict[int, list[float]] = {}
        for one in members:
            curve = [(step, math.log(value) if log else value) for step, value in curve_of(one) if value > 0 or not log]
            steps, trend = [step for step, _ in curve], smooth(values(curve), TRAILING)
            for step, height in zip(steps, trend.tolist(), strict=True):
                at.setdefault(step, []).append(height)
            heights += trend.tolist()
            if len(members) > 1:
                axes.plot(steps, np.exp(trend) if log else trend, **_style(number), linewidth=0.7, alpha=0.4)
        if at:
            _mean_curve(axes, at, number, log)
    if heights:
        margin = 0.08 * (max(heights) - min(heights)) + 1e-3
        low, high = min(heights) - margin, max(heights) + margin
        axes.set_ylim(*((math.exp(low), math.exp(high)) if log else (low, high)))
    step_ticks(axes, max(one.rl_steps for members in groups.values() for one in members))
    axes.set_xlabel("RL step")


def _mean_curve(axes: Axes, at: Mapping[int, Sequence[float]], number: int, log: bool) -> None:
    steps = sorted(at)
    drawn = np.array([over_seeds(at[step]) for step in steps])
    drawn[[len(at[step]) < 3 for step in steps], 1:] = np.nan
    mean, low, high = (np.exp(drawn) if log else drawn).T
    axes.plot(steps, mean, **_style(number), linewidth=1.8)
    axes.fill_between(steps, low, high, color=_style(number)["color"], alpha=0.15, linewidth=0)


def _reward(axes: Axes, groups: Groups, domain: str) -> None:
    """Lines of the training reward; at the right end held-out reward at T = 1 after training, with its interval."""
    _curves(axes, groups, lambda one: one.run.curves["train_reward"].get((domain,), []))
    last = max(one.rl_steps for members in groups.values() for one in members)
    bottom, top = axes.get_ylim()
    for number, members in enumerate(groups.values()):
        after = [row.after for one in members for row in one.heldout if (row.domain, row.mode) == (domain, "sampled")]
        if not after:
            continue
        mean, low, high = over_seeds(after)
        bounds = (low, high) if len(after) > 2 else (mean, mean)
        error = [[mean - bounds[0]], [bounds[1] - mean]]
        marker = {"color": _style(number)["color"], "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar([last * (1.04 + 0.03 * number)], [mean], yerr=error, **marker, markersize=6, capsize=3)
        bottom, top = min(bottom, bounds[0] - 0.01), max(top, bounds[1] + 0.01)
    axes.set_ylim(bottom, top)
    axes.set_title(f"{domain}: reward", fontsize=11, loc="left")


def _entropy(axes: Axes, groups: Groups) -> None:
    _curves(axes, groups, lambda one: one.run.curves["entropy"].get((), []))
    axes.set_title("entropy, nats per token", fontsize=11, loc="left")


def _drift(axes: Axes, groups: Groups, stratum: str) -> None:
    axes.set_yscale("log")
    _curves(axes, groups, lambda one: largest_drift(one.run).get(stratum, []), log=True)
    plain_log_ticks(axes, (1.0, 2.0, 5.0))
    axes.set_title(f"{stratum}: largest drift, nats per token", fontsize=11, loc="left")


def _beyond(axes: Axes, groups: Groups, strata: Sequence[str]) -> None:
    """A bar for the mean of a group, a dot for each run."""
    width = 0.8 / len(groups)
    for number, members in enumerate(groups.values()):
        for place, stratum in enumerate(strata):
            shares = [100 * one.beyond[stratum] for one in members if stratum in one.beyond]
            at = place - 0.4 + (number + 0.5) * width
            if shares:
                axes.bar([at], [np.mean(shares)], width * 0.9, color=_style(number)["color"], alpha=0.55)
                axes.plot([at] * len(shares), shares, "o", color=_style(number)["color"], markersize=3.5)
    axes.set_xticks(range(len(strata)), strata)
    axes.set_title("optimizer steps with a cell beyond its budget, %", fontsize=11, loc="left")
