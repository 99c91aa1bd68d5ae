"""Proposes budgets from the drift that a run measured.

    fiberpo calibrate RUN [RUN ...]

The rule, with one parameter, the share q of the cells that pass:

1. The budget of a stratum's channel is the q-quantile of the drift of its cells at the last optimizer step of a
   rollout, over all rollouts of the run, rounded up to two digits. There the policy is furthest from the one that
   sampled; at earlier steps fewer cells exceed it.
2. C- is at most NEG_TO_POS of C+, and a budget is at least that of every coarser stratum of the chain. If the drifts
   are ordered differently, C+ or the finer stratum's budget is widened, so that at least the share q passes everywhere.
3. The token clip is the smaller budget of the finest stratum of the chain, so that on tokens that drift alike it acts
   no later than that stratum's gates.

A named cell gets its own budget by the same rule, if it had one in the run or with `cells`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_fiberpo.aligner.checkpoint.identity import hierarchy_of_record
from nemo_fiberpo.analysis.drifts import Drifts, Values, drifts_of, share_beyond
from nemo_fiberpo.analysis.runs import GATES, Run
from nemo_fiberpo.objective import Budget
from nemo_fiberpo.objective.report import CHANNELS

PASSING = 0.95
NEG_TO_POS = 0.75
"""As in the hierarchies of conf/. The paper recommends C- < C+ (E.5.4)."""


@dataclass(frozen=True)
class Proposal:
    """Budgets that a run suggests.

    budgets     by stratum; without disabled strata and those that have no cell in the metrics
    cells       by stratum and cell, for all named cells
    token_clip  in nats, as the budgets
    passing     the parameter q of the rule
    positions   optimizer steps of a rollout that have figures, counted from 0
    gated       (stratum, channel) -> share of its cells that exceed the proposed budget, by position
    before      by stratum, the budget in the run
    token_clip_before  in the run
    cut         share of the tokens that the run's token clip, or its objective, cut at the last optimizer step
    rollouts    number of rollouts whose last optimizer step was measured
    widened     a line for each budget that step 2 of the rule widened
    hierarchy   the `hierarchy` section with these budgets, for `load_hierarchy`
    """

    budgets: Mapping[str, Budget]
    cells: Mapping[str, Mapping[str, Budget]]
    token_clip: float
    passing: float
    positions: tuple[int, ...]
    gated: Mapping[tuple[str, str], tuple[float, ...]]
    before: Mapping[str, Budget]
    token_clip_before: float
    cut: float
    rollouts: int
    widened: tuple[str, ...]
    hierarchy: Mapping[str, Any]

    def written(self, stratum: str) -> Mapping[str, Any]:
        """The cells of a stratum that have their own budgets in `hierarchy`."""
        entry: Mapping[str, Any] = {**self.hierarchy["strata"], **self.hierarchy.get("branches", {})}[stratum]
        return entry.get("budgets", {})


def calibrate(runs: Run | Path | Sequence[Run | Path], passing: float = PASSING, cells: bool = False) -> Proposal:
    """Propose budgets for the hierarchy of a run by the rule above.

    Several runs, such as seeds of one configuration, are pooled; their hierarchies must be equal. With `cells`, every
    named cell gets its own budget.

    ValueError if `passing` is not between 0 and 1, the hierarchies differ, or no drift was measured.
    """
    if not 0 < passing < 1:
        raise ValueError(f"passing: must be between 0 and 1, the share of cells that pass, got {passing!r}")
    given = [runs] if isinstance(runs, Run | Path) else list(runs)
    read = [run if isinstance(run, Run) else Run(run) for run in given]
    hierarchy = _without_defaults(hierarchy_of_record(read[0].identity))
    if "strata" not in hierarchy:
        raise ValueError(f"{read[0].path / 'run.json'}: does not record a hierarchy")
    for other in read[1:]:
        if _without_defaults(hierarchy_of_record(other.identity)) != hierarchy:
            raise ValueError(f"{other.path / 'run.json'}: its hierarchy differs from that of {read[0].path}")
    steps = [step for run in read for step in run.optimizer_steps]
    chain, branches = hierarchy["strata"], hierarchy.get("branches", {})
    drifts = drifts_of(steps, [*chain, *branches])
    if not drifts:
        raise ValueError(
            f"{read[0].path / 'metrics.jsonl'}: no drift of a stratum. Gates act from the second optimizer step of a "
            "rollout on: set algorithm.optimizer_steps or algorithm.epochs above 1, and switch a stratum on"
        )
    last = max(position for of in drifts.values() for position in of.cells)
    at_last = [step for step in steps if step.position == last]
    fit = _Fit(drifts, last, passing, cells)
    for name, entry in chain.items():
        fit.add(name, entry, in_chain=True)
    token_clip = (
        min(fit.budgets[fit.finest].pos, fit.budgets[fit.finest].neg) if fit.finest else hierarchy["token_clip"]
    )
    for name, entry in branches.items():
        fit.add(name, entry, in_chain=False)
    positions = tuple(sorted({position for of in drifts.values() for position in of.cells}))
    return Proposal(
        budgets=fit.budgets,
        cells=fit.cells,
        token_clip=token_clip,
        passing=passing,
        positions=positions,
        gated={
            key: _shares(of, fit.budgets[key[0]], key[1], positions)
            for key, of in drifts.items()
            if key[0] in fit.budgets
        },
        before={name: Budget(**{**chain, **branches}[name]["budget"]) for name in fit.budgets},
        token_clip_before=hierarchy["token_clip"],
        cut=_mean([step.metrics.get(f"{GATES}token/clipped") for step in at_last]),
        rollouts=len(at_last),
        widened=tuple(fit.widened),
        hierarchy=_with_budgets(hierarchy, fit, token_clip),
    )


class _Fit:
    """Applies the rule to one stratum after another, coarsest first."""

    def __init__(self, drifts: Mapping[tuple[str, str], Drifts], last: int, passing: float, all_cells: bool):
        self._drifts, self._last, self._passing, self._all_cells = drifts, last, passing, all_cells
        self.budgets: dict[str, Budget] = {}
        self.cells: dict[str, dict[str, Budget]] = {}
        self.written: dict[str, dict[str, Budget]] = {}
        self.widened: list[str] = []
        self.finest: str | None = None
        self._floor = dict.fromkeys(CHANNELS, 0.0)

    def add(self, name: str, entry: Mapping[str, Any], in_chain: bool) -> None:
        of = {channel: self._drifts.get((name, channel)) for channel in CHANNELS}
        pos, neg = of["pos"], of["neg"]
        if pos is None or neg is None or self._last not in pos.cells:
            return
        floor = self._floor if in_chain else dict.fromkeys(CHANNELS, 0.0)
        budget = self._budget(name, pos.cells, neg.cells, floor)
        if budget is None:
            raise ValueError(f"stratum {name}: did not drift at the last optimizer step of a rollout; train longer")
        self.budgets[name] = budget
        self.cells[name] = {}
        for cell in (cell for cell in pos.named if self._last in pos.named[cell]):
            own = self._budget(f"{name}, cell {cell}", pos.named[cell], neg.named[cell], floor)
            if own is not None:
                self.cells[name][cell] = own
        asked = self.cells[name] if self._all_cells else entry.get("budgets", {})
        self.written[name] = {cell: self.cells[name][cell] for cell in asked if cell in self.cells[name]}
        if in_chain:
            self.finest = name
            given = [self.budgets[name], *self.written[name].values()]
            self._floor = {channel: max(getattr(budget, channel) for budget in given) for channel in CHANNELS}

    def _budget(
        self, where: str, pos: dict[int, Values], neg: dict[int, Values], floor: Mapping[str, float]
    ) -> Budget | None:
        """The budget by the rule; None if there is neither a drift nor a coarser budget."""
        of = {"pos": pos, "neg": neg}
        measured = {
            channel: float(np.quantile(of[channel][self._last], self._passing, method="inverted_cdf"))
            for channel in CHANNELS
        }
        rounded = {channel: round_up(value) for channel, value in measured.items()}
        found = {channel: max(rounded[channel], floor[channel]) for channel in CHANNELS}
        if not all(found.values()):
            return None
        found["pos"] = max(found["pos"], round_up(found["neg"] / NEG_TO_POS))
        for channel in CHANNELS:
            if found[channel] > rounded[channel]:
                why = "a coarser stratum has it" if found[channel] == floor[channel] else f"neg is {found['neg']:g}"
                self.widened.append(
                    f"{where}, {channel}: {rounded[channel]:g} by its drift, raised to {found[channel]:g} because {why}"
                )
        return Budget(found["pos"], found["neg"])


def _mean(numbers: Sequence[float | None]) -> float:
    known = [number for number in numbers if number is not None]
    return float(np.mean(known)) if known else math.nan


def round_up(value: float) -> float:
    """Round up to two significant digits."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.2g}")


def _shares(drifts: Drifts, budget: Budget, channel: str, positions: tuple[int, ...]) -> tuple[float, ...]:
    bound = getattr(budget, channel)
    return tuple(share_beyond(drifts.cells[at], bound) if at in drifts.cells else math.nan for at in positions)


def _without_defaults(hierarchy: Mapping[str, Any]) -> dict[str, Any]:
    """The section without nulls and without the defaults of strata, which a record spells out."""
    defaults = {"enabled": True, "gate": "rollback", "sweeps": 1}
    kept = {key: value for key, value in hierarchy.items() if value is not None and defaults.get(key) != value}
    return {key: _without_defaults(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _with_budgets(hierarchy: Mapping[str, Any], fit: _Fit, token_clip: float) -> dict[str, Any]:
    def written(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        if name not in fit.budgets:
            return dict(entry)
        own = {cell: vars(budget) for cell, budget in fit.written[name].items()}
        kept = {key: value for key, value in entry.items() if key not in ("budget", "budgets")}
        return {"budget": dict(vars(fit.budgets[name])), **({"budgets": own} if own else {}), **kept}

    out = {"token_clip": token_clip, **{k: v for k, v in hierarchy.items() if k not in ("token_clip", "token_clips")}}
    for kind in ("strata", "branches"):
        if kind in out:
            out[kind] = {name: written(name, entry) for name, entry in out[kind].items()}
    return out
