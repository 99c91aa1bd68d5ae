"""Held-out reward before and after a run: the change in every domain, with an interval over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from nemo_fiberpo.analysis.runs import MODES, Rewards

RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """Held-out reward of one domain and mode. `low` and `high` are the 95 percent interval of the difference; `n`
    counts the paired prompts."""

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


def paired_bootstrap(differences: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 percent percentile-bootstrap interval of the mean of [n] paired differences, from RESAMPLES resamples."""
    if len(differences) == 1:  # scipy needs two
        return float(differences[0]), float(differences[0])
    batch = max(1, 2**22 // len(differences))  # bounds the memory of a block of resamples
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=batch,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def heldout_table(before: Rewards, after: Rewards, seed: int = 0) -> list[Row]:
    """Before, after and the paired bootstrap interval of the difference, per mode and domain.

    Prompts are paired. A prompt without a graded answer on both sides is left out, and so is a domain without any pair.
    ValueError if both sides have graded answers, but no prompt in common.
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
    if not rows and any(before.values()) and any(after.values()):
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
