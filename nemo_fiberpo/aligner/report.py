"""What a run did, for a person: a picture and a table.

    python -m nemo_fiberpo.aligner.report RUN_DIR [RUN_DIR ...]

reads from each RUN_DIR
    metrics.jsonl           JSON objects with "rl_step" (from 0) and the keys of METRIC_KEYS; others are ignored
    heldout_before.jsonl    one answer a line: prompt_index, domain, mode ("sampled" | "greedy"), reward (null where the
    heldout_after.jsonl     grader failed), response
and writes report.png beside them and a table to the terminal. What needs a missing file is left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_fiberpo.aligner.picture import Curves, plot_report

# The names of the metrics that the picture is made of, here and nowhere else.
METRIC_KEYS = {
    "train_reward": r"train_rollouts/reward/(?P<domain>.+)",
    "budget_used": r"train_optim/gates/(?P<stratum>[^/]+)/(?P<channel>pos|neg)/budget_used_max",
}
PASS_THROUGH = r"train_optim/gates/(?P<stratum>[^/.]+)/(pos|neg)/pass_through"
MODES = ("sampled", "greedy")
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
    """The objects of a JSONL file. A last line that a killed run left half-written is skipped; others are errors."""
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


def read_metrics(path: Path) -> dict[str, Curves]:
    """Curves by kind (the keys of METRIC_KEYS) and name, each a list of (RL step counted from 1, value) in order.

    The name is the groups of the kind's pattern: ("math",), or ("domain", "pos"). A value that an RL step has several
    times, one for each optimizer step, counts with its largest. ValueError if a line has no "rl_step".
    """
    found: dict[str, dict[tuple[str, ...], dict[int, float]]] = {kind: defaultdict(dict) for kind in METRIC_KEYS}
    patterns = {kind: re.compile(pattern) for kind, pattern in METRIC_KEYS.items()}
    for row in _json_lines(path):
        if not isinstance(row.get("rl_step"), int):
            raise ValueError(f"{path}: a line has no 'rl_step'; it has {', '.join(sorted(row)[:8])}")
        step = row["rl_step"] + 1
        for key, value in row.items():
            for kind, pattern in patterns.items():
                if (match := pattern.fullmatch(key)) and value is not None:
                    curve = found[kind][match.groups()]
                    curve[step] = max(float(value), curve.get(step, float("-inf")))
    return {kind: {name: sorted(points.items()) for name, points in curves.items()} for kind, curves in found.items()}


def read_heldout(path: Path) -> Rewards:
    """Mean reward per prompt, by (domain, mode). ValueError names a line with a missing field or an unknown mode."""
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


def gates_at_work(path: Path) -> dict[str, float]:
    """By stratum, the fraction of the optimizer steps after the first of a rollout in which one of its cells left
    pass-through. The first step is on-policy: its log-ratios are 0."""
    left: dict[str, list[bool]] = defaultdict(list)
    for row in _json_lines(path):
        lowest: dict[str, float] = defaultdict(lambda: 1.0)
        for key, value in row.items():
            if (match := re.fullmatch(PASS_THROUGH, key)) and value is not None:
                lowest[match["stratum"]] = min(lowest[match["stratum"]], value)
        for stratum, fraction in lowest.items():
            left[stratum].append(fraction < 1.0)
    return {stratum: sum(steps) / len(steps) for stratum, steps in left.items()}


def format_markdown(runs: Sequence[tuple[str, Sequence[Row], dict[str, float]]]) -> str:
    """(name, held-out rows, gates at work) of several runs as one Markdown table, and a second one of the gates."""
    lines = [
        "| run | domain | decoding | before | after | change | 95% interval | prompts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows, _ in runs:
        lines += [
            f"| {name} | {row.domain} | {row.mode} | {row.before:.3f} | {row.after:.3f} | {row.difference:+.3f} "
            f"| [{row.low:+.3f}, {row.high:+.3f}] | {row.n} |"
            for row in rows
        ]
    strata = list(dict.fromkeys(stratum for _, _, gates in runs for stratum in gates))
    lines += ["", "| run | " + " | ".join(strata) + " |", "|---" * (len(strata) + 1) + "|"]
    for name, _, gates in runs:
        lines.append(f"| {name} | " + " | ".join(f"{100 * gates.get(stratum, 0):.0f}%" for stratum in strata) + " |")
    return "\n".join(lines)


def make_report(run: Path, picture: Path | None = None, title: str = "") -> list[Row]:
    """Write the picture of the run in folder `run` (default: report.png in it) and return the held-out rows.

    FileNotFoundError if the folder holds none of the files a report is made of.
    """
    metrics, before, after = (run / name for name in ("metrics.jsonl", "heldout_before.jsonl", "heldout_after.jsonl"))
    has_heldout = before.exists() and after.exists()
    if not (metrics.exists() or has_heldout):
        raise FileNotFoundError(f"{run}: neither metrics.jsonl nor heldout_before.jsonl and heldout_after.jsonl in it")
    rows = heldout_table(read_heldout(before), read_heldout(after)) if has_heldout else []
    heldout = {row.domain: (row.before, row.after) for row in rows if row.mode == "sampled"}
    curves = read_metrics(metrics) if metrics.exists() else {kind: {} for kind in METRIC_KEYS}
    plot_report(curves["train_reward"], curves["budget_used"], heldout, picture or run / "report.png", title)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nemo_fiberpo.aligner.report", description="What a run did.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="folder with metrics.jsonl, heldout_*.jsonl")
    parser.add_argument("--out", type=Path, help="where the picture of a single run goes (default: RUN/report.png)")
    parser.add_argument("--title", default="", help="a line above the picture")
    parser.add_argument("--markdown", action="store_true", help="print one Markdown table of all runs")
    args = parser.parse_args()
    if args.out and len(args.runs) > 1:
        parser.error("--out: is for one run")
    reports = [
        (run.name, make_report(run, args.out, args.title), gates_at_work(run / "metrics.jsonl")) for run in args.runs
    ]
    if args.markdown:
        print(format_markdown(reports))
        return
    for run, (_, rows, _) in zip(args.runs, reports, strict=True):
        if rows:
            print(format_table(rows))
        print(f"wrote {args.out or run / 'report.png'}")


if __name__ == "__main__":
    main()
