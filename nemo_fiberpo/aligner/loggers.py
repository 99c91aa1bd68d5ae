"""Loggers beside NeMo's: files of metrics and of the prompts used, which survive a resume, and a progress line per
step."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from nemo_fiberpo.storage.manifest import write_atomically

DAMAGED = ".damaged"  # suffix of the file for unreadable lines, found on a resume


class _JsonLines:
    """A file of one JSON object a line, each with its RL step."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, rl_step: int) -> None:
        """Keep the whole lines of RL steps before `rl_step`. Unreadable lines are moved to a file beside it, with a
        message; a half-written last line, which a kill leaves, is dropped. Atomic."""
        if not self._path.exists():
            return
        kept: list[bytes] = []
        damaged: list[tuple[int, bytes]] = []
        *lines, _half = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            step = _step_of(line)
            if step is None:
                damaged.append((number, line + b"\n"))
            elif step < rl_step:
                kept.append(line + b"\n")
        if damaged:
            aside = self._path.with_name(self._path.name + DAMAGED)
            with aside.open("ab") as file:
                file.writelines(line for _, line in damaged)
            found = f"{self._path}: {len(damaged)} damaged lines moved to {aside.name}"
            print(f"{found}, the first was line {damaged[0][0]}", flush=True)
        write_atomically(self._path, b"".join(kept).decode())

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class MetricsFile(_JsonLines):
    """One JSON object a line: {"rl_step": n, "step": x-axis of the logger, "<prefix>/<name>": number, ...}.

    Histograms have lines of their own, {"rl_step": n, "step": optimizer step, "<name>": {"<bin>": count, ...}, ...},
    without empty bins. Passed to NeMo-Aligner's logger wrapper. On a resume `rewind` drops what a killed run had
    written past its checkpoint. Numbers keep all their digits; NaN and infinity are null.
    """

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not metrics:
            return
        row: dict[str, Any] = {"rl_step": _rl_step(metrics, step), "step": step}
        for name, value in metrics.items():
            number = _number(value)
            if number is not None:
                row[name] = number if math.isfinite(number) else None
        self._append(row)

    def log_histograms(self, rl_step: int, step: int, histograms: Mapping[str, Sequence[int]]) -> None:
        """Counts by bin, see `objective.report.HISTOGRAM_EDGES`."""
        counts = {name: {str(at): count for at, count in enumerate(bins) if count} for name, bins in histograms.items()}
        self._append({"rl_step": rl_step, "step": step, **counts})


class PromptsFile(_JsonLines):
    """The prompts of every RL step, one JSON object a line: {"rl_step": n, "lines": [line of data.train, ...]}.

    Lines count from 1, in the order of the rollout, each prompt once.
    """

    def log_prompts(self, rl_step: int, lines: Sequence[int]) -> None:
        self._append({"rl_step": rl_step, "lines": list(lines)})


def _step_of(line: bytes) -> int | None:
    """The RL step of a line; None if the line is damaged."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = row.get("rl_step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def _rl_step(metrics: Mapping[str, Any], step: int | None) -> int | None:
    """The RL step of a row: optimizer steps have it; an evaluation is logged after its step is counted."""
    if "train_optim/rl_step" in metrics:
        return int(metrics["train_optim/rl_step"])
    if step is not None and any(name.startswith("val_rollouts/") for name in metrics):
        return step - 1
    return step


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _duration(seconds: float) -> str:
    """ "40 s", "7 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """One line per RL step: reward overall and per domain, the largest share of its budget that each stratum uses, the
    step's time and the remaining time at the mean of this process."""

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        self._total, self._stream = total_steps, stream or sys.stdout
        self._rollout: dict[str, float] = {}
        self._gates: dict[str, float] = {}
        self._since = self._begun = time.monotonic()
        self._steps = 0  # of this process

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name.startswith("train_rollouts/") and _number(value) is not None:
                self._rollout[name.removeprefix("train_rollouts/")] = float(value)
            if name.startswith("train_optim/gates/") and name.endswith("/budget_used_max"):
                stratum = name.removeprefix("train_optim/gates/").split("/")[0]
                self._gates[stratum] = max(self._gates.get(stratum, 0.0), float(value))
        if any(name.startswith("timers/") for name in metrics):
            self._print(step or 0)

    def _print(self, step: int) -> None:
        now = time.monotonic()
        self._steps += 1
        left = (self._total - step - 1) * (now - self._begun) / self._steps
        per_domain = [
            f"{name.removeprefix('reward/')} {value:.2f}"
            for name, value in self._rollout.items()
            if name.startswith("reward/")
        ]
        used = ", ".join(f"{stratum} {100 * value:.0f}%" for stratum, value in self._gates.items()) or "on-policy"
        reward = self._rollout.get("rewards", math.nan)
        print(
            f"step {step + 1:>{len(str(self._total))}}/{self._total}  reward {reward:.3f}"
            f" ({', '.join(per_domain)})  most of a budget used: {used}"
            f"  {now - self._since:.1f} s, {_duration(left)} left",
            file=self._stream,
            flush=True,
        )
        self._rollout, self._gates, self._since = {}, {}, now
