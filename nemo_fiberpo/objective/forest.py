"""Forests of cells, and the linear maps between joint cells, the nodes of a forest and their parents.

Suffixes used in this package
    _T    tokens of this rank, flattened; live tokens are those the mask keeps
    _PS   pieces of consecutive entries, and the places in them (`kernels.TokenLayout`); _P one value per piece
    _J    joint cells of this rank: the finest cells of the chain, joined with those of every branch. Two tokens of one
          joint cell are treated alike
    _N    nodes of a forest, coarser strata first, hence parents before children
    _K    strata of a forest, coarsest first
    _C    cells of one stratum that this rank holds, in ascending order of their label
    _2x   channel by x: row 0 the positive channel, row 1 the negative one ((13): positive where ell >= 0)

An index equal to the size of what it points into means "none": a root's parent, a stratum that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .labels import Column, Part


def read(value: Tensor, index: Tensor) -> Tensor:
    """value[..., index], and 0 where the index is the size of the last axis."""
    return torch.cat([value, value.new_zeros(*value.shape[:-1], 1)], -1)[..., index]


class SegmentSum:
    """Sums by segment: v [..., E] -> [..., num], where v[..., e] is added to segment index[..., e].

    With an index of several rows [K, E] every v[..., e] is added K times. An index of `num` drops the value. Values are
    added in their order, so that the same input gives the same bits, on a GPU too.
    """

    def __init__(self, index: Tensor, num: int) -> None:
        self.length = torch.bincount(index.flatten(), minlength=num + 1)[:num]
        kept = int(self.length.sum())
        self.order = torch.argsort(index.flatten(), stable=True)[:kept] % max(index.shape[-1], 1)

    def __call__(self, value: Tensor) -> Tensor:
        lead = value.shape[:-1]
        rows = lead.numel()
        if not rows or not self.length.numel():
            return value.new_zeros(*lead, self.length.numel())
        flat = value[..., self.order].reshape(-1)
        return torch.segment_reduce(flat, "sum", lengths=self.length.repeat(rows), unsafe=True).view(*lead, -1)


@dataclass(frozen=True, eq=False)
class Slots:
    """This rank's nodes that other ranks hold too, `held`, and their `place` among all `total` shared ones."""

    held: Tensor
    place: Tensor
    total: int

    def pack(self, value: Tensor) -> Tensor:
        """This rank's part of the shared buffer: [..., nodes] -> [..., total]."""
        out = value.new_zeros(*value.shape[:-1], self.total)
        out[..., self.place] = value[..., self.held]
        return out

    def unpack(self, value: Tensor, summed: Tensor) -> Tensor:
        """`value`, with the sums over all ranks at the shared nodes."""
        out = value.clone()
        out[..., self.held] = summed[..., self.place]
        return out


@dataclass(frozen=True, eq=False)
class Level:
    """The cells of one stratum that this rank holds, with the figures of all ranks."""

    name: str
    label_C: Tensor  # ascending
    cell_J: Tensor  # cell of every joint cell; C where the stratum is missing
    count_C: Tensor  # live tokens of all ranks, float64
    acting_C: Tensor  # bool: the cell is not below the floor of its stratum, so that it has a gate of its own
    owned_C: Tensor  # bool: it is acting, and this rank is the one that counts it
    slots: Slots  # of the cells that several ranks hold
    num_cells: int  # over all ranks
    num_tokens: int  # live ones over all ranks, with those where the stratum is missing
    merged: tuple[int, float] | None  # over all ranks: cells below the floor, and their tokens; None without a floor
    names: tuple[str, ...] | None  # of the labels, if they have names
    parts: tuple[Part, ...]  # the named parts of its join
    # for its own names, if any, and those of each part: live tokens and acting cells of all ranks, float64 [2, names]
    tally: tuple[Tensor, ...]
    soft: bool  # a token may lie in several of its cells
    everywhere: bool  # every token lies in one
    sums: SegmentSum  # of joint cells by cell: [..., J] -> [..., C]
    part_sums: tuple[SegmentSum, ...]  # of joint cells by the names of each part: [..., J] -> [..., names]
    part_cells: tuple[SegmentSum, ...]  # of acting cells by the names of each part: [..., acting] -> [..., names]

    @property
    def num_acting(self) -> int:
        """Cells over all ranks that have a gate of their own."""
        return self.num_cells - (self.merged[0] if self.merged else 0)

    def at(self, value_C: Tensor) -> Tensor:
        """Values of cells read at their joint cells: [..., C] -> [..., J]."""
        return read(value_C, self.cell_J)


@dataclass(frozen=True, eq=False)
class Forest:
    """The acting cells of consecutive strata of the chain, or of one branch.

    A stratum that is missing, or a cell below its floor, has no node: what is finer hangs from the next node above.
    """

    slices: dict[int, slice]  # stratum (its index among the active ones) -> its nodes
    parent_N: Tensor  # node above; N at a root
    node_KJ: Tensor  # node of each stratum that holds a joint cell; N where there is none
    leaf_J: Tensor  # the finest of them
    stratum_N: Tensor
    label_N: Tensor  # this and the next two as in `Level`
    count_N: Tensor
    owned_N: Tensor
    slots: Slots  # of the nodes that several ranks hold
    up: SegmentSum  # [..., J] -> [..., N]: sums of the joint cells under every node, the transpose of `path`
    at_leaves: SegmentSum  # [..., J] -> [..., N]: sums of the joint cells whose finest node it is, that of `at`
    of_children: SegmentSum  # [..., N] -> [..., N]: sums over the children of every node

    def at(self, value_N: Tensor) -> Tensor:
        """The value of the finest node of every joint cell: [..., N] -> [..., J]."""
        return read(value_N, self.leaf_J)

    def path(self, value_N: Tensor) -> Tensor:
        """Sum over the path from the finest node of a joint cell to its root: [..., N] -> [..., J]."""
        return read(value_N, self.node_KJ).sum(-2)

    def minus_parent(self, value_N: Tensor) -> Tensor:
        """v_n - v_parent(n); v_n at a root."""
        return value_N - read(value_N, self.parent_N)

    def minus_children(self, value_N: Tensor) -> Tensor:
        """v_n - the sum of v over the children of n, the transpose of `minus_parent`."""
        return value_N - self.of_children(value_N)


def build_forest(strata: range, levels: Sequence[Level]) -> Forest:
    """The forest of the nested `strata`, from the levels of all active ones."""
    chosen = [levels[stratum] for stratum in strata]
    acting = [level.acting_C.nonzero().squeeze(1) for level in chosen]
    num, first, total = sum(map(len, acting)), 0, 0
    above_J = torch.full_like(chosen[0].cell_J, num)
    parent_N = above_J.new_full((num + 1,), num)  # the last is for joint cells without a node
    slices, nodes, held, place = dict[int, slice](), [], [], []
    for stratum, level, index_N in zip(strata, chosen, acting, strict=True):
        slices[stratum] = slice(first, first + len(index_N))
        node_C = above_J.new_full((level.count_C.numel() + 1,), num)
        node_C[index_N] = torch.arange(first, first + len(index_N), device=node_C.device)
        node_J, node_held = node_C[level.cell_J], node_C[level.slots.held]
        parent_N.index_copy_(0, node_J, above_J)
        above_J = torch.where(node_J < num, node_J, above_J)
        nodes.append(node_J)
        held.append(node_held[node_held < num])
        place.append(level.slots.place[node_held < num] + total)
        first, total = first + len(index_N), total + level.slots.total
    label, count, owned = (
        torch.cat([getattr(level, name)[index_N] for level, index_N in zip(chosen, acting, strict=True)])
        for name in ("label_C", "count_C", "owned_C")
    )
    of_stratum = torch.cat([torch.full_like(index_N, k) for k, index_N in zip(strata, acting, strict=True)])
    node_KJ, parent_N, slots = torch.stack(nodes), parent_N[:num], Slots(torch.cat(held), torch.cat(place), total)
    sums = (SegmentSum(index, num) for index in (node_KJ, above_J, parent_N))
    return Forest(slices, parent_N, node_KJ, above_J, of_stratum, label, count, owned, slots, *sums)


def dense_ids(label_E: Tensor, present_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distinct labels, ascending, and the index of each entry's label among them: their number where not present."""
    if present_E is not None:
        label_C, cell = dense_ids(label_E[present_E])
        return label_C, torch.full_like(label_E, label_C.numel()).masked_scatter_(present_E, cell)
    if label_E.numel() == 0:
        return label_E, label_E
    low, high = (int(end) for end in torch.aminmax(label_E))
    if high - low >= 4 * label_E.numel() + 1024:
        label_C, cell = torch.unique(label_E, return_inverse=True)
        return label_C, cell
    # A table is faster than sorting where labels are close to each other.
    found = torch.zeros(high - low + 1, dtype=torch.int64, device=label_E.device).index_fill_(0, label_E - low, 1)
    return found.nonzero().squeeze(1) + low, (found.cumsum(0) - 1)[label_E - low]


def join(columns: Sequence[Column], num: int, device: torch.device) -> tuple[Tensor, list[Column], int]:
    """The joint cell of each of `num` entries, the columns of the joint cells, and the number of joint cells."""
    joint, found = torch.zeros(num, dtype=torch.int64, device=device), min(num, 1)
    for column in columns:
        label_C, cell = dense_ids(column.label_E, column.present_E)
        known, joint = dense_ids(joint * (label_C.numel() + 1) + cell)
        found = known.numel()
    some_J = joint.new_zeros(found).scatter_(0, joint, torch.arange(num, device=device))
    return joint, [column.at(some_J) for column in columns], found


def cells_of_rows(joint_L: Tensor, at_L: Tensor, num_cells: int, batch: tuple[int, int]) -> Tensor | None:
    """The joint cell of every row, `num_cells` for a row without a live token, if each row lies in one; else None. From
    the joint cells of the live tokens and their places in the flattened batch."""
    rows, length = batch
    row_L = at_L // length
    cell_R = joint_L.new_full((rows,), num_cells)
    cell_R[row_L] = joint_L
    return cell_R if torch.equal(cell_R[row_L], joint_L) else None
