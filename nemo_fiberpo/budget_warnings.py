"""Warnings about budgets that can be run but are probably not meant."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from .objective import Hierarchy, Report

logger = logging.getLogger(__name__)


def budget_warnings(hierarchy: Hierarchy) -> list[str]:
    """One line per warning; strata that are switched off are ignored.

    neg >= pos   The paper recommends C- < C+ (E.5.4): log s^- - log s^+ estimates a KL divergence, which is not
                 negative, so on samples of the old policy the negative channel generally has the larger drift.
    token_clip   The paper has the token clip act before the aggregate gates (5.2, Figure 4). Take a cell in which half
                 of the tokens rise by a and half fall by a. The mean of each channel is a/2, and a token is a/2 beyond
                 its channel's mean: clip and gates see the same number, so the clip acts first if eps is below the
                 budget. Where tokens move less evenly, the largest one is further from the mean, and the clip acts
                 earlier. So only eps above both budgets is certainly in the wrong order for tokens that move alike.
                 The budgets are those of the finest stratum, whose mean a token is measured from. Coarser strata have
                 smaller ones because their means move less; eps is not comparable with them.
    """
    out = []
    for stratum in hierarchy.active:
        cells = {f"budgets.{name}": budget for name, budget in stratum.budgets.items()}
        for key, budget in {"budget": stratum.budget, **cells}.items():
            if budget.neg >= budget.pos:
                out.append(
                    f"stratum {stratum.name!r}, {key}: neg {budget.neg:g} is not less than pos {budget.pos:g}; the "
                    "paper recommends neg < pos, since falling log-probabilities generally drift further"
                )
    chain = [stratum for stratum in hierarchy.strata if stratum.enabled]
    if chain and hierarchy.token_clip > max(chain[-1].budget.pos, chain[-1].budget.neg):
        finest = chain[-1]
        out.append(
            f"token_clip: {hierarchy.token_clip:g} is greater than both budgets of the finest stratum, {finest.name!r} "
            f"(pos {finest.budget.pos:g}, neg {finest.budget.neg:g}), so its gates act before the clip where tokens "
            "move alike; the paper has the clip act first"
        )
    return out


def overrun_warnings(report: Report) -> dict[str, str]:
    """Stratum -> a warning, for each in which the median cell is beyond its budget.

    Meant for the second optimizer step of a rollout, the first whose log-ratios are not 0. Where most gates are closed
    by then, what a stratum has in common is out of the objective nearly always, and its budgets control nothing.
    """
    out = {}
    for stratum in report.strata:
        closed = {name: channel for name, channel in stratum.channels.items() if channel.pass_through < 0.5}
        if stratum.cells and closed:
            told = ", ".join(f"{name} {channel.drift_mean:.2g}" for name, channel in closed.items())
            out[stratum.name] = (
                f"stratum {stratum.name!r}: more than half of its cells are over budget at the second optimizer step "
                f"of a rollout (mean drift: {told} nats), so its gates are closed from there on; raise its budgets "
                "above that, or lower model.optim.lr or algorithm.optimizer_steps"
            )
    return out


def log_budget_warnings(lines: Iterable[str], prefix: str = "") -> None:
    """Log each of them, in a job of several ranks on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            logger.warning("%s%s", prefix, line)
