"""Strata and budgets, and which strata may stand together: what a user configures, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fields import Settings, setting
from ..values import nearest, positive_number, short, whole_number
from .gates import Gate, constant, find_gate


@dataclass(frozen=True)
class Budget(Settings):
    """Budgets of the two channels of a cell: the drift up to which its gate passes, in nats of log-ratio per token."""

    pos: float = setting(above=0)
    """C+, for log-probs that rise."""

    neg: float = setting(above=0)
    """C-, for log-probs that fall."""


@dataclass(frozen=True)
class SlopeCap(Settings):
    """Rollback slope k = min(token count of the cell, `cap`)."""

    cap: float = setting(above=0)
    """Largest slope."""


@dataclass(frozen=True)
class Stratum:
    """One level of the chain, or a branch."""

    name: str = setting()
    """Name of the stratum, and of the label that the data give it. In a mapping it is the key."""

    budget: Budget = setting(form="{pos: number, neg: number}, both greater than 0")
    """Budgets of its cells, in nats of log-ratio per token: C+ for upward and C- for downward drift."""

    budgets: Mapping[str, Budget] = setting(default_factory=dict, form="{cell: {pos: number, neg: number}}")
    """Budgets of single cells, by name, in place of `budget`."""

    slope: float | SlopeCap | None = setting(None, form="number greater than 0, {cap: number}, or null")
    """Rollback slope k of (10): how steeply the gate falls past its budget. `{cap: k}` is the cell's token count, at
    most k; null is the token count."""

    enabled: bool = setting(True)
    """`false` switches the stratum off, as if it were not in the hierarchy."""

    join: tuple[str, ...] = setting((), form="list of names")
    """Classifications whose intersections are the cells. Without it the data label the stratum by its own name."""

    only: Mapping[str, tuple[str, ...]] = setting(default_factory=dict, form="{coarser stratum: list of its cells}")
    """Cells of a coarser stratum in which this stratum exists. Elsewhere the level is missing."""

    beside: str | None = setting(None, form="name of a stratum, or null")
    """Of a branch: the stratum of the chain after which it is extracted; null: the finest."""

    min_tokens: int | None = setting(None, form="whole number, at least 2, or null")
    """A cell with fewer live tokens, over all ranks, is merged into its parent: it has no drift of its own, and finer
    cells in it are measured from the parent. null: every cell counts, even of one token."""

    gate: Gate | None = setting(
        None, form="rollback, clip, soft, package.module:function, or null"
    )  # made a Gate below
    """Shape of the gate past its budget, see docs/hierarchy.md; null is that of the hierarchy."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: must be a non-empty string, got {self.name!r}")
        if not isinstance(self.budget, Budget):
            raise ValueError(f"budget: must be a Budget, got {self.budget!r}")
        for key, budget in self.budgets.items():
            if not isinstance(budget, Budget):
                raise ValueError(f"budgets.{key}: must be a Budget, got {budget!r}")
        if self.slope is not None and not isinstance(self.slope, SlopeCap):
            object.__setattr__(self, "slope", positive_number(self.slope, "slope"))
        if not isinstance(self.enabled, bool):
            raise ValueError(f"enabled: must be true or false, got {self.enabled!r}")
        object.__setattr__(self, "join", _names(self.join, "join"))
        if not isinstance(self.only, Mapping):
            raise ValueError(f"only: must be a mapping from a coarser stratum to names of its cells, got {self.only!r}")
        object.__setattr__(self, "only", {key: _names(value, f"only.{key}") for key, value in self.only.items()})
        for key, kept in self.only.items():
            if not kept:
                raise ValueError(f"only.{key}: must name at least one cell; switch the stratum off to leave it out")
        if self.beside is not None and not isinstance(self.beside, str):
            raise ValueError(f"beside: must be the name of a stratum, got {self.beside!r}")
        floor = self.min_tokens
        if floor is not None and (isinstance(floor, bool) or not isinstance(floor, int) or not 2 <= floor < 2**63):
            raise ValueError(
                f"min_tokens: must be a whole number of at least 2, got {short(floor)}; leave it out for no floor"
            )
        if self.gate is not None:
            object.__setattr__(self, "gate", find_gate(self.gate))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names under which the data labels tokens for this stratum."""
        return self.join or (self.name,)

    def describe(self, role: str = "") -> str:
        """One line; `role` of a branch."""
        slope = "token count" if self.slope is None else self.slope
        if isinstance(slope, SlopeCap):
            slope = f"min(token count, {slope.cap:g})"
        phrases = [f"{self.name:<15} C+ {self.budget.pos:g}  C- {self.budget.neg:g}  k {slope}"]
        phrases += [f"{name}: C+ {budget.pos:g} C- {budget.neg:g}" for name, budget in self.budgets.items()]
        phrases += [f"gate {self.gate.name}"] if self.gate is not None else []
        phrases += [f"join of {', '.join(self.join)}"] if self.join else []
        phrases += [f"cells below {self.min_tokens} tokens merged"] if self.min_tokens else []
        phrases += [f"only in {key} {', '.join(kept)}" for key, kept in self.only.items()]
        return "  ".join(phrases) + role + ("" if self.enabled else "  (switched off)")

    def check_names(self, names: Sequence[str] | None) -> None:
        """Refuse overrides without names of cells, or an override that none of the names matches."""
        if self.budgets and names is None:
            raise ValueError(
                f"names: stratum {self.name!r} overrides the budgets of {sorted(self.budgets)}, "
                f"so names[{self.name!r}] must list the names of its label values"
            )
        for key in self.budgets:
            if names is not None and key not in names:
                raise ValueError(
                    f"stratum {self.name!r}, budgets.{key}: no cell of the data has this name{nearest(key, names)}"
                )

    def bounds_of(self, label: Tensor, count: Tensor, names: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """Budgets C [2, n] and rollback slopes k [n] of cells, float64, from their labels and token counts [n]; `names`
        are those of the stratum's labels."""
        self.check_names(names)
        budgets = [self.budgets.get(name, self.budget) for name in names or ()] if self.budgets else [self.budget]
        pairs = tuple((budget.pos, budget.neg) for budget in budgets)
        table = constant(pairs, count.dtype, count.device).T
        budget = table[:, label] if self.budgets else table.expand(2, len(count))
        if isinstance(self.slope, SlopeCap):
            return budget, count.clamp_max(self.slope.cap)
        return budget, count if self.slope is None else torch.full_like(count, self.slope)


def _names(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: must be a list of names, got {value!r}")
    return tuple(value)


def check_structure(strata: Sequence[Stratum], branches: Sequence[Stratum], sweeps: object) -> None:
    """Refuse strata that do not fit together; ValueError names the field."""
    if not strata:
        raise ValueError("strata: at least one stratum is required")
    if whole_number(sweeps, "sweeps", 1) > 1 and not branches:
        raise ValueError("sweeps: repeats the extraction of branches, but there are none; a chain is exact at once")
    placed = {f"strata[{index}]": stratum for index, stratum in enumerate(strata)}
    placed |= {f"branches[{index}]": branch for index, branch in enumerate(branches)}
    seen: dict[str, str] = {}
    for where, stratum in placed.items():
        if stratum.name in seen:
            why = "names must be unique"
            if where.startswith("branches"):
                why = "the same classification twice would count its drift twice"
            raise ValueError(f"{where}.name: {stratum.name!r} is already the name of {seen[stratum.name]}; {why}")
        seen[stratum.name] = where
    for where, stratum in placed.items():
        if stratum.join:
            _check_join(where, stratum, placed, [other.name for other in strata])
    for index, stratum in enumerate(strata):
        if stratum.beside is not None:
            raise ValueError(
                f"strata[{index}].beside: is for branches; a stratum of the chain stands where the list has it"
            )
        _check_only(f"strata[{index}].only", stratum, strata, index)
        if stratum.min_tokens and stratum.enabled and not any(other.enabled for other in strata[:index]):
            raise ValueError(
                f"strata[{index}].min_tokens: {stratum.name!r} is the coarsest active stratum, so that its small cells "
                "have no parent to be merged into"
            )
    for index, branch in enumerate(branches):
        _check_branch(f"branches[{index}]", branch, strata, branches[:index])


def _check_join(where: str, stratum: Stratum, placed: Mapping[str, Stratum], chain: Sequence[str]) -> None:
    for index, column in enumerate(stratum.join):
        if column == stratum.name:
            raise ValueError(
                f"{where}.join: names {column!r} itself, whose name it has; give the join a name of its own"
            )
        if column in stratum.join[:index]:
            raise ValueError(f"{where}.join: names {column!r} twice; a classification joined with itself is itself")
        inner = next((other for other in placed.values() if other.name == column and other.join), None)
        if inner is not None:
            raise ValueError(f"{where}.join: {column!r} is a join; name what it joins instead: {list(inner.join)}")
    if len(stratum.join) < 2:
        raise ValueError(f"{where}.join: must name two or more classifications, got {list(stratum.join)}")
    nested = [name for name in chain if name in stratum.join]
    if len(nested) > 1:
        raise ValueError(
            f"{where}.join: every {nested[1]} lies in one {nested[0]}, since both are in the chain: their join is "
            f"{nested[1]} itself, whose drift counts there already"
        )
    if stratum.name in chain and nested and chain.index(nested[0]) > chain.index(stratum.name):
        raise ValueError(
            f"{where}.join: {nested[0]!r} is coarser than the join that refines it, but stands after it; strata are "
            "listed coarsest first"
        )
    for there, other in placed.items():
        if there == where:
            return
        if other.enabled and stratum.enabled and set(other.join) == set(stratum.join):
            raise ValueError(
                f"{where}.join: {there} ({other.name!r}) is the join of the same classifications; the same "
                "classification twice would count its drift twice"
            )


def _check_only(where: str, stratum: Stratum, strata: Sequence[Stratum], place: int) -> None:
    coarser = {other.name: other for other in strata[:place]}
    for name in stratum.only:
        if name not in coarser:
            later = any(other.name == name for other in strata)
            why = "is not coarser than this stratum" if later else "is no stratum of the chain"
            raise ValueError(f"{where}.{name}: {why}; name one that stands before it{nearest(name, coarser)}")
        if stratum.enabled and not coarser[name].enabled:
            raise ValueError(f"{where}.{name}: is switched off")


def _check_branch(where: str, branch: Stratum, strata: Sequence[Stratum], earlier: Sequence[Stratum]) -> None:
    if branch.only:
        raise ValueError(
            f"{where}.only: a branch must cover every token, else its means are no projection; label the others with a "
            "cell of their own"
        )
    if branch.min_tokens is not None:
        raise ValueError(
            f"{where}.min_tokens: a branch has no parent that its small cells could be merged into; the token's own "
            "residual is measured from the chain and the branch together"
        )
    names = [stratum.name for stratum in strata]
    if branch.beside is not None and branch.beside not in names:
        known = nearest(branch.beside, names)
        raise ValueError(f"{where}.beside: no stratum of the chain is called {branch.beside!r}{known}")
    if not branch.enabled:
        return
    active = [stratum for stratum in strata if stratum.enabled]
    if not active:
        raise ValueError(f"{where}: a branch stands beside a chain, but every stratum is switched off")
    beside = branch.beside or active[-1].name
    if beside not in [stratum.name for stratum in active]:
        raise ValueError(f"{where}.beside: {beside!r} is switched off")
    above = strata[: names.index(beside) + 1]
    taken = {name for stratum in above if not stratum.only for name in (stratum.name, *stratum.columns)}
    if set(branch.columns) <= taken:
        raise ValueError(f"{where}: {nothing_left(branch.name, beside)}")
    if beside == active[-1].name and set(active[-1].columns) <= set(branch.columns):
        raise ValueError(f"{where}: {belongs_in_chain(branch.name, beside)}")
    for other in earlier:
        if other.enabled and (other.beside or active[-1].name) == beside and set(branch.columns) <= set(other.columns):
            raise ValueError(f"{where}: {nothing_left(branch.name, other.name)}")


def nothing_left(name: str, finer: str) -> str:
    """Why a branch that is coarser than what was extracted before it makes no sense."""
    return (
        f"every {finer} lies in one {name}, so the drift of {name} is part of what {finer} has taken, and counts there "
        f"already: nothing would be left for the budget of {name}. Put {name} before {finer}: into `strata`, if they "
        "nest there, or as a branch beside a coarser stratum"
    )


def belongs_in_chain(name: str, coarser: str) -> str:
    """Why a branch that nests with the chain makes no sense."""
    return (
        f"every {name} lies in one {coarser}, and finer strata in one {name}: it nests, so it belongs into `strata`, "
        f"after {coarser}, where its drift is counted beyond that of {coarser}"
    )
