"""The figures by which runs are compared, of one run and over several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

from nemo_fiberpo.analysis.heldout import Row, heldout_table
from nemo_fiberpo.analysis.runs import MODES, Rewards, Run

TRAILING = 5
"""RL steps over which the reward of a step is averaged before it is compared with a level or drawn."""

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Summary:
    """One run.

    group       label of its group
    heldout     before and after, by domain and mode; "all" is over all prompts
    before      held-out reward before by (domain, mode), of unfinished runs too
    area        under the curve of the training reward, divided by its length in RL steps: the mean of the curve
    reached     RL step (from 1) at which the mean of the last TRAILING first is at least the level asked for
    tv, kl      divergence from the policy that sampled, over tokens: the largest of a rollout, mean over RL steps
    drift       by stratum, the largest |X| of a rollout in nats per token, mean over RL steps
    beyond      by stratum, share of the optimizer steps with a drift in which a cell was beyond its budget
    entropy     nats per token at the first and the last RL step
    seconds     of all rollouts and training; seconds_per_step is the median of an RL step
    """

    run: Run
    group: str
    rl_steps: int
    heldout: list[Row]
    before: dict[tuple[str, str], float]
    area: float
    reached: int | None
    tv: float
    kl: float
    drift: dict[str, float]
    beyond: dict[str, float]
    entropy: tuple[float, float]
    seconds: float
    seconds_per_step: float
    notes: list[str] = field(default_factory=list)


def summarise(run: Run, group: str, level: float | None = None) -> Summary:
    """The figures of a run; those that its files lack are nan, None or empty."""
    curves, notes = run.curves, []
    before, after = run.heldout("before"), run.heldout("after")
    if before is None or after is None:
        missing = " and ".join(
            f"heldout_{at}.jsonl" for at, is_there in (("before", before), ("after", after)) if not is_there
        )
        notes.append(f"{run.path}: no {missing}: held-out rewards that need it are left out")
    reward = curves["reward"].get((), [])
    entropy = values(curves["entropy"].get((), [])) or [math.nan]
    times: dict[int, float] = {}
    for kind in ("rollout_time", "train_time"):
        for step, seconds in curves[kind].get((), []):
            times[step] = times.get(step, 0.0) + seconds
    return Summary(
        run=run,
        group=group,
        rl_steps=run.rl_steps,
        heldout=_heldout(before, after) if before is not None and after is not None else [],
        before={key: float(np.mean([*of.values()])) for key, of in _with_all(before or {}).items() if of},
        area=area(reward),
        reached=None if level is None else first_at(reward, level),
        tv=_mean(values(curves["tv"].get((), []))),
        kl=_mean(values(curves["kl"].get((), []))),
        drift={stratum: _mean(values(curve)) for stratum, curve in largest_drift(run).items()},
        beyond=run.gates_at_work(),
        entropy=(entropy[0], entropy[-1]),
        seconds=sum(times.values()),
        seconds_per_step=float(np.median([*times.values()])) if times else math.nan,
        notes=notes,
    )


def _heldout(before: Rewards, after: Rewards) -> list[Row]:
    """The table's rows, by mode, with "all" after the domains."""
    rows = heldout_table(_with_all(before), _with_all(after))
    return sorted(rows, key=lambda row: (MODES.index(row.mode), row.domain == "all", row.domain))


def _with_all(rewards: Rewards) -> Rewards:
    """The rewards, with those of all domains together as "all" if there are several domains."""
    out = dict(rewards)
    for mode in {mode for _, mode in rewards}:
        of_mode = [prompts for (_, other), prompts in rewards.items() if other == mode]
        if len(of_mode) > 1:
            out["all", mode] = {index: reward for prompts in of_mode for index, reward in prompts.items()}
    return out


def values(curve: Curve) -> list[float]:
    return [value for _, value in curve]


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers)) if len(numbers) else math.nan


def area(curve: Curve) -> float:
    """Area under the curve by trapezoids, divided by its length in RL steps; the value itself for a single point."""
    steps, heights = [step for step, _ in curve], values(curve)
    if len(curve) < 2:
        return heights[0] if heights else math.nan
    return float(np.trapz(heights, steps) / (steps[-1] - steps[0]))


def first_at(curve: Curve, level: float) -> int | None:
    """The RL step at which the mean of the last TRAILING values first is at least `level`; None if none is."""
    heights = values(curve)
    ends = range(TRAILING, len(heights) + 1)
    return next((curve[end - 1][0] for end in ends if np.mean(heights[end - TRAILING : end]) >= level), None)


def largest_drift(run: Run) -> dict[str, Curve]:
    """By stratum, the larger of its channels' largest drifts in each RL step. Named cells are part of their stratum."""
    found: dict[str, dict[int, float]] = {}
    for (stratum, _), curve in run.curves["drift"].items():
        at = found.setdefault(stratum, {})
        for step, drift in curve:
            at[step] = max(drift, at.get(step, 0.0))
    return {stratum: sorted(at.items()) for stratum, at in found.items()}


def over_seeds(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the 95 percent interval of the mean by Student's t; nan bounds for a single number."""
    n, mean = len(numbers), _mean(numbers)
    if n < 2:
        return mean, math.nan, math.nan
    # `scipy.stats.t.interval` would have nan bounds where all numbers are equal.
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(numbers, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half
