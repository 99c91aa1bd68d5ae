"""The drift of every stratum's cells in a run, by position in the rollout.

A drift is |X|: how far a cell has moved relative to its parent in one channel, in nats per token. It is measured before
any gate, so runs with other objectives have it too. A position numbers the optimizer steps of a rollout from 0. An
on-policy step has no drifts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nemo_fiberpo.analysis.runs import GATES, OptimizerStep
from nemo_fiberpo.objective.report import CHANNELS, HISTOGRAM_EDGES

Values = NDArray[np.float64]


@dataclass
class Drifts:
    """Drifts in one channel of one stratum over all RL steps, by position: of all cells, and of each named cell."""

    cells: dict[int, Values] = field(default_factory=dict)
    named: dict[str, dict[int, Values]] = field(default_factory=dict)


def drifts_of(steps: Iterable[OptimizerStep], strata: Iterable[str]) -> dict[tuple[str, str], Drifts]:
    """The drifts of those `strata` that have metrics, by (stratum, channel). ValueError if a histogram is missing."""
    cells: dict[tuple[str, str], dict[int, list[Values]]] = defaultdict(lambda: defaultdict(list))
    named: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    strata = list(strata)
    for step in steps:
        for key in ((stratum, channel) for stratum in strata for channel in CHANNELS):
            num = step.metrics.get(f"{GATES}{key[0]}/cells")
            if not num or step.metrics.get(f"{GATES}{key[0]}/{key[1]}/drift_max") is None:
                continue
            of_names = _named(step.metrics, *key)
            for name, drift in of_names.items():
                named[*key, name][step.position].append(drift)
            exact = len(of_names) == num
            cells[key][step.position].append(np.array([*of_names.values()]) if exact else _histogram(step, *key))
    found = {key: Drifts({at: np.concatenate(v) for at, v in sorted(of.items())}) for key, of in cells.items()}
    for (stratum, channel, name), of_name in named.items():
        found[stratum, channel].named[name] = {at: np.array(values) for at, values in sorted(of_name.items())}
    return found


def _named(metrics: Mapping[str, float], stratum: str, channel: str) -> dict[str, float]:
    """The drift of every named cell that has a budget. The parts of a join have names too, but no budget."""
    head, tail = f"{GATES}{stratum}.", f"/{channel}/budget_used"
    names = [key[len(head) : -len(tail)] for key in metrics if key.startswith(head) and key.endswith(tail)]
    return {name: metrics[f"{head}{name}/{channel}/drift"] for name in names}


def _histogram(step: OptimizerStep, stratum: str, channel: str) -> Values:
    """Approximate drifts from a histogram of |X| / C: the cells of a bin are spread evenly over it.

    C is the largest drift divided by the largest budget use of the same step. Cells with their own budgets are named,
    so all cells of a histogram share one budget.
    """
    where = f"{GATES}{stratum}/{channel}/"
    most, most_used = step.metrics[f"{where}drift_max"], step.metrics[f"{where}budget_used_max"]
    counts = step.histograms.get(f"{where}budget_used_histogram")
    if counts is None:
        raise ValueError(
            f"metrics.jsonl: RL step {step.rl_step}, optimizer step {step.metrics['step']}: no line with "
            f"{where}budget_used_histogram"
        )
    edges = (0.0, *HISTOGRAM_EDGES, max(most_used, HISTOGRAM_EDGES[-1]))
    bins = [(edges[int(at)], edges[int(at) + 1], count) for at, count in counts.items()]
    used = np.concatenate([low + (high - low) * (np.arange(count) + 0.5) / count for low, high, count in bins])
    return np.minimum(used, most_used) * (most / most_used if most_used > 0 else 0.0)


def share_beyond(values: Values, budget: float) -> float:
    """Share of the drifts that exceed the budget."""
    return float(np.mean(values > budget))
