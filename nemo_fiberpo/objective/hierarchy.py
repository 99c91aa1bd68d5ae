"""Strata, budgets and their order: what a user configures, checked when it is made.

Legend of the suffixes used in this package
    _T    tokens of this rank, flattened; live tokens are those the mask keeps
    _K    active strata, coarsest first (K = how many); level n is the n-th of them, level K-1 the finest
    _C    cells of one level that hold a live token of this rank, in ascending order of their label
    _2C   channel by cell: row 0 the positive channel, row 1 the negative one (EQUATIONS (13): label +1 where ell >= 0)
    _P    pieces: the rows of a flattened batch, or the cells of the finest level themselves (see layout.py)

Budgets, the token clip and drifts are in units of the log-ratio (nats), averaged over the tokens of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cells import Cells, build_cells
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
    """One level of the chain.

    budget   the budgets of its cells; `budgets` overrides them for cells by name
    slope    rollback slope k of (10): None for the cell's token count, a number, or a SlopeCap
    enabled  a stratum that is switched off takes no part: as if it were not in the chain
    """

    name: str
    budget: Budget
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    slope: float | SlopeCap | None = None
    enabled: bool = True

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
        index_C = level.label_C if self.budgets else torch.zeros_like(level.label_C)
        if self.slope is None:
            slope_C = level.count_C
        elif isinstance(self.slope, SlopeCap):
            slope_C = level.count_C.clamp_max(self.slope.cap)
        else:
            slope_C = torch.full_like(level.count_C, self.slope)
        return table[:, index_C], slope_C


@dataclass(frozen=True)
class Hierarchy:
    """A chain of strata, coarsest first, down to the token, and the token clip eps."""

    strata: tuple[Stratum, ...]
    token_clip: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "strata", tuple(self.strata))
        object.__setattr__(self, "token_clip", positive_number(self.token_clip, "token_clip"))
        if not self.strata:
            raise ValueError("strata: at least one stratum is required")
        seen: dict[str, int] = {}
        for index, stratum in enumerate(self.strata):
            if stratum.name in seen:
                raise ValueError(
                    f"strata[{index}].name: {stratum.name!r} is already the name of strata[{seen[stratum.name]}]; "
                    "names must be unique"
                )
            seen[stratum.name] = index

    @property
    def active(self) -> tuple[Stratum, ...]:
        """The strata that are switched on, coarsest first."""
        return tuple(stratum for stratum in self.strata if stratum.enabled)

    def cells(
        self,
        labels: Mapping[str, Tensor],
        mask: Tensor | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Cells:
        """Cells of the active strata for the tokens of this rank.

        Args
            labels  stratum name -> int64 [T], a value per token, unique over the global batch; every active stratum
                    must be there, labels of other names are not read
            mask    bool [T], True for live tokens; all tokens are live without it. What a masked token holds is ignored
            names   stratum name -> names of its label values: value v is called names[stratum][v]. A stratum with
                    `budgets` overrides needs them
            shape   (B, S) says that [T] is a row-major flattened batch, T = B * S: for speed, and for messages

        Raises ValueError naming the field for a missing label, a wrong dtype, length or shape, a label without a name,
        an override that names no cell, and for cells that do not nest (a prompt group with tokens in two domains).

        SPMD: tokens are sharded; counts cover this rank until `Cells.share`.
        """
        known = {stratum.name for stratum in self.strata} | set(labels)
        for name in names or {}:
            if name not in known:
                raise ValueError(f"names: no stratum is called {name!r}{nearest(name, known)}")
        for stratum in self.active:
            stratum.check_names((names or {}).get(stratum.name))
        return build_cells([stratum.name for stratum in self.active], labels, mask, names or {}, shape)

    def check_levels(self, cells: Cells) -> None:
        """Refuse cells that were built for other strata than the active ones."""
        wanted, held = [stratum.name for stratum in self.active], [level.name for level in cells.levels]
        if wanted != held:
            raise ValueError(f"cells: built for the strata {held}, but the hierarchy's active strata are {wanted}")

    def describe(self) -> str:
        """One line per stratum, coarsest first, and the token clip."""
        lines = []
        for stratum in self.strata:
            slope = "token count" if stratum.slope is None else stratum.slope
            if isinstance(slope, SlopeCap):
                slope = f"min(token count, {slope.cap:g})"
            budget = f"C+ {stratum.budget.pos:g}  C- {stratum.budget.neg:g}  k {slope}"
            over = "".join(f"  {name}: C+ {b.pos:g} C- {b.neg:g}" for name, b in stratum.budgets.items())
            lines.append(f"{stratum.name:<16}{budget}{over}" + ("" if stratum.enabled else "  (switched off)"))
        return "\n".join([*lines, f"{'token':<16}clip {self.token_clip:g}"])
