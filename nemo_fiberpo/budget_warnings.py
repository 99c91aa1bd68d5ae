"""Warnings about budgets that are valid but probably not intended."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from .objective import Hierarchy, Report

logger = logging.getLogger(__name__)


def budget_warnings(hierarchy: Hierarchy) -> list[str]:
    """One line per warning; disabled strata are ignored.

    neg >= pos   The paper recommends C- < C+ (E.5.4): log s^- - log s^+ estimates a KL divergence, which is not
                 negative, so on samples of the old policy the negative channel generally drifts further.
    token_clip   The paper has the token clip act before the aggregate gates (5.2, Figure 4). In a cell in which half of
                 the tokens rise by a and half fall by a, each channel's mean is a/2, and a token is a/2 beyond it: the
                 clip acts first if eps is below the budget. With less uniform drift the clip acts earlier. So only eps
                 above both budgets is certainly in the wrong order. The budgets are those of the finest stratum, whose
                 mean a token is measured from; coarser ones are not comparable.
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
            f"(pos {finest.budget.pos:g}, neg {finest.budget.neg:g}), so its gates act before the clip if tokens "
            "drift alike; in the paper the clip acts first"
        )
    return out


def overrun_warnings(report: Report) -> dict[str, str]:
    """Stratum -> a warning, for each whose median cell exceeds its budget.

    For the second optimizer step of a rollout, the first whose log-ratios are not 0. If most gates are closed by then,
    the stratum's budgets have no effect: what its cells have in common is almost never in the objective.
    """
    out = {}
    for stratum in report.strata:
        closed = {name: channel for name, channel in stratum.channels.items() if channel.pass_through < 0.5}
        if stratum.cells and closed:
            drifts = ", ".join(f"{name} {channel.drift_mean:.2g}" for name, channel in closed.items())
            out[stratum.name] = (
                f"stratum {stratum.name!r}: more than half of its cells are over budget at the second optimizer step "
                f"of a rollout (mean drift: {drifts} nats), so its gates are closed from then on; raise its budgets "
                "above that, or lower model.optim.lr or algorithm.optimizer_steps"
            )
    return out


def log_budget_warnings(lines: Iterable[str], prefix: str = "") -> None:
    """Log each line, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            logger.warning("%s%s", prefix, line)
