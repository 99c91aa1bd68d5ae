"""The picture of several runs: a colour for each group, a line for its mean, a band for the interval over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nemo_fiberpo.analysis.picture import COLOURS, MARKERS, save, smooth
from nemo_fiberpo.analysis.summary import TRAILING, Curve, Summary, largest_drift, over_seeds, values

Groups = Mapping[str, Sequence[Summary]]
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
COLUMNS = 3


def plot_comparison(groups: Groups, strata: Sequence[str], path: Path, title: str = "") -> None:
    """Write the picture: reward per domain, entropy, the largest drift of each stratum, and how often each is beyond
    its budget."""
    domains = sorted(
        {name for members in groups.values() for one in members for (name,) in one.run.curves["train_reward"]}
    )
    panels: list[Callable[[Axes], None]] = [lambda axes, d=d: _reward(axes, groups, d) for d in domains]
    panels += [lambda axes: _entropy(axes, groups)]
    panels += [lambda axes, s=s: _drift(axes, groups, s) for s in strata]
    panels += [lambda axes: _beyond(axes, groups, strata)] if strata else []
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(14, 3.5 * rows + 0.6 + 0.25 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, groups)
    if title:
        figure.suptitle(title)
    save(figure, path)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[(number // len(COLOURS)) % len(DASHES)]}


def _legend(figure: Figure, groups: Groups) -> None:
    handles = []
    for number, (group, members) in enumerate(groups.items()):
        runs = "1 run" if len(members) == 1 else f"{len(members)} runs"
        handles.append(figure.axes[0].plot([], [], **_style(number), linewidth=2.5, label=f"{group} ({runs})")[0])
    figure.legend(handles=handles, loc="outside upper center", ncols=1 if len(groups) < 4 else 2, frameon=False)


def _curves(axes: Axes, groups: Groups, curve_of: Callable[[Summary], Curve]) -> None:
    """The mean of each group's curves, where they have a value, and its interval where there are two or more."""
    for number, members in enumerate(groups.values()):
        at: dict[int, list[float]] = {}
        for one in members:
            curve = curve_of(one)
            for (step, _), height in zip(curve, smooth(values(curve), TRAILING), strict=True):
                at.setdefault(step, []).append(float(height))
        if not at:
            continue
        steps = sorted(at)
        mean, low, high = (np.array(column) for column in zip(*(over_seeds(at[step]) for step in steps), strict=True))
        axes.plot(steps, mean, **_style(number), linewidth=1.8)
        axes.fill_between(steps, low, high, color=_style(number)["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("RL step")


def _reward(axes: Axes, groups: Groups, domain: str) -> None:
    """Lines of the training reward; at the right end held-out reward at T = 1 after training, with its interval."""
    _curves(axes, groups, lambda one: one.run.curves["train_reward"].get((domain,), []))
    last = max(one.rl_steps for members in groups.values() for one in members)
    for number, members in enumerate(groups.values()):
        after = [row.after for one in members for row in one.heldout if (row.domain, row.mode) == (domain, "sampled")]
        if after:
            mean, low, high = over_seeds(after)
            error = None if np.isnan(low) else [[mean - low], [high - mean]]
            place = last * (1.04 + 0.03 * number)
            marker = {"color": _style(number)["color"], "marker": MARKERS[number % len(MARKERS)]}
            axes.errorbar([place], [mean], yerr=error, **marker, markersize=6, capsize=3, linestyle="none")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.05), min(high, 1.05))
    axes.set_title(f"{domain}: reward", fontsize=11, loc="left")


def _entropy(axes: Axes, groups: Groups) -> None:
    _curves(axes, groups, lambda one: one.run.curves["entropy"].get((), []))
    axes.set_title("entropy, nats per token", fontsize=11, loc="left")


def _drift(axes: Axes, groups: Groups, stratum: str) -> None:
    _curves(axes, groups, lambda one: [point for point in largest_drift(one.run).get(stratum, []) if point[1] > 0])
    axes.set_yscale("log")
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
