"""Proposed budgets as text and as YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import yaml

from nemo_fiberpo.analysis.calibrate import Proposal
from nemo_fiberpo.analysis.tables import Table, number
from nemo_fiberpo.objective import Budget
from nemo_fiberpo.objective.report import CHANNELS

SHOWN = 8  # positions in the table


def explain(proposal: Proposal, name: str) -> str:
    """The budgets with the share of cells beyond them, what was widened, and what the budgets mean."""
    parts = [_rule(proposal, name), _budgets(proposal).as_text()]
    cut = f"{100 * proposal.cut:.1f}% of the tokens were cut at step {proposal.positions[-1] + 1}"
    clip = f"  token clip  {proposal.token_clip:g} (in the run {proposal.token_clip_before:g}; {cut} of its rollouts)"
    parts[-1] += "\n" + clip
    if any(proposal.cells.values()):
        parts.append(_cells(proposal).as_text())
    if proposal.widened:
        parts.append(
            "\n".join(
                [
                    "Widened to keep C- below C+ and finer strata above coarser ones:",
                    *map("  {}".format, proposal.widened),
                ]
            )
        )
    parts.append(_meaning(proposal).as_text() + "\n" + "\n".join(f"  {line}" for line in MEANING))
    return "\n\n".join(parts)


MEANING = (
    "These bounds hold for a cell within its own budgets and those of the coarser cells that contain it.",
    "KL (old || new) is in nats per token; GSPO's clip range, 3e-4 to 4e-4, bounds that of trajectories.",
    "TV is that of a PPO clip with every token at the clip: at 0.2 it is 0.1. docs/analysis.md derives both.",
)


def _rule(proposal: Proposal, name: str) -> str:
    return (
        f"Budgets from the drift of {name}, {proposal.rollouts} rollouts: {100 * proposal.passing:g}% of a stratum's "
        f"cells pass at optimizer step {proposal.positions[-1] + 1} of a rollout, the last."
    )


def _budgets(proposal: Proposal) -> Table:
    shown = _spread(range(len(proposal.positions)))
    columns = ["stratum", "channel", "in the run", "proposed", *(f"step {proposal.positions[at] + 1}" for at in shown)]
    rows = []
    for stratum, budget in proposal.budgets.items():
        for channel in CHANNELS:
            gated = proposal.gated[stratum, channel]
            before = getattr(proposal.before[stratum], channel)
            shares = [number(100 * gated[at], ".1f") + "%" for at in shown]
            rows.append([stratum, channel, f"{before:g}", f"{getattr(budget, channel):g}", *shares])
    return Table("Budgets, and the share of cells beyond the proposed one by optimizer step", columns, rows)


def _spread(places: Sequence[int]) -> list[int]:
    """At most SHOWN of the places, including the first and the last."""
    if len(places) <= SHOWN:
        return list(places)
    return [places[round(at * (len(places) - 1) / (SHOWN - 1))] for at in range(SHOWN)]


def _cells(proposal: Proposal) -> Table:
    rows = [
        [stratum, cell, f"{budget.pos:g}", f"{budget.neg:g}", "yes" if cell in proposal.written(stratum) else "no"]
        for stratum, cells in proposal.cells.items()
        for cell, budget in cells.items()
    ]
    columns = ["stratum", "cell", "pos", "neg", "in the hierarchy"]
    return Table("Budgets that named cells would have on their own", columns, rows)


def divergence_bounds(budgets: Iterable[Budget]) -> list[tuple[float, float]]:
    """(KL, TV) of a cell of every stratum of a chain, coarsest first, that is within its budgets and all coarser ones.

    Up the chain the drifts of a channel add up to the cell's mean, so log s^- <= sum C^-, and log s^+ <= sum C^+. Hence
    KL = log s^- - log s^+ <= sum C^-, and to first order TV = (log s^+ + log s^-) / 2 <= sum (C^+ + C^-) / 2.
    """
    budgets = list(budgets)
    kl = accumulate(budget.neg for budget in budgets)
    tv = accumulate((budget.pos + budget.neg) / 2.0 for budget in budgets)
    return list(zip(kl, tv, strict=True))


def _meaning(proposal: Proposal) -> Table:
    chain = [stratum for stratum in proposal.hierarchy["strata"] if stratum in proposal.budgets]
    bounds = divergence_bounds(proposal.budgets[stratum] for stratum in chain)
    rows = [
        [stratum, f"{kl:.2g}", f"{tv:.2g}", f"{2.0 * tv:.2g}"] for stratum, (kl, tv) in zip(chain, bounds, strict=True)
    ]
    return Table("What the budgets allow", ["stratum", "KL up to", "TV up to", "as a PPO clip of"], rows)


def hierarchy_yaml(proposal: Proposal, name: str) -> str:
    """The hierarchy as the text of a file for conf/hierarchy/."""
    head = (
        f"# Budgets by `fiberpo calibrate`, from the drift of {proposal.rollouts} rollouts of {name}:\n"
        f"# {100 * proposal.passing:g}% of a stratum's cells pass at the last optimizer step of a rollout. "
        "docs/analysis.md has the rule.\n"
    )
    return head + yaml.safe_dump(_plain(proposal.hierarchy), sort_keys=False, default_flow_style=None, width=120)


def _plain(value: Any) -> Any:
    """Floats without a fraction as int, so that `cap: 32` is written as it was given."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value
