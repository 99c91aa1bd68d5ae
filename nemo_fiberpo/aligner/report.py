"""What a run did, for a person: a picture and a table.

    python -m nemo_fiberpo.aligner.report RUN_DIR

reads from RUN_DIR
    metrics.jsonl           one JSON object an RL step: "step" and the keys of METRIC_KEYS; others are ignored
    heldout_before.jsonl    one answer a line: prompt_index, domain, mode ("sampled" | "greedy"), reward (null where the
    heldout_after.jsonl     grader failed), response
and writes report.png beside them and a table to the terminal. Any of the three may be missing; what needs it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The names of the metrics that the picture is made of, here and nowhere else in this module.
METRIC_KEYS = {
    "train_reward": r"train/reward/(?P<domain>.+)",
    "budget_used": r"gates/(?P<stratum>[^/]+)/(?P<channel>pos|neg)/budget_used_max",
}
MODES = ("sampled", "greedy")
# Okabe and Ito's palette: told apart under every common colour blindness; lines differ in marker or dash as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RESAMPLES = 10_000

Rewards = dict[tuple[str, str], dict[int, float]]  # (domain, mode) -> prompt index -> mean reward


@dataclass(frozen=True)
class Row:
    """Held-out reward of one domain and mode. `low`, `high` bound the difference; n counts the prompts paired."""

    domain: str
    mode: str
    before: float
    after: float
    low: float
    high: float
    n: int

    @property
    def difference(self) -> float:
        return self.after - self.before


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A last line that a killed run left half-written is skipped; any other is an error."""
    lines = path.read_text("utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        if row is not None:
            rows.append(row)
    return rows


def read_metrics(path: Path) -> dict[str, dict[tuple[str, ...], list[tuple[int, float]]]]:
    """Curves by kind (the keys of METRIC_KEYS) and name, each a list of (step, value) in order of steps.

    The name is the groups of the kind's pattern: ("math",), or ("domain", "pos"). A step that stands there twice, as after
    a resume, counts once, with its last value. ValueError if a line has no "step".
    """
    found: dict[str, dict[tuple[str, ...], dict[int, float]]] = {kind: defaultdict(dict) for kind in METRIC_KEYS}
    patterns = {kind: re.compile(pattern) for kind, pattern in METRIC_KEYS.items()}
    for row in _json_lines(path):
        if "step" not in row:
            raise ValueError(f"{path}: a line has no 'step'; it has {', '.join(sorted(row)[:8])}")
        for key, value in row.items():
            for kind, pattern in patterns.items():
                if (match := pattern.fullmatch(key)) and value is not None:
                    found[kind][match.groups()][int(row["step"])] = float(value)
    return {
        kind: {name: sorted(points.items()) for name, points in curves.items()} for kind, curves in found.items()
    }


def read_heldout(path: Path) -> Rewards:
    """Mean reward per prompt, by (domain, mode). ValueError names a line whose field is missing or whose mode is unknown."""
    rewards: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(_json_lines(path), start=1):
        for field in ("prompt_index", "domain", "mode", "reward"):
            if field not in row:
                raise ValueError(f"{path}:{number}: {field}: missing")
        if row["mode"] not in MODES:
            raise ValueError(f"{path}:{number}: mode: {row['mode']!r}; valid are {', '.join(MODES)}")
        if row["reward"] is not None:
            rewards[row["domain"], row["mode"]][int(row["prompt_index"])].append(float(row["reward"]))
    return {key: {index: float(np.mean(r)) for index, r in prompts.items()} for key, prompts in rewards.items()}


def paired_bootstrap(differences: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 percent percentile interval of the mean of [n] paired differences, by RESAMPLES resamples of the pairs."""
    generator, n = np.random.default_rng(seed), len(differences)
    means = np.empty(RESAMPLES)
    step = max(1, 2**22 // n)  # bounds the memory of a block of resamples
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        means[start:stop] = differences[generator.integers(0, n, (stop - start, n))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def heldout_table(before: Rewards, after: Rewards, seed: int = 0) -> list[Row]:
    """Before, after and the paired bootstrap interval of the difference, per mode and domain.

    Pairs are prompts; a prompt whose every answer failed to be graded on either side has no pair. ValueError if the two
    sides share no domain and mode.
    """
    rows = []
    for mode in MODES:
        for domain in sorted({d for d, m in before if m == mode} & {d for d, m in after if m == mode}):
            old, new = before[domain, mode], after[domain, mode]
            prompts = sorted(old.keys() & new.keys())
            if not prompts:
                continue
            old_n = np.array([old[index] for index in prompts])
            new_n = np.array([new[index] for index in prompts])
            interval = paired_bootstrap(new_n - old_n, seed)
            rows.append(Row(domain, mode, float(old_n.mean()), float(new_n.mean()), *interval, n=len(prompts)))
    if not rows:
        raise ValueError("held-out answers before and after have no prompt in common")
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal, one block per mode."""
    titles = {"sampled": "sampled, T = 1", "greedy": "greedy"}
    width = max(12, *(len(row.domain) for row in rows))
    lines = []
    for mode in MODES:
        if not any(row.mode == mode for row in rows):
            continue
        lines += [
            f"Held-out reward, {titles[mode]}",
            f"  {'domain':<{width}} {'before':>7} {'after':>7} {'change':>8}   95% interval       prompts",
        ]
        for row in (row for row in rows if row.mode == mode):
            lines.append(
                f"  {row.domain:<{width}} {row.before:>7.3f} {row.after:>7.3f} {row.difference:>+8.3f}   "
                f"[{row.low:+.3f}, {row.high:+.3f}]   {row.n:>7}"
            )
    return "\n".join(lines)


def _smooth(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """The mean of the last `window` values (fewer at the start)."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (total[stop] - total[start]) / (stop - start)


def _plot_rewards(axes: Axes, curves: dict[tuple[str, ...], list[tuple[int, float]]], rows: Sequence[Row]) -> None:
    sampled = {row.domain: row for row in rows if row.mode == "sampled"}
    domains = sorted({name for (name,) in curves} | sampled.keys())
    last = max((points[-1][0] for points in curves.values()), default=1)
    margin = 0.03 * max(last, 1)
    for number, domain in enumerate(domains):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        if points := curves.get((domain,)):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, _smooth(values, max(1, len(values) // 10)), color=colour, linewidth=1.8, label=domain)
        if row := sampled.get(domain):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 9, "linestyle": "none", "zorder": 5}
            label = None if points else domain
            axes.plot([-margin], [row.before], **style, markerfacecolor="white", markeredgewidth=1.8, label=label)
            axes.plot([last + margin], [row.after], **style, markeredgecolor="black", markeredgewidth=0.6)
            shift = 9 if number % 2 else -9  # two domains that end alike do not print over each other
            axes.annotate(
                f"{row.before:.2f} → {row.after:.2f}",
                (last + margin, row.after),
                (8, shift),
                textcoords="offset points",
                color=colour,
                fontsize=9,
                va="center",
            )
    axes.set_xlim(-2.2 * margin, last + (7.5 if sampled else 2) * margin)
    axes.set_ylim(-0.02, 1.04)
    axes.set(title="Reward per domain", xlabel="RL step", ylabel="mean reward (1 = correct)")
    if domains:
        axes.legend(loc="upper left", frameon=False, title="domain", alignment="left")
    note = "line: training samples (thin: each step, thick: mean of the last tenth)"
    if sampled:
        note += "\nmarkers: held-out prompts at T = 1, open before, filled after"
    axes.text(0.0, -0.14, note, transform=axes.transAxes, fontsize=8.5, color="0.3", va="top")


def _plot_budgets(axes: Axes, curves: dict[tuple[str, ...], list[tuple[int, float]]]) -> None:
    strata = list(dict.fromkeys(stratum for stratum, _ in curves))
    for number, stratum in enumerate(strata):
        colour = COLOURS[(len(COLOURS) - 1 - number) % len(COLOURS)]  # not the colours of the domains beside it
        for channel, dash in (("pos", "-"), ("neg", (0, (4, 2)))):
            if points := curves.get((stratum, channel)):
                steps, values = zip(*points, strict=True)
                smooth = _smooth(np.log10(np.maximum(values, 1e-4)), max(1, len(values) // 20))
                axes.plot(steps, np.maximum(values, 1e-4), color=colour, linestyle=dash, linewidth=0.6, alpha=0.3)
                name = f"{stratum}, {'up (+)' if channel == 'pos' else 'down (−)'}"
                axes.plot(steps, 10**smooth, color=colour, linestyle=dash, linewidth=1.8, label=name)
    axes.axhline(1.0, color="0.2", linewidth=1.2)
    axes.annotate("budget", (1, 1.0), (-4, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=9)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.05), max(high, 3.0) * 1.3)
    axes.axhspan(1.0, axes.get_ylim()[1], color="0.5", alpha=0.10, linewidth=0, zorder=0)
    axes.set(title="Drift against budget per stratum", xlabel="RL step", ylabel="budget used, |drift| / budget")
    if strata:
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, title="largest cell of the stratum", fontsize=8.5)
    note = "grey: past the budget, the gate has left pass-through and pulls the cell back (rollback, then zero)\n"
    note += "thin: each step, thick: mean of the last twentieth"
    axes.text(0.0, -0.14, note, transform=axes.transAxes, fontsize=8.5, color="0.3", va="top")


def plot_report(
    curves: dict[str, dict[tuple[str, ...], list[tuple[int, float]]]], rows: Sequence[Row], path: Path, title: str = ""
) -> None:
    """Write the picture: reward per domain on the left, budget used per stratum and channel on the right.

    The file appears whole or not at all. Draws without a display, on a figure of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_rewards(left, curves["train_reward"], rows)
    _plot_budgets(right, curves["budget_used"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(partial, dpi=130, format="png")
    os.replace(partial, path)


def make_report(run: Path, picture: Path | None = None, title: str = "") -> list[Row]:
    """Write the picture of the run in folder `run` (default: report.png in it) and return the held-out rows.

    FileNotFoundError if the folder holds none of the files a report is made of.
    """
    metrics, before, after = (run / name for name in ("metrics.jsonl", "heldout_before.jsonl", "heldout_after.jsonl"))
    has_heldout = before.exists() and after.exists()
    if not (metrics.exists() or has_heldout):
        raise FileNotFoundError(f"{run}: neither metrics.jsonl nor heldout_before.jsonl and heldout_after.jsonl in it")
    rows = heldout_table(read_heldout(before), read_heldout(after)) if has_heldout else []
    curves = read_metrics(metrics) if metrics.exists() else {kind: {} for kind in METRIC_KEYS}
    plot_report(curves, rows, picture or run / "report.png", title)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nemo_fiberpo.aligner.report", description="Picture and table of a run.")
    parser.add_argument("run", type=Path, help="folder with metrics.jsonl and heldout_before/after.jsonl")
    parser.add_argument("--out", type=Path, help="where the picture goes (default: RUN/report.png)")
    parser.add_argument("--title", default="", help="a line above the picture")
    args = parser.parse_args()
    rows = make_report(args.run, args.out, args.title)
    if rows:
        print(format_table(rows))
    print(f"wrote {args.out or args.run / 'report.png'}")


if __name__ == "__main__":
    main()
