"""Reads a run's folder: metrics, held-out answers and the recorded configuration. docs/metrics.md lists every key of
`metrics.jsonl`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Curves = dict[tuple[str, ...], list[tuple[int, float]]]  # name -> (RL step, value), in order of steps
Rewards = dict[tuple[str, str], dict[int, float]]  # (domain, mode) -> prompt index -> mean reward

# Patterns of the metrics that are drawn as curves.
METRIC_KEYS = {
    "reward": r"train_rollouts/rewards",
    "train_reward": r"train_rollouts/reward/(?P<domain>.+)",
    "entropy": r"train_rollouts/entropy",
    "budget_used": r"train_optim/gates/(?P<stratum>[^/]+)/(?P<channel>pos|neg)/budget_used_max",
    "drift": r"train_optim/gates/(?P<stratum>[^/]+)/(?P<channel>pos|neg)/drift_max",
    "named_drift": r"train_optim/gates/(?P<place>[^/]+)/(?P<channel>pos|neg)/drift",
    "token_share": r"train_rollouts/token_share/(?P<column>[^/.]+)\.(?P<cell>[^/.]+)",
    "tv": r"train_optim/gates/log_ratio/tv",
    "kl": r"train_optim/gates/log_ratio/kl",
    "rollout_time": r"timers/rollout_time",
    "train_time": r"timers/train_time",
}
PASS_THROUGH = re.compile(r"train_optim/gates/(?P<stratum>[^/.]+)/(pos|neg)/pass_through")
GATES = "train_optim/gates/"
SECOND_PASS = "train_optim/second_pass"
MODES = ("sampled", "greedy")


@dataclass(frozen=True)
class OptimizerStep:
    """One optimizer step: its position within its RL step (from 0), its row of metrics, and its histograms, which are
    empty if it is on-policy."""

    rl_step: int
    position: int
    metrics: Mapping[str, Any]
    histograms: dict[str, Mapping[str, int]] = field(default_factory=dict)


class Run:
    """A run's folder. Files are read on first use; those of an unfinished run are read as far as they are written."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. ValueError if a line has no "rl_step"."""
        path = self.path / "metrics.jsonl"
        rows = json_lines(path)
        for row in rows:
            if not isinstance(row.get("rl_step"), int):
                raise ValueError(f"{path}: a line has no 'rl_step'; it has {', '.join(sorted(row)[:8])}")
        return rows

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The configuration by dotted key, from run.json. ValueError if that is not the record of a run."""
        path = self.path / "run.json"
        try:
            identity = json.loads(path.read_text("utf-8"))["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the record of a run ({type(error).__name__}: {error})") from None
        if not isinstance(identity, dict):
            raise ValueError(f"{path}: identity: must be a mapping, got {identity!r}")
        return identity

    @cached_property
    def rl_steps(self) -> int:
        """Number of RL steps that have begun."""
        return 1 + max((row["rl_step"] for row in self.rows), default=-1)

    @cached_property
    def curves(self) -> dict[str, Curves]:
        """Curves by kind (the keys of METRIC_KEYS) and name, each a list of (RL step counted from 1, value) in order.

        A name consists of the groups of the kind's pattern: ("math",), or ("domain", "pos"). If an RL step logs a
        metric several times, once per optimizer step, the largest value counts.
        """
        found: dict[str, dict[tuple[str, ...], dict[int, float]]] = {kind: defaultdict(dict) for kind in METRIC_KEYS}
        patterns = {kind: re.compile(pattern) for kind, pattern in METRIC_KEYS.items()}
        kinds: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for row in self.rows:
            step = row["rl_step"] + 1
            for key, value in row.items():
                if key not in kinds:
                    matches = ((kind, pattern.fullmatch(key)) for kind, pattern in patterns.items())
                    kinds[key] = [(kind, match.groups()) for kind, match in matches if match]
                for kind, name in kinds[key] if value is not None else ():
                    curve = found[kind][name]
                    curve[step] = max(float(value), curve.get(step, float("-inf")))
        return {kind: {name: sorted(at.items()) for name, at in curves.items()} for kind, curves in found.items()}

    @property
    def label_drifts(self) -> Curves:
        """Drift of each label of `token_labels`, by (stratum, column, cell, channel), in every stratum that is that
        column or joins it."""
        found: Curves = {}
        for column, cell in self.curves["token_share"]:
            for (place, channel), curve in self.curves["named_drift"].items():
                if place == f"{column}.{cell}":
                    found[column, column, cell, channel] = curve
                elif place.endswith(f".{column}.{cell}"):
                    found[place.removesuffix(f".{column}.{cell}"), column, cell, channel] = curve
        return found

    @cached_property
    def optimizer_steps(self) -> list[OptimizerStep]:
        """All optimizer steps in order, each with its histograms."""
        steps: list[OptimizerStep] = []
        taken: dict[int, int] = defaultdict(int)
        for row in self.rows:
            if "train_optim/grad_norm" in row:
                steps.append(OptimizerStep(row["rl_step"], taken[row["rl_step"]], row))
                taken[row["rl_step"]] += 1
            histograms = {key: value for key, value in row.items() if key.endswith("_histogram")}
            if histograms and steps and steps[-1].metrics["step"] == row["step"]:
                steps[-1].histograms.update(histograms)
        return steps

    def second_shares(self) -> list[float]:
        """Mean share of micro-batches that second passes ran over (`algorithm.passes: auto`), for each off-policy place
        in the rollout. A place without an optimistic step has that of the place before, by which it was decided.
        ValueError without any."""
        of_place: dict[int, list[float]] = defaultdict(list)
        for step in self.optimizer_steps:
            if not step.metrics.get("train_optim/on_policy"):
                of_place[step.position] += [step.metrics[SECOND_PASS]] if SECOND_PASS in step.metrics else []
        shares: list[float] = []
        for _, found in sorted(of_place.items()):
            shares += [float(np.mean(found))] if found else shares[-1:]
        if not shares:
            raise ValueError(
                f"{self.path / 'metrics.jsonl'}: no optimizer step has {SECOND_PASS!r}; those of a run with "
                "algorithm.passes: auto have it, but for the first of a rollout"
            )
        return shares

    def gates_at_work(self) -> dict[str, float]:
        """By stratum, the fraction of optimizer steps in which at least one of its cells left pass-through. On-policy
        steps, whose log-ratios are 0, do not count."""
        left: dict[str, list[bool]] = defaultdict(list)
        for row in self.rows:
            for stratum, fraction in lowest_pass_through(row).items():
                left[stratum].append(fraction < 1.0)
        return {stratum: sum(steps) / len(steps) for stratum, steps in left.items()}

    def heldout(self, moment: str) -> Rewards | None:
        """Held-out rewards "before" or "after" training; None if the file does not exist."""
        path = self.path / f"heldout_{moment}.jsonl"
        return read_heldout(path) if path.exists() else None


def lowest_pass_through(row: Mapping[str, Any]) -> dict[str, float]:
    """By stratum, the fraction of its cells in pass-through, the smaller of the two channels, from the metrics of one
    optimizer step."""
    lowest: dict[str, float] = {}
    for key, value in row.items():
        if (match := PASS_THROUGH.fullmatch(key)) and value is not None:
            lowest[match["stratum"]] = min(lowest.get(match["stratum"], 1.0), value)
    return lowest


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A half-written last line, which a killed run can leave, is skipped. ValueError
    naming file and line for any other line that is not JSON."""
    return list(_json_lines(path))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None


def read_heldout(path: Path) -> Rewards:
    """Mean reward per prompt, by (domain, mode). ValueError naming the line with a missing field or an unknown mode."""
    rewards: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(_json_lines(path), start=1):
        for name in ("prompt_index", "domain", "mode", "reward"):
            if name not in row:
                raise ValueError(f"{path}:{number}: {name}: missing")
        if row["mode"] not in MODES:
            raise ValueError(f"{path}:{number}: mode: {row['mode']!r} is unknown; valid: {', '.join(MODES)}")
        if row["reward"] is not None:
            rewards[row["domain"], row["mode"]][int(row["prompt_index"])].append(float(row["reward"]))
    return {key: {index: float(np.mean(r)) for index, r in prompts.items()} for key, prompts in rewards.items()}
