"""What an off-policy optimizer step costs with each value of `algorithm.passes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_fiberpo.objective.hierarchy import Hierarchy
from nemo_fiberpo.objective.optimistic import gates_can_pass
from nemo_fiberpo.objective.ratio_gating import RatioGating
from nemo_fiberpo.step_cost import (
    FORWARD,
    FORWARD_RECOMPUTED,
    MEASURED,
    SHUFFLED,
    WHOLE_GROUPS,
    auto_cost,
    auto_forward_passes,
)

Range = tuple[float, float]


@dataclass(frozen=True)
class PassesCost:
    """Forward passes and cost of a step, the least and the most; a cost of 1 is one forward and backward pass. `why` is
    where they are from, or why a run is refused."""

    forward: Range
    cost: Range
    why: str


@dataclass(frozen=True)
class StepCosts:
    """By value of `algorithm.passes`; `advice` where another setting costs less."""

    of: dict[str, PassesCost]
    recomputed: bool
    advice: str | None


@dataclass(frozen=True)
class Dealing:
    """How the samples of a step lie: samples of a prompt group, samples of a micro-batch, whether groups stay whole,
    context-parallel ranks, and whether one micro-batch holds the whole step."""

    group: int
    micro: int
    whole_groups: bool
    cp: int
    alone: bool


def spanning(hierarchy: Hierarchy, gating: RatioGating | None, whole_groups: bool) -> str | None:
    """A stratum whose cells may couple tokens of several micro-batches of unsplit sequences; None if there is none."""
    inside = {"trajectory", *(("prompt_group", "state") if whole_groups else ())}
    chain = [stratum for stratum in hierarchy.strata if stratum.enabled][:1]  # finer strata lie in the coarsest
    coupled = [*chain, *(branch for branch in hierarchy.branches if branch.enabled)]
    if gating is not None:
        coupled = [stratum for stratum in hierarchy.active if stratum.name == gating.stratum]
    return next((stratum.name for stratum in coupled if not inside & set(stratum.columns)), None)


def step_costs(
    hierarchy: Hierarchy,
    gating: RatioGating | None,
    dealing: Dealing,
    recomputed: bool,
    recorded: tuple[str, Sequence[float]] | None,
) -> StepCosts:
    """Args
    recomputed   whether all activations are recomputed
    recorded     a run, and its f at each off-policy place in the rollout; None for what was measured here
    """
    forward = FORWARD_RECOMPUTED if recomputed else FORWARD
    auto = _auto(hierarchy, gating, dealing, forward, recorded)
    once, kept = (1.0, 1.0), "checkpoints" if recomputed else "activations"
    of = {
        "1": PassesCost(once, once, _one_pass(hierarchy, dealing)),
        "2": PassesCost((2.0, 2.0), (1.0 + forward, 1.0 + forward), ""),
        "auto": auto,
        "all_forward": PassesCost(once, once, f"holds the {kept} of all micro-batches"),
    }
    return StepCosts(of, recomputed, _advice(hierarchy, gating, dealing, forward, auto))


def _one_pass(hierarchy: Hierarchy, dealing: Dealing) -> str:
    if dealing.alone or spanning(hierarchy, None, whole_groups=False) is None:
        return ""
    wide = spanning(hierarchy, None, whole_groups=True)
    if wide is not None:
        return f"refused if a cell of {wide} spans micro-batches"
    return f"needs {_fitting(dealing)}" if dealing.micro % dealing.group else ""


def _fitting(dealing: Dealing) -> str:
    return f"model.micro_batch_size a multiple of algorithm.samples_per_prompt = {dealing.group}"


def _auto(
    hierarchy: Hierarchy,
    gating: RatioGating | None,
    dealing: Dealing,
    forward: float,
    recorded: tuple[str, Sequence[float]] | None,
) -> PassesCost:
    if not gates_can_pass(hierarchy, gating):
        return PassesCost((2.0, 2.0), (1.0 + forward,) * 2, "a gate never passes exactly: always two passes")
    coupled = gating is None or gating.stratum is not None
    split = dealing.cp > 1 and coupled and bool(hierarchy.active)
    if dealing.alone or (spanning(hierarchy, gating, dealing.whole_groups) is None and not split):
        return PassesCost((1.0, 1.0), (1.0, 1.0), "f is 0: no gate couples two micro-batches")
    if recorded is not None:
        run, shares = recorded
        return _of_shares([shares], forward, f"of {run}")
    if not _is_measured(hierarchy, gating, dealing):
        return PassesCost((1.0, 2.0), (1.0, 1.0 + forward), "f was not measured for this; --run takes it from a run")
    rows = WHOLE_GROUPS if dealing.whole_groups else SHUFFLED
    return _measured(rows, forward)


def _is_measured(hierarchy: Hierarchy, gating: RatioGating | None, dealing: Dealing) -> bool:
    """Measured is FiberPO with a chain, on whole sequences."""
    return gating is None and dealing.cp == 1 and not any(branch.enabled for branch in hierarchy.branches)


def _measured(rows: str, forward: float) -> PassesCost:
    runs = " and ".join(dict.fromkeys(entry.run for entry in MEASURED))
    shares = [entry.shares for entry in MEASURED if entry.rows == rows]
    return _of_shares(shares, forward, f"measured on {runs}, {rows}")


def _of_shares(shares: Sequence[Sequence[float]], forward: float, source: str) -> PassesCost:
    passes, costs = ([auto_forward_passes(one, forward) for one in shares], [auto_cost(one, forward) for one in shares])
    means = [sum(one) / len(one) for one in shares]
    f = " to ".join(dict.fromkeys(f"{mean:.2f}" for mean in (min(means), max(means))))
    return PassesCost((min(passes), max(passes)), (min(costs), max(costs)), f"f {f}, {source}")


def _advice(
    hierarchy: Hierarchy, gating: RatioGating | None, dealing: Dealing, forward: float, auto: PassesCost
) -> str | None:
    """For whole prompt groups, where auto costs less with them."""
    if dealing.whole_groups or not _is_measured(hierarchy, gating, dealing):
        return None
    better = _auto(hierarchy, gating, replace(dealing, whole_groups=True), forward, None)
    if better.cost[1] >= auto.cost[1]:
        return None
    needed = "" if dealing.micro % dealing.group == 0 else f"; it needs {_fitting(dealing)}"
    cost = " to ".join(dict.fromkeys(f"{value:.2f}" for value in better.cost))
    return f"algorithm.micro_batches: whole_groups lowers the cost of auto to {cost}{needed}"
