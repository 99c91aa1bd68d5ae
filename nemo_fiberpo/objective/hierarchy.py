"""A hierarchy: the chain of strata, its branches and the token clip, and the cells that it makes of labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..fields import setting
from ..values import nearest, positive_number
from .gates import Gate, constant, find_gate
from .labels import Names, check_labels, find_membership, resolve_labels
from .sharing import Cells, SharedCells, Stages, make_cells
from .stratum import Budget, Stratum, belongs_in_chain, check_structure, nothing_left


@dataclass(frozen=True)
class Hierarchy:
    """A chain of strata, coarsest first, down to the token, and the token clip eps.

    Budgets, the token clip and drifts are in units of the log-ratio (nats), averaged over the tokens of a cell.
    """

    strata: tuple[Stratum, ...] = setting(form="{name: stratum}, or list of strata")
    """The chain, coarsest first: every cell of a stratum lies in one cell of the stratum before it."""

    token_clip: float = setting(form="number, greater than 0")
    """Clip eps of (12) on what a token does beyond its finest cell, in nats of log-ratio."""

    branches: tuple[Stratum, ...] = setting((), form="{name: stratum}, or list of strata")
    """Classifications of the same tokens that do not nest with the chain (Remark 6.5)."""

    sweeps: int = setting(1, at_least=1)
    """How often branches and the part of the chain before them are extracted in turn (back-fitting). The drifts
    converge to the joint orthogonal projection."""

    token_clips: Mapping[str, float] = setting(default_factory=dict, form="{cell: number}")
    """Clip of single cells of the coarsest stratum, by name, in place of `token_clip`."""

    gate: Gate = setting("rollback", form="rollback, clip, soft, or package.module:function")  # made a Gate below
    """Shape of the gate past its budget, of every stratum that names none; `rollback` is the paper's (10)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strata", tuple(self.strata))
        object.__setattr__(self, "token_clip", positive_number(self.token_clip, "token_clip"))
        object.__setattr__(self, "branches", tuple(self.branches))
        object.__setattr__(self, "gate", find_gate(self.gate))
        if not isinstance(self.token_clips, Mapping):
            raise ValueError(f"token_clips: must be a mapping from names of cells to numbers, got {self.token_clips!r}")
        clips = {key: positive_number(value, f"token_clips.{key}") for key, value in self.token_clips.items()}
        object.__setattr__(self, "token_clips", clips)
        check_structure(self.strata, self.branches, self.sweeps)
        if clips and not self._chain:
            raise ValueError("token_clips: go by the cells of the coarsest stratum, but every stratum is switched off")

    def gate_of(self, stratum: Stratum) -> Gate:
        """The gate of a stratum of this hierarchy."""
        return stratum.gate or self.gate

    @cached_property
    def active(self) -> tuple[Stratum, ...]:
        """The strata that are switched on: the chain, coarsest first, then the branches."""
        return tuple(stratum for stratum in (*self.strata, *self.branches) if stratum.enabled)

    @cached_property
    def _chain(self) -> list[str]:
        """Names of the active strata of the chain."""
        return [stratum.name for stratum in self.strata if stratum.enabled]

    @cached_property
    def _beside(self) -> dict[str, str]:
        """Active branch -> the stratum of the chain that it stands beside."""
        return {branch.name: branch.beside or self._chain[-1] for branch in self.branches if branch.enabled}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names under which the data must label tokens: those of the active strata, and what joins join."""
        return tuple(dict.fromkeys(column for stratum in self.active for column in stratum.columns))

    @property
    def optional_columns(self) -> frozenset[str]:
        """Those of `columns` that need no label (-1) for some tokens: they serve none but strata with `only`."""
        everywhere = {column for stratum in self.active if not stratum.only for column in stratum.columns}
        return frozenset(self.columns) - everywhere

    @property
    def num_reductions(self) -> int:
        """How often one evaluation calls `reduce`, the same on every rank: 2 for every visit to a forest. That is 2
        without branches, and 2 (1 + b) sweeps with b branches beside the finest stratum."""
        return 2 * max(1, len(self.stages.visits))

    @cached_property
    def stages(self) -> Stages:
        """The forests, and the order in which they are extracted: a part of the chain and then the branches beside its
        last stratum, `sweeps` times over; then the next part."""
        size = len(self._chain)
        last = [self._chain.index(beside) for beside in self._beside.values()]
        forests: list[range] = []
        visits: list[int] = []
        first = 0
        for end in sorted({*last, size - 1} if size else ()):
            branches = [range(size + index, size + index + 1) for index, at in enumerate(last) if at == end]
            stage = [range(first, end + 1), *branches]
            visits += list(range(len(forests), len(forests) + len(stage))) * (self.sweeps if branches else 1)
            forests += stage
            first = end + 1
        floors = tuple(stratum.min_tokens or 0 for stratum in self.active)
        return Stages(tuple(stratum.name for stratum in self.active), size, tuple(forests), tuple(visits), floors)

    def cells(
        self,
        labels: Mapping[str, Tensor],
        mask: Tensor | None = None,
        names: Names | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Cells:
        """Cells of the active strata for the tokens of this rank.

        Args
            labels  stratum name -> int64 [T], a value per token, unique over the global batch; every name of `columns`
                    must be there, labels of other names are not read. Where `only` leaves a stratum out, its labels
                    are not read; for branches, joins and strata with `only` a negative label is no cell. One column
                    may be soft, uint8 [T, Q]: the token's shares in Q values in units of 1/255, which sum to 255, see
                    `labels.Membership`
            mask    bool [T], True for live tokens; all tokens are live without it. What a masked token holds is ignored
            names   stratum name -> names of its label values: value v is called names[stratum][v]. A stratum with
                    `budgets` overrides needs them
            shape   (B, S) says that [T] is a row-major flattened batch, T = B * S: for speed, and for messages

        Raises ValueError naming the field for a missing label, a wrong dtype, length or shape, a label without a name,
        an override that names no cell, for cells that do not nest (a prompt group with tokens in two domains), and for
        shares that do not sum to 255.

        SPMD: tokens are sharded; the cells stand for one process until they are shared, see `Cells.share`.
        """
        names, known = names or {}, {stratum.name for stratum in (*self.strata, *self.branches)} | set(labels)
        for name in names:
            if name not in known:
                raise ValueError(f"names: no stratum is called {name!r}{nearest(name, known)}")
        for stratum in self.active:
            for column in stratum.columns:
                if column not in labels:
                    given = ", ".join(map(repr, labels)) or "none"
                    what = "the join" if stratum.join else "the active stratum"
                    raise ValueError(f"labels: {what} {stratum.name!r} needs labels of {column!r} (given: {given})")
        soft = find_membership(labels, self.columns, mask, names)
        hard = {name: labels[name] for name in self.columns}
        if soft is not None:
            hard |= {soft.column: soft.largest()}
        some = hard or {name: label for name, label in labels.items() if isinstance(label, Tensor) and label.ndim == 1}
        num = check_labels({f"labels[{name!r}]": label for name, label in some.items()}, mask, shape)
        if num is None:
            raise ValueError("labels: with no active stratum, labels, mask or shape must tell the number of tokens")
        # First as if it were hard, so that errors in other columns name tokens and not their entries.
        columns = resolve_labels(self.active, self._beside, hard, mask, names)
        if soft is not None:
            columns = resolve_labels(self.active, self._beside, *soft.entries(hard), names, soft.column)
        for stratum in self.active:
            stratum.check_names(columns[stratum.name].names)
        if self.token_clips:
            self._check_clips(self.active[0].name, columns[self.active[0].name].names)
        cells = make_cells(self.stages, columns, num, mask, shape, soft)
        cells.census()  # refuses cells that do not nest
        return cells

    def _check_clips(self, coarsest: str, names: Sequence[str] | None) -> None:
        if names is None:
            raise ValueError(
                f"names: token_clips go by cells of {coarsest!r}, so names[{coarsest!r}] must list their names"
            )
        for key in self.token_clips:
            if key not in names:
                raise ValueError(f"token_clips.{key}: no cell of {coarsest!r} has this name{nearest(key, names)}")

    def clip_of(self, cells: SharedCells) -> Tensor:
        """The token clip eps of every joint cell, float64 [J]."""
        if not self.token_clips:
            return torch.full_like(cells.count_J, self.token_clip)
        coarsest = cells.levels[0]
        clips = tuple(self.token_clips.get(name, self.token_clip) for name in coarsest.names or ())
        return constant(clips, torch.float64, coarsest.label_C.device)[coarsest.label_C[coarsest.cell_J]]

    def check_data(self, labels: Mapping[str, Tensor], mask: Tensor | None = None, names: Names | None = None) -> None:
        """Refuse, with an explanation, joins and branches that would count a drift twice with these labels.

        `labels`, `mask` and `names` as in `cells`, of a whole data set: one token per prompt will do. Labels that only
        a rollout has may be left out, with what is made from them. A single batch is never held against a hierarchy:
        two classifications may coincide in it by chance. Raises ValueError.
        """
        here = [stratum for stratum in self.active if set(stratum.columns) <= set(labels)]
        columns = resolve_labels(here, self._beside, labels, mask, names or {})
        known = {name: label for name, label in labels.items() if isinstance(label, Tensor) and label.ndim == 1}
        above = torch.empty(0)
        for name, column in columns.items():  # where it is missing, tokens are told apart as in the stratum above
            label, present = column.label_E, column.present_E
            above = known[name] = label if present is None else torch.where(present, label, -1 - above.abs())

        def refines(finer: str, coarser: str) -> bool:
            if not {finer, coarser} <= set(known):
                return False
            pairs = torch.stack([known[name] if mask is None else known[name][mask] for name in (finer, coarser)])
            return bool(torch.unique(pairs, dim=1).shape[1] == torch.unique(pairs[0]).numel())

        for stratum in self.active:
            for part in stratum.join:
                if refines(part, stratum.name):
                    others = " and one ".join(other for other in stratum.join if other != part)
                    raise ValueError(
                        f"stratum {stratum.name!r}, join: in this data every {part} lies in one {others}, so the join "
                        f"is {part} itself; use {part} in its place"
                    )
        chain = self._chain
        for index, (branch, beside) in enumerate(self._beside.items()):
            for taken in (beside, *(other for other, at in list(self._beside.items())[:index] if at == beside)):
                if refines(taken, branch):
                    raise ValueError(f"branch {branch!r}: in this data {nothing_left(branch, taken)}")
            following = chain[chain.index(beside) + 1 :]
            if refines(branch, beside) and (not following or refines(following[0], branch)):
                raise ValueError(f"branch {branch!r}: in this data {belongs_in_chain(branch, beside)}")

    def check_cells(self, cells: SharedCells) -> None:
        """Refuse cells that were built for other strata than the active ones."""
        wanted, held = self.stages, cells.stages
        if wanted.strata != held.strata:
            raise ValueError(
                f"cells: built for the strata {list(held.strata)}, but the hierarchy's active strata are "
                f"{list(wanted.strata)}"
            )
        if (wanted.forests, wanted.visits) != (held.forests, held.visits):
            raise ValueError("cells: built for a hierarchy with other branches, or other `beside` or `sweeps` of them")
        for name, floor, built in zip(wanted.strata, wanted.min_tokens, held.min_tokens, strict=True):
            if floor != built:
                raise ValueError(f"cells: stratum {name!r} was built with min_tokens {built}, but it is {floor}")

    def describe(self) -> str:
        """One line per stratum, coarsest first, and the token clip; branches follow the chain."""
        beside = ((branch, branch.beside or "the finest stratum") for branch in self.branches)
        lines = [stratum.describe() for stratum in self.strata]
        lines += [branch.describe(f"  branch beside {at}, {self.sweeps} x") for branch, at in beside]
        clips = "".join(f"  {name}: {clip:g}" for name, clip in self.token_clips.items())
        return "\n".join([*lines, f"{'token':<16}clip {self.token_clip:g}{clips}", f"{'gate':<16}{self.gate.name}"])


def build_cells(
    strata: Sequence[str],
    labels: Mapping[str, Tensor],
    mask: Tensor | None = None,
    names: Names | None = None,
    shape: tuple[int, int] | None = None,
) -> Cells:
    """Cells of the chain `strata` (coarsest first); arguments, errors and SPMD layout as in `Hierarchy.cells`.

    Serves where no hierarchy is at hand: `build_cells(["trajectory"], {"trajectory": ids}, mask)` counts trajectories
    for `token_weights`.
    """
    chain = tuple(Stratum(name, Budget(1.0, 1.0)) for name in strata)
    return Hierarchy(chain, token_clip=1.0).cells(labels, mask, names, shape)
