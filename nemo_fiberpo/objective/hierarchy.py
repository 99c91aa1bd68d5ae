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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .branches import BranchedCells, build_branched_cells, plan_visits
from .cells import Cells, build_cells, check_labels
from .labels import resolve_labels
from .levels import Part, Traits
from .membership import Membership, find_membership
from .stratum import Budget, SlopeCap, Stratum, positive_number
from .structure import check_data, check_structure
from .wording import nearest

__all__ = ["Budget", "Hierarchy", "SlopeCap", "Stratum", "positive_number"]


@dataclass(frozen=True)
class Hierarchy:
    """A chain of strata, coarsest first, down to the token, and the token clip eps.

    branches   further classifications of the same tokens that do not nest with the chain, see branches.py
    sweeps     how often the part of the chain that a branch stands beside, and the branch, are extracted in turn
    """

    strata: tuple[Stratum, ...]
    token_clip: float
    branches: tuple[Stratum, ...] = ()
    sweeps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "strata", tuple(self.strata))
        object.__setattr__(self, "token_clip", positive_number(self.token_clip, "token_clip"))
        object.__setattr__(self, "branches", tuple(self.branches))
        check_structure(self.strata, self.branches, self.sweeps)

    @property
    def active(self) -> tuple[Stratum, ...]:
        """The strata that are switched on: the chain, coarsest first, then the branches."""
        return self._chain + self._branches

    @property
    def _chain(self) -> tuple[Stratum, ...]:
        return tuple(stratum for stratum in self.strata if stratum.enabled)

    @property
    def _branches(self) -> tuple[Stratum, ...]:
        return tuple(branch for branch in self.branches if branch.enabled)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names under which the data must label tokens: those of the active strata, and the parts of joins."""
        return tuple(dict.fromkeys(column for stratum in self.active for column in stratum.columns))

    @property
    def optional_columns(self) -> frozenset[str]:
        """Those of `columns` that need no label (-1) for some tokens: they serve none but strata with `only`."""
        everywhere = {column for stratum in self.active if not stratum.only for column in stratum.columns}
        return frozenset(self.columns) - everywhere

    @property
    def num_reductions(self) -> int:
        """How often one evaluation calls `reduce`, the same on every rank: 2 without branches.

        2 for every visit to a stage, see branches.py: with b branches beside the finest stratum 2 (1 + b) sweeps. Finer
        strata after a stratum with branches are a stage of their own, which makes 2 more.
        """
        return 2 * len(self._visits)

    @property
    def _visits(self) -> tuple[range, ...]:
        chain = [stratum.name for stratum in self._chain]
        return plan_visits(len(chain), [chain.index(b.beside or chain[-1]) for b in self._branches], self.sweeps)

    def cells(
        self,
        labels: Mapping[str, Tensor],
        mask: Tensor | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Cells:
        """Cells of the active strata for the tokens of this rank.

        Args
            labels  stratum name -> int64 [T], a value per token, unique over the global batch; every name of `columns`
                    must be there, labels of other names are not read. Where `only` leaves a stratum out, its labels
                    are not read; for branches, joins and strata with `only` a negative label is no cell. One column
                    may be soft, uint8 [T, P]: the token's shares in P values in units of 1/255, which sum to 255, see
                    membership.py
            mask    bool [T], True for live tokens; all tokens are live without it. What a masked token holds is ignored
            names   stratum name -> names of its label values: value v is called names[stratum][v]. A stratum with
                    `budgets` overrides needs them
            shape   (B, S) says that [T] is a row-major flattened batch, T = B * S: for speed, and for messages

        Raises ValueError naming the field for a missing label, a wrong dtype, length or shape, a label without a name,
        an override that names no cell, for cells that do not nest (a prompt group with tokens in two domains), and for
        shares that do not sum to 255.

        SPMD: tokens are sharded; counts cover this rank until `Cells.share`, without which cells of a stratum with
        `min_tokens` are refused by whatever evaluates them.
        """
        names, known = names or {}, {stratum.name for stratum in (*self.strata, *self.branches)} | set(labels)
        for name in names:
            if name not in known:
                raise ValueError(f"names: no stratum is called {name!r}{nearest(name, known)}")
        soft = find_membership(labels, self.columns, mask, names)
        if soft is None:
            resolved, named, parts = self._resolve(labels, mask, names, shape)
        else:  # first as if it were hard: what is wrong with other columns is then said of tokens, not of their entries
            hard = {name: labels[name] for name in self.columns if name in labels} | {soft.column: soft.largest()}
            check_labels({f"labels[{name!r}]": label for name, label in hard.items()}, mask, shape)
            self._resolve(hard, mask, names, shape)
            resolved, named, parts = self._resolve(*soft.entries(hard), names, None)
        for stratum in self.active:
            stratum.check_names(named.get(stratum.name))
        chain, traits = [stratum.name for stratum in self._chain], self._traits(parts, soft)
        if self._branches:
            branches = [branch.name for branch in self._branches]
            return build_branched_cells(chain, branches, self._visits, resolved, mask, named, shape, traits, soft)
        return build_cells(chain, resolved, mask, named, shape, traits, soft)

    def _traits(self, parts: Mapping[str, tuple[Part, ...]], soft: Membership | None) -> dict[str, Traits]:
        out, column, within = {}, None if soft is None else soft.column, False
        for stratum in self._chain:
            within = within or column in stratum.columns  # and all that is finer
            out[stratum.name] = Traits(bool(stratum.only), stratum.min_tokens or 0, within, parts.get(stratum.name, ()))
        for branch in self._branches:
            out[branch.name] = Traits(soft=column in branch.columns, parts=parts.get(branch.name, ()))
        return out

    def check_data(
        self, labels: Mapping[str, Tensor], mask: Tensor | None = None, names: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Refuse, with an explanation, joins and branches that would count a drift twice with these labels.

        `labels`, `mask` and `names` as in `cells`, of a whole data set: one token per prompt will do. Labels that only
        a rollout has may be left out, with what is made from them. Raises ValueError.
        """
        here = {stratum.name for stratum in self.active if set(stratum.columns) <= set(labels)}
        chain = tuple(stratum for stratum in self._chain if stratum.name in here)
        branches = tuple(branch for branch in self._branches if branch.name in here)
        resolved, *_ = resolve_labels(chain, branches, labels, mask, names or {}, None)
        check_data(self._chain, self._branches, resolved, mask)

    def _resolve(
        self, labels: Mapping[str, Tensor], mask: Tensor | None, names: Mapping[str, Sequence[str]], shape: Any
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]], Mapping[str, tuple[Part, ...]]]:
        """Labels and names of the active strata, with joins and `only` worked in, and the named parts of joins."""
        if self._branches or any(stratum.join or stratum.only for stratum in self._chain):
            return resolve_labels(self._chain, self._branches, labels, mask, names, shape)
        return labels, names, {}

    def check_levels(self, cells: Cells) -> None:
        """Refuse cells that were built for other strata than the active ones."""
        wanted, held = [stratum.name for stratum in self.active], [level.name for level in cells.levels]
        if wanted != held:
            raise ValueError(f"cells: built for the strata {held}, but the hierarchy's active strata are {wanted}")
        visits = cells.visits if isinstance(cells, BranchedCells) else (range(len(held)),)
        if visits != self._visits:
            raise ValueError("cells: built for a hierarchy with other branches, or other `beside` or `sweeps` of them")
        for stratum, level in zip(self.active, cells.levels, strict=True):
            floor, built = stratum.min_tokens or 0, level.traits.min_tokens
            if floor != built:
                raise ValueError(f"cells: stratum {level.name!r} was built with min_tokens {built}, but it is {floor}")
            if floor and level.small_C is None:
                raise ValueError(
                    f"cells: stratum {level.name!r} merges cells of fewer than {floor} tokens over all ranks, which is "
                    "known once cells are shared; for one process: cells.share([cells.census()], 0)"
                )

    def describe(self) -> str:
        """One line per stratum, coarsest first, and the token clip; branches follow the chain."""
        lines = []
        for stratum in (*self.strata, *self.branches):
            slope = "token count" if stratum.slope is None else stratum.slope
            if isinstance(slope, SlopeCap):
                slope = f"min(token count, {slope.cap:g})"
            budget = f"C+ {stratum.budget.pos:g}  C- {stratum.budget.neg:g}  k {slope}"
            over = "".join(f"  {name}: C+ {b.pos:g} C- {b.neg:g}" for name, b in stratum.budgets.items())
            if stratum.join:
                over += f"  join of {', '.join(stratum.join)}"
            if stratum.min_tokens:
                over += f"  cells below {stratum.min_tokens} tokens merged"
            over += "".join(f"  only in {key} {', '.join(kept)}" for key, kept in stratum.only.items())
            if stratum in self.branches:
                over += f"  branch beside {stratum.beside or 'the finest stratum'}, {self.sweeps} x"
            lines.append(f"{stratum.name:<15} {budget}{over}" + ("" if stratum.enabled else "  (switched off)"))
        return "\n".join([*lines, f"{'token':<16}clip {self.token_clip:g}"])
