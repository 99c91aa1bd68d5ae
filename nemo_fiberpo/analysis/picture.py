"""The picture of a run: reward per domain, how much of its budget each stratum's drift uses, and the drift of each
label of `token_labels`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from nemo_fiberpo.analysis.runs import Curves

Heldout = dict[str, tuple[float, float]]  # domain -> mean reward before, after

# Okabe and Ito's palette, which suits every common form of colour blindness; lines differ in marker or dash as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# channel, label, colour (none of the domains'), dash
CHANNELS: tuple[tuple[str, str, str, Any], ...] = (
    ("pos", "up (+)", "#E69F00", "-"),
    ("neg", "down (\N{MINUS SIGN})", "#000000", (0, (4, 2))),
)
FLOOR = 0.01  # smaller budget use is drawn here
MOST_LABELS = 8  # drawn per column of `token_labels`


def smooth(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """The mean of the last `window` values (fewer at the start)."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (total[stop] - total[start]) / (stop - start)


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The same heights, raised where needed so that no two are closer than `gap`."""
    placed: dict[str, float] = {}
    lowest = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = lowest = max(height, lowest + gap)
    return placed


def _plot_rewards(axes: Axes, curves: Curves, heldout: Heldout) -> None:
    domains = sorted({name for (name,) in curves} | heldout.keys())
    last = max((points[-1][0] for points in curves.values()), default=1)
    margin = 0.03 * max(last, 1)
    label_at: dict[str, float] = {}
    for number, domain in enumerate(domains):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        if points := curves.get((domain,)):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, smooth(values, max(1, len(values) // 10)), color=colour, linewidth=1.8, label=domain)
        if domain in heldout:
            before, after = heldout[domain]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 9, "linestyle": "none"}
            label = None if points else domain
            axes.plot([-margin], [before], zorder=5, **style, markerfacecolor="white", markeredgewidth=1.8, label=label)
            axes.plot([last + margin], [after], zorder=5, **style, markeredgecolor="black", markeredgewidth=0.6)
            label_at[domain] = after
    for domain, height in _apart(label_at, 0.045).items():
        colour = COLOURS[domains.index(domain) % len(COLOURS)]
        text = "{:.2f} → {:.2f}".format(*heldout[domain])
        axes.text(last + 2 * margin, height, text, color=colour, fontsize=9, va="center")
    axes.set_xlim(-2.2 * margin, last + (7.5 if heldout else 2) * margin)
    axes.set_ylim(-0.02, 1.04)
    note = "RL step\n\nlines: training samples (thin: each step, thick: mean of the last tenth)"
    if heldout:
        note += "\nmarkers: held-out prompts at T = 1, open before, filled after"
    axes.set(title="Reward per domain", xlabel=note, ylabel="mean reward (1 = correct)")
    step_ticks(axes, last)
    if domains:
        axes.legend(loc="lower center", frameon=False, ncols=min(4, len(domains)))  # few rewards are there


def _plot_budget(axes: Axes, stratum: str, curves: Curves) -> None:
    """One stratum: both channels on a log axis, everything past the budget shaded."""
    for channel, name, colour, dash in CHANNELS:
        if points := curves.get((stratum, channel)):
            steps, values = zip(*points, strict=True)
            visible = np.maximum(values, FLOOR)
            trend = 10 ** smooth(np.log10(visible), max(1, len(values) // 20))
            axes.plot(steps, visible, color=colour, linestyle="-", linewidth=0.7, alpha=0.3)
            axes.plot(steps, trend, color=colour, linestyle=dash, linewidth=1.8, label=name)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = min(max(low, FLOOR), 0.3), max(high, 3.0)
    axes.set_ylim(low, high)
    axes.axhline(1.0, color="0.2", linewidth=1.1)
    axes.axhspan(1.0, high, color="0.5", alpha=0.12, linewidth=0, zorder=0)
    axes.annotate("budget", (1, 1.0), (-4, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=8.5)
    plain_log_ticks(axes, (1.0, 3.0))
    axes.set_title(stratum, fontsize=10, loc="left", pad=3)


def step_ticks(axes: Axes, last: int) -> None:
    """Ticks at whole RL steps up to the last one, though the axis extends to markers beyond it."""
    axes.set_xticks([tick for tick in MaxNLocator(6, integer=True).tick_values(0, last) if 0 <= tick <= last])


def plain_log_ticks(axes: Axes, multiples: Sequence[float]) -> None:
    """Ticks of a log axis at these multiples of the powers of ten, as plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=multiples))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _plot_budgets(figure: SubFigure, curves: Curves) -> list[Axes]:
    """A row per stratum, in the order of the metrics."""
    strata = list(dict.fromkeys(stratum for stratum, _ in curves))
    rows = figure.subplots(max(1, len(strata)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, stratum in zip(rows, strata, strict=False):
        _plot_budget(axes, stratum, curves)
    figure.suptitle("Drift against budget, largest cell of each stratum", fontsize=12)
    figure.supylabel("budget used, |drift| / budget", fontsize=10)
    rows[-1].set_xlabel("RL step\n\nshaded: past the budget, where the gate acts")
    if strata:
        rows[0].legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, frameon=False, fontsize=9)
    return list(rows)


def _plot_labels(figure: SubFigure, drifts: Curves, shares: Curves) -> list[Axes]:
    """A row for each stratum that is a column of labels or joins one."""
    places = list(dict.fromkeys((stratum, column) for stratum, column, _, _ in drifts))
    rows = figure.subplots(len(places), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (stratum, column) in zip(rows, places, strict=True):
        found = {(cell, channel): points for (*at, cell, channel), points in drifts.items() if at == [stratum, column]}
        share = {cell: float(np.mean([value for _, value in shares[column, cell]])) for cell, _ in found}
        _plot_label_drifts(axes, found, share)
        of = f", {MOST_LABELS} of {len(share)} labels" if len(share) > MOST_LABELS else ""
        axes.set_title(
            (stratum if stratum == column else f"{stratum}, by {column}") + of, fontsize=10, loc="left", pad=3
        )
    figure.suptitle("Drift by label of the sampled tokens", fontsize=12)
    figure.supylabel("|drift|, nats per token", fontsize=10)
    rows[-1].set_xlabel("RL step\n\nsolid: up (+), dashed: down (\N{MINUS SIGN})")
    return list(rows)


def _plot_label_drifts(
    axes: Axes, drifts: Mapping[tuple[str, str], Sequence[tuple[int, float]]], share: Mapping[str, float]
) -> None:
    """A line per label and channel, of the labels with the most tokens."""
    drawn = [cell for cell in share if cell in sorted(share, key=lambda cell: -share[cell])[:MOST_LABELS]]
    for cell, colour in zip(drawn, (*COLOURS, "0.6"), strict=False):
        for channel, _, _, dash in CHANNELS:
            if points := drifts.get((cell, channel)):
                label = f"{cell} ({share[cell]:.0%} of the tokens)" if channel == "pos" else None
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.5, label=label)
    axes.set_ylim(0.0, (1.3 + 0.12 * len(drawn)) * axes.get_ylim()[1])  # the legend stands above the lines
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8.5)


@rc_context({"text.parse_math": False})  # a $ in the name of a domain is a $
def plot_report(
    rewards: Curves,
    budgets: Curves,
    heldout: Heldout,
    path: Path,
    title: str = "",
    *,
    label_drifts: Curves | None = None,
    token_shares: Curves | None = None,
) -> None:
    """Write the picture: reward per domain, budget used per stratum and channel, and drift of labels if there are any.

    rewards       names (domain,): mean training reward per RL step
    budgets       names (stratum, "pos" | "neg"): the largest |drift| / budget of the stratum's cells per RL step
    heldout       domain -> (before, after)
    label_drifts  names (stratum, column, cell, "pos" | "neg"): |drift| of a label of `token_labels` per RL step
    token_shares  names (column, cell), those of `label_drifts` among them: share of the tokens per RL step

    Needs no display.
    """
    columns = 3 if label_drifts else 2
    figure = Figure(figsize=(6.5 * columns, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, *right = figure.subfigures(1, columns, wspace=0.03)
    panels = [left.subplots(), *_plot_budgets(middle, budgets)]
    if label_drifts:
        panels += _plot_labels(right[0], label_drifts, token_shares or {})
    _plot_rewards(panels[0], rewards, heldout)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, which appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, dpi=130, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
