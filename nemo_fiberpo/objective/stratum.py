"""One stratum and its budgets: the parts that a user configures, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .levels import Level
from .wording import nearest


def positive_number(value: object, where: str) -> float:
    """`value` as a float, or a ValueError that names `where`: it must be a finite number above 0 (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: must be a number, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{where}: must be finite and greater than 0, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Budget:
    """Budgets C+ (`pos`) and C- (`neg`) of the two channels of a cell: the drift up to which its gate passes."""

    pos: float
    neg: float

    def __post_init__(self) -> None:
        for name in ("pos", "neg"):
            object.__setattr__(self, name, positive_number(getattr(self, name), name))


@dataclass(frozen=True)
class SlopeCap:
    """Rollback slope k = min(token count of the cell, `cap`)."""

    cap: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "cap", positive_number(self.cap, "cap"))


@dataclass(frozen=True)
class Stratum:
    """One level of the chain, or a branch.

    budget   the budgets of its cells; `budgets` overrides them for cells by name
    slope    rollback slope k of (10): None for the cell's token count, a number, or a SlopeCap
    enabled  a stratum that is switched off takes no part: as if it were not in the chain
    join     classifications whose common refinement this is: its cells are their intersections. Without it, tokens are
             labelled by the stratum's own name
    only     coarser stratum -> names of its cells: elsewhere this stratum is missing, and finer ones follow the coarser
    beside   of a branch: the stratum of the chain after which it is extracted; the finest one without it
    min_tokens  a cell with fewer live tokens, over all ranks, is merged into its parent: it has no drift of its own,
             and what is finer in it is measured from the parent. Without it every cell counts, even of one token
    """

    name: str
    budget: Budget
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    slope: float | SlopeCap | None = None
    enabled: bool = True
    join: tuple[str, ...] = ()
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beside: str | None = None
    min_tokens: int | None = None

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
        if floor is not None and (isinstance(floor, bool) or not isinstance(floor, int) or floor < 2):
            raise ValueError(
                f"min_tokens: must be a whole number of at least 2, got {floor!r}; leave it out for no floor"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The names under which the data labels tokens for this stratum."""
        return self.join or (self.name,)

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

    def resolve(self, level: Level) -> tuple[Tensor, Tensor]:
        """Budgets C [2, C] and rollback slopes k [C] of the cells of `level`, float64, on its device."""
        self.check_names(level.names)
        pairs = [[self.budget.pos, self.budget.neg]]
        if self.budgets:
            assert level.names is not None
            chosen = [self.budgets.get(name, self.budget) for name in level.names]
            pairs = [[budget.pos, budget.neg] for budget in chosen]
        table = torch.tensor(pairs, dtype=torch.float64, device=level.label_C.device).T
        index_C = level.label_C.clamp_min(0) if self.budgets else torch.zeros_like(level.label_C)
        if self.slope is None:
            slope_C = level.count_C
        elif isinstance(self.slope, SlopeCap):
            slope_C = level.count_C.clamp_max(self.slope.cap)
        else:
            slope_C = torch.full_like(level.count_C, self.slope)
        return table[:, index_C], slope_C


def _names(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: must be a list of names, got {value!r}")
    return tuple(value)
