"""Forests of cells: the nodes of one stage, and the linear maps between joint cells, nodes and their parents.

Legend of the suffixes used in this package
    _T    tokens of this rank, flattened; live tokens are those the mask keeps
    _PS   pieces of consecutive entries, and the places in them (`kernels.TokenLayout`); _P one value a piece
    _J    joint cells of this rank: what tells two of its tokens apart at all, the finest cell of the chain joined with
          that of every branch
    _N    nodes of a forest, coarser strata first, hence parents before children
    _K    the strata of a forest, coarsest first
    _C    cells of one stratum that this rank holds, in ascending order of their label
    _2x   channel by x: row 0 the positive channel, row 1 the negative one (equation (13): positive where ell >= 0)

An index that is as large as what it points into means nothing there: a root's parent, a stratum that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .labels import Column


def read(value: Tensor, index: Tensor) -> Tensor:
    """value[..., index], and 0 where the index is the size of the last axis."""
    return torch.cat([value, value.new_zeros(*value.shape[:-1], 1)], -1)[..., index]


class SegmentSum:
    """Sums of entries by segment: v [..., entries] -> [..., num], v at `index` [entries] added to its segment.

    An entry whose index is `num` belongs to none. Entries are added in their order, so that the same input gives the
    same bits, on a GPU too.
    """

    def __init__(self, index: Tensor, num: int, modulus: int | None = None) -> None:
        """With `modulus` entry e stands for v[..., e % modulus]."""
        self.length = torch.bincount(index, minlength=num + 1)[:num]
        self.order = torch.argsort(index, stable=True)[: int(self.length.sum())]
        if modulus is not None:
            self.order = self.order % modulus

    def __call__(self, value: Tensor) -> Tensor:
        lead = value.shape[:-1]
        rows = lead.numel()
        if not rows or not self.length.numel():
            return value.new_zeros(*lead, self.length.numel())
        flat = value[..., self.order].reshape(-1)
        return torch.segment_reduce(flat, "sum", lengths=self.length.repeat(rows), unsafe=True).view(*lead, -1)


@dataclass(frozen=True, eq=False)
class Slots:
    """The nodes of this rank that other ranks hold too, `held`, and their `place` among all `total` shared ones."""

    held: Tensor
    place: Tensor
    total: int

    def pack(self, value: Tensor) -> Tensor:
        """What this rank contributes to the shared buffer: [..., nodes] -> [..., total]."""
        out = value.new_zeros(*value.shape[:-1], self.total)
        out[..., self.place] = value[..., self.held]
        return out

    def unpack(self, value: Tensor, summed: Tensor) -> Tensor:
        """`value` with what the ranks together have at shared nodes, from the summed buffer."""
        out = value.clone()
        out[..., self.held] = summed[..., self.place]
        return out


@dataclass(frozen=True, eq=False)
class Forest:
    """The cells of consecutive strata of the chain, or of one branch, that have a gate of their own.

    A stratum that is missing, or a cell below its floor, is a node that is not there: what is finer hangs from the next
    node above it.

    strata     the indices of its strata among the active ones, coarsest first
    ends       node number at which each stratum ends; its nodes follow those of the one before it
    parent_N   node above, N at a root
    node_KJ    node of each stratum that holds a joint cell, N where there is none
    leaf_J     the finest of them
    count_N    live tokens over all ranks, float64
    cell_N     the node's cell in its `sharing.Level`
    slots      of the nodes that several ranks hold
    """

    strata: range
    ends: tuple[int, ...]
    parent_N: Tensor
    node_KJ: Tensor
    leaf_J: Tensor
    count_N: Tensor
    cell_N: Tensor
    slots: Slots
    _up: SegmentSum = field(init=False, repr=False)
    _leaves: SegmentSum = field(init=False, repr=False)
    _children: SegmentSum = field(init=False, repr=False)

    @property
    def slices(self) -> dict[int, slice]:
        """The nodes of each stratum, by its index."""
        return {
            stratum: slice(start, end)
            for stratum, start, end in zip(self.strata, (0, *self.ends), self.ends, strict=False)
        }

    def __post_init__(self) -> None:
        num = self.count_N.numel()
        object.__setattr__(self, "_up", SegmentSum(self.node_KJ.flatten(), num, max(self.leaf_J.numel(), 1)))
        object.__setattr__(self, "_leaves", SegmentSum(self.leaf_J, num))
        object.__setattr__(self, "_children", SegmentSum(self.parent_N, num))

    def up(self, value_J: Tensor) -> Tensor:
        """Sums of the joint cells under every node: [..., J] -> [..., N]."""
        return self._up(value_J)

    def at_leaves(self, value_J: Tensor) -> Tensor:
        """Sums of joint cells at their deepest nodes alone: [..., J] -> [..., N], the transpose of `at`."""
        return self._leaves(value_J)

    def at(self, value_N: Tensor) -> Tensor:
        """A node's value read at the joint cells whose deepest node it is: [..., N] -> [..., J]."""
        return read(value_N, self.leaf_J)

    def path(self, value_N: Tensor) -> Tensor:
        """Sum over the path from the deepest node of a joint cell to the root: [..., N] -> [..., J], the transpose of
        `up`."""
        return read(value_N, self.node_KJ).sum(-2)

    def minus_parent(self, value_N: Tensor) -> Tensor:
        """v_n - v_parent(n), and v_n at a root."""
        return value_N - read(value_N, self.parent_N)

    def minus_children(self, value_N: Tensor) -> Tensor:
        """v_n - the sum of v over the children of n, the transpose of `minus_parent`."""
        return value_N - self._children(value_N)


class CellsOfStratum(Protocol):
    """What a forest is built from, see `sharing.Level`."""

    @property
    def cell_J(self) -> Tensor: ...
    @property
    def count_C(self) -> Tensor: ...
    @property
    def acting_C(self) -> Tensor: ...
    @property
    def slots(self) -> Slots: ...


def build_forest(strata: range, levels: Sequence[CellsOfStratum]) -> Forest:
    """The forest of the acting cells of the nested `strata`, out of the levels of all active ones."""
    num = sum(int(levels[stratum].acting_C.sum()) for stratum in strata)
    above_J = torch.full_like(levels[strata[0]].cell_J, num)
    nodes, parents, cells, counts, held, place, ends, total = [], [], [], [], [], [], [0], 0
    for stratum in strata:
        level = levels[stratum]
        cell_N = level.acting_C.nonzero().squeeze(1)
        node_C = torch.full((level.count_C.numel() + 1,), num, device=cell_N.device)
        node_C[cell_N] = torch.arange(len(cell_N), device=cell_N.device) + ends[-1]
        node_J = node_C[level.cell_J]
        parent_N = torch.full((num + 1,), num, device=cell_N.device).index_copy_(0, node_J, above_J)
        ends.append(ends[-1] + len(cell_N))
        parents.append(parent_N[ends[-2] : ends[-1]])
        above_J = torch.where(node_J < num, node_J, above_J)
        acts = node_C[level.slots.held] < num
        nodes.append(node_J)
        cells.append(cell_N)
        counts.append(level.count_C[cell_N])
        held.append(node_C[level.slots.held[acts]])
        place.append(level.slots.place[acts] + total)
        total += level.slots.total
    return Forest(
        strata=strata,
        ends=tuple(ends[1:]),
        parent_N=torch.cat(parents),
        node_KJ=torch.stack(nodes),
        leaf_J=above_J,
        count_N=torch.cat(counts),
        cell_N=torch.cat(cells),
        slots=Slots(torch.cat(held), torch.cat(place), total),
    )


def dense_ids(label_E: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distinct labels, ascending, and the index of each entry's label among them: their number where not present. By a
    table where labels are close to each other."""
    if present_E is not None:
        label_C, cell = dense_ids(label_E[present_E])
        return label_C, torch.full_like(label_E, label_C.numel()).masked_scatter_(present_E, cell)
    if label_E.numel() == 0:
        return label_E, label_E
    low, high = (int(end) for end in torch.aminmax(label_E))
    if high - low >= 4 * label_E.numel() + 1024:
        label_C, cell = torch.unique(label_E, return_inverse=True)
        return label_C, cell
    found = torch.zeros(high - low + 1, dtype=torch.int64, device=label_E.device).index_fill_(0, label_E - low, 1)
    return found.nonzero().squeeze(1) + low, (found.cumsum(0) - 1)[label_E - low]


def join(columns: Sequence[Column], num: int, device: torch.device) -> tuple[Tensor, list[Column], int]:
    """The joint cell of each of `num` entries, the columns of the joint cells, and how many there are."""
    joint, found = torch.zeros(num, dtype=torch.int64, device=device), min(num, 1)
    for column in columns:
        label_C, cell = dense_ids(column.label_E, column.present_E)
        known, joint = dense_ids(joint * (label_C.numel() + 1) + cell)
        found = known.numel()
    some_J = joint.new_zeros(found).scatter_(0, joint, torch.arange(num, device=device))
    return joint, [column.at(some_J) for column in columns], found


def rows_of(
    columns: Sequence[Column], mask: Tensor | None, batch: tuple[int, int]
) -> tuple[Tensor, list[Column], Tensor] | None:
    """The rows with live tokens, their columns and their numbers of live tokens, if the live tokens of each row have
    equal labels; else None. What masked tokens hold is not looked at."""
    rows, length = batch
    if not rows * length:
        return None
    if mask is None:
        first_R = torch.arange(rows, device=columns[0].label_E.device if columns else None) * length
        tokens_R = torch.full_like(first_R, length)
    else:
        live = mask.view(batch)
        tokens_R = live.sum(1)
        first_R = live.to(torch.uint8).argmax(1) + torch.arange(rows, device=mask.device) * length
    for column in columns:
        for value in (column.label_E, column.present_E):
            if value is None:
                continue
            same = value.view(batch) == value[first_R, None]
            if not bool((same if mask is None else same | ~live).all()):
                return None
    at_R = tokens_R.nonzero().squeeze(1)
    return at_R, [column.at(first_R[at_R]) for column in columns], tokens_R[at_R]
