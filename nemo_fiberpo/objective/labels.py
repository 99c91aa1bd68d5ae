"""Columns of labels -> the labels of every stratum at every token: joins, missing strata, memberships by share.

All of it is arithmetic on the labels of a token, so that it comes out the same on every rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..labelling.expert_partitions import MEMBERSHIP_UNITS
from ..values import nearest
from .gates import constant
from .stratum import Stratum

UNNAMED_LABELS = 1 << 31  # labels of a part of a join that has no names must be below it

Names = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Part:
    """A classification with names: that of a stratum itself, or a part of its join. The name of label v is
    names[v // stride % len(names)]."""

    name: str
    names: tuple[str, ...]
    stride: int = 1

    def value(self, label: Tensor) -> Tensor:
        """Index of the name of a label."""
        return label // self.stride % len(self.names)


@dataclass(frozen=True, eq=False)
class Column:
    """The labels of one stratum: one per entry, that is per token, or per token and value where a column is soft."""

    label_E: Tensor  # int64
    present_E: Tensor | None = None  # bool, entries that have a cell of this stratum; None for all of them
    names: tuple[str, ...] | None = None  # names of the labels, if they have names: label v is names[v]
    parts: tuple[Part, ...] = ()  # those parts of its join that have names
    soft: bool = False  # a token may lie in several of its cells

    def at(self, index: Tensor) -> Column:
        """The column of some of the entries."""
        present = None if self.present_E is None else self.present_E[index]
        return replace(self, label_E=self.label_E[index], present_E=present)

    def called(self, label: int) -> str:
        """A label for a message, with its name where it has one."""
        return f"{label} ({self.names[label]!r})" if self.names and 0 <= label < len(self.names) else str(label)

    def part_E(self, part: Part) -> Tensor:
        """Index of the name of each entry in a part; the number of names where the stratum is missing."""
        value_E = part.value(self.label_E)
        return value_E if self.present_E is None else torch.where(self.present_E, value_E, len(part.names))


@dataclass(frozen=True, eq=False)
class Membership:
    """Soft membership: a token has shares in the values of one column, such as the partitions of the experts.

    Token i and value e make an entry with share q_ie >= 0, sum_e q_ie = 1. Cells weigh entries by share:
        M_c^l = sum_{(i,e) in c} q_ie a_i^l / Q_c,    k = Q_c = sum_{(i,e) in c} q_ie,    L_i = sum_e q_ie L_ie
    Shares are integers in units of 1/UNIT, so that counts are exact however tokens are split over ranks.
    """

    column: str
    share_TQ: Tensor  # uint8 [T, Q], 0 at masked tokens; entries are token-major

    UNIT = MEMBERSHIP_UNITS

    def largest(self) -> Tensor:
        """The value in which each token has the largest share, the lowest of equal ones: int64 [T]."""
        return self.share_TQ.argmax(1)

    def entries(self, labels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Labels of entries, int64 [T Q], from those of tokens; and which entries have a share, bool [T Q]."""
        num, values = self.share_TQ.shape
        out = {name: label.repeat_interleave(values) for name, label in labels.items()}
        out[self.column] = torch.arange(values, device=self.share_TQ.device).repeat(num)
        return out, (self.share_TQ > 0).flatten()


def both(condition: Tensor, other: Tensor | None) -> Tensor:
    """condition & other, where None stands for all entries."""
    return condition if other is None else condition & other


def find_membership(
    labels: Mapping[str, Tensor], columns: Sequence[str], mask: Tensor | None, names: Names
) -> Membership | None:
    """The column of `columns` whose labels are shares, uint8 [T, Q], if there is one.

    Raises ValueError for two of them, for shares that do not sum to 255 at a live token, and where a column has other
    than Q names. What masked tokens hold is ignored.
    """
    given = {name: labels[name] for name in columns if isinstance(labels.get(name), Tensor)}
    soft = [name for name, label in given.items() if label.ndim == 2 and label.dtype == torch.uint8]
    if not soft:
        return None
    if len(soft) > 1:
        raise ValueError(f"labels[{soft[1]!r}]: is soft, as {soft[0]!r} is; one column at most can have shares")
    name, share_TQ = soft[0], labels[soft[0]]
    where = f"labels[{name!r}]"
    num, values = share_TQ.shape
    if name in names and len(names[name]) != values:
        raise ValueError(f"{where}: has shares in {values} values, but names[{name!r}] has {len(names[name])}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (num,) or mask.dtype != torch.bool:
            raise ValueError(f"mask: must be a tensor of torch.bool, a value for each of the {num} tokens of {where}")
        share_TQ = share_TQ * mask[:, None]
    total_T = share_TQ.sum(1, dtype=torch.int64)
    wrong_T = both(total_T != Membership.UNIT, mask)
    if bool(wrong_T.any()):
        index = int(wrong_T.nonzero()[0])
        raise ValueError(
            f"{where}: the shares of token {index} of the flat batch sum to {int(total_T[index])}; those of a live "
            f"token are in units of 1/{Membership.UNIT} and must sum to {Membership.UNIT}"
        )
    return Membership(name, share_TQ)


def check_labels(fields: Mapping[str, Tensor], mask: Tensor | None, shape: tuple[int, int] | None) -> int | None:
    """Number of tokens (None if nothing tells it), after the checks of type, dtype, dimension, length and shape."""
    wanted = [(name, label, torch.int64) for name, label in fields.items()]
    if mask is not None:
        wanted.append(("mask", mask, torch.bool))
    num_tokens = None
    for name, value, dtype in wanted:
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: must be a tensor of {dtype}, got {got}")
        if value.ndim != 1:
            raise ValueError(f"{name}: must have one dimension [T], got shape {list(value.shape)}")
        if num_tokens is None:
            num_tokens = value.numel()
        if value.numel() != num_tokens:
            raise ValueError(f"{name}: has {value.numel()} tokens, but {wanted[0][0]} has {num_tokens}")
    if shape is not None:
        if len(shape) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
            raise ValueError(f"shape: must be two integers (B, S), got {shape!r}")
        if num_tokens is not None and shape[0] * shape[1] != num_tokens:
            raise ValueError(f"shape: {shape[0]} x {shape[1]} is not the number of tokens, {num_tokens}")
        num_tokens = shape[0] * shape[1]
    return num_tokens


def resolve_labels(
    strata: Sequence[Stratum],
    branches: Collection[str],
    labels: Mapping[str, Tensor],
    mask: Tensor | None,
    names: Names,
    soft: str | None = None,
) -> dict[str, Column]:
    """The column of every one of `strata`, coarser ones first, from the labels and names of the data.

        a join    ((l_1 * n_2) + l_2) * n_3 + ..., called "a/b" where all parts have names; n is the number of a part's
                  names, `UNNAMED_LABELS` without names
        missing   a stratum with `only` is present only in the cells that it names

    `branches` are the names of branches, in which every live token must have a cell. `soft` is the column whose values
    are entries; a stratum made from it is soft, as are finer ones. Raises ValueError where labels are missing, where
    names are too few or not unique, or where a live token is in no cell (a negative label) of a join, a branch or a
    stratum with `only`. What masked tokens hold is ignored.
    """
    out: dict[str, Column] = {}
    above = False
    for stratum in strata:
        name = stratum.name
        divided = soft in stratum.columns or (above and name not in branches)
        above = above or divided
        if stratum.join and name in names:
            raise ValueError(f"names[{name!r}]: is a join, whose names are made from those of its parts")
        present = None
        for coarser, kept in stratum.only.items():
            present = both(_inside(stratum, coarser, kept, out[coarser]), present)
        here = mask if present is None else both(present, mask)
        if stratum.join:
            column = _join(stratum, labels, names, here)
        else:
            column = Column(labels[name], names=tuple(names[name]) if name in names else None)
            if stratum.only or name in branches:
                _refuse_outside(stratum, name, column.label_E, 0, None, here)
        out[name] = replace(column, present_E=present, soft=divided)
    for name, column in out.items():
        if column.names and not column.parts:
            here = mask if column.present_E is None else both(column.present_E, mask)
            _check_names(name, column.names, column.label_E, here)
    return out


def _check_names(name: str, names: Sequence[str], label: Tensor, here: Tensor | None) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"names[{name!r}]: names must be unique, got {list(names)}")
    unnamed = label[both((label < 0) | (label >= len(names)), here)]
    if unnamed.numel():
        raise ValueError(f"labels[{name!r}]: value {int(unnamed.min())} has no name; names[{name!r}] has {len(names)}")


def _inside(stratum: Stratum, coarser: str, kept: Sequence[str], column: Column) -> Tensor:
    """Bool: entries in the cells of `coarser` that are called one of `kept`."""
    where = f"stratum {stratum.name!r}, only.{coarser}"
    if column.names is None:
        raise ValueError(f"{where}: goes by name, so names[{coarser!r}] must list the names of its label values")
    for name in kept:
        if name not in column.names:
            raise ValueError(f"{where}: no cell of the data is called {name!r}{nearest(name, column.names)}")
    values = constant(tuple(map(column.names.index, kept)), torch.int64, column.label_E.device)
    return both(torch.isin(column.label_E, values), column.present_E)


def _join(stratum: Stratum, labels: Mapping[str, Tensor], names: Names, here: Tensor | None) -> Column:
    sizes = [len(names[part]) if part in names else UNNAMED_LABELS for part in stratum.join]
    if math.prod(sizes) > torch.iinfo(torch.int64).max:
        raise ValueError(
            f"stratum {stratum.name!r}, join: {sum(part not in names for part in stratum.join)} of its parts have no "
            "names; at most one can be without, or two if no other part has many"
        )
    joined, parts = torch.zeros_like(labels[stratum.join[0]]), []
    for index, (part, size) in enumerate(zip(stratum.join, sizes, strict=True)):
        _refuse_outside(stratum, part, labels[part], size, names.get(part), here)
        joined = joined * size + labels[part]
        if part in names:
            parts.append(Part(part, tuple(names[part]), math.prod(sizes[index + 1 :])))
    if len(parts) < len(stratum.join):
        return Column(joined, parts=tuple(parts))
    called = tuple("/".join(combined) for combined in itertools.product(*(part.names for part in parts)))
    return Column(joined, names=called, parts=tuple(parts))


def _refuse_outside(
    stratum: Stratum, column: str, label: Tensor, size: int, names: Sequence[str] | None, here: Tensor | None
) -> None:
    """Refuse an entry, of those `here`, that has no label in `column`, or for `size` > 0 one that is not below it."""
    wrong = both((label < 0) | (label >= size) if size else label < 0, here)
    if not bool(wrong.any()):
        return
    index = int(wrong.nonzero()[0])
    value = int(label[index])
    if value < 0:
        kind = "join" if stratum.join else "stratum" if stratum.only else "branch"
        why = f"token {index} of the flat batch is in no cell; the {kind} {stratum.name!r} needs one for every token"
        if stratum.only:
            why += " of the cells that `only` names"
    elif names is not None:
        why = f"has no name; names[{column!r}] has {len(names)}"
    else:
        why = f"labels without names must be below {size} to be joined in {stratum.name!r}"
    raise ValueError(f"labels[{column!r}]: value {value}: {why}")
