"""Cells: which tokens count together, built by each rank from its own labels and then agreed between the ranks.

    Cells         what a rank knows by itself: its joint cells, their labels in every stratum, their token counts
    SharedCells   that, with what all ranks know: global counts, forests, and the nodes that ranks share

Nothing here communicates. The caller gathers the censuses of one rollout in any way it likes, and hands the objective a
`Reduce` that sums a small buffer over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .forest import Forest, SegmentSum, Slots, build_forest, dense_ids, join, read, rows_of
from .kernels import TokenLayout, entries_as_pieces, rows_as_pieces
from .labels import Column, Membership, Part

Reduce = Callable[[Tensor], Tensor]
"""Float64 one-dimensional buffer -> its sum over all ranks that hold tokens, the same bits on each of them."""


def all_reduce(parts: Mapping[str, Tensor], reduce: Reduce | None) -> dict[str, Tensor]:
    """The named float64 tensors summed over the ranks, in one call of `reduce`; as they are where it is None.

    Every rank must pass the same names and shapes.
    """
    if reduce is None:
        return dict(parts)
    total = reduce(torch.cat([part.reshape(-1) for part in parts.values()]))
    split = total.split([part.numel() for part in parts.values()])
    return {name: flat.view(part.shape) for (name, part), flat in zip(parts.items(), split, strict=True)}


@dataclass(frozen=True)
class Riders:
    """Numbers of the caller's that ride in the first reduction of an evaluation.

    parts   float64 tensors by name, of the same shapes on every rank
    check   is given their sums over the ranks before anything else is looked at, and may raise
    """

    parts: Mapping[str, Tensor]
    check: Callable[[Mapping[str, Tensor]], None]


NO_RIDERS = Riders({}, lambda summed: None)


@dataclass(frozen=True)
class Stages:
    """What a hierarchy says of the order of its strata.

    strata       names of the active ones: the chain, coarsest first, then the branches
    num_chain    how many of them are the chain
    forests      the strata of every forest
    visits       the order in which forests are extracted, see `fibration`
    min_tokens   by stratum: a cell with fewer live tokens has no gate of its own; 0 for no floor
    """

    strata: tuple[str, ...]
    num_chain: int
    forests: tuple[range, ...]
    visits: tuple[int, ...]
    min_tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Level:
    """The cells of one stratum that this rank holds, with the figures of all ranks.

    label_C     ascending
    cell_J      cell of every joint cell; C where the stratum is missing
    count_C     live tokens of all ranks, float64
    acting_C    bool; the cell has a gate of its own, since it is not below the floor
    owned_C     bool; it is acting, and this rank counts it where each cell is to be counted once
    slots       of the cells that several ranks hold
    num_cells, num_tokens   over all ranks: cells, and live tokens, those where the stratum is missing too
    merged      over all ranks: cells below the floor, and their tokens; None without a floor
    names       of the labels, if they have some;  parts: the named parts of its join
    tally       float64 [2, names] for its own names (if it has some) and those of each part, over all ranks: live
                tokens, and acting cells
    soft, everywhere   a token may lie in several of its cells; every token lies in one
    """

    name: str
    label_C: Tensor
    cell_J: Tensor
    count_C: Tensor
    acting_C: Tensor
    owned_C: Tensor
    slots: Slots
    num_cells: int
    num_tokens: int
    merged: tuple[int, float] | None
    names: tuple[str, ...] | None
    parts: tuple[Part, ...]
    tally: tuple[Tensor, ...]
    soft: bool
    everywhere: bool
    _sums: SegmentSum = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sums", SegmentSum(self.cell_J, self.label_C.numel()))

    @property
    def num_acting(self) -> int:
        """Cells over all ranks that have a gate of their own."""
        return self.num_cells - (self.merged[0] if self.merged else 0)

    def at(self, value_C: Tensor) -> Tensor:
        """Values of cells read at their joint cells: [..., C] -> [..., J]."""
        return read(value_C, self.cell_J)

    def sums(self, value_J: Tensor) -> Tensor:
        """Sums of joint cells by cell: [..., J] -> [..., C]."""
        return self._sums(value_J)


@dataclass(frozen=True, eq=False)
class SharedCells:
    """Cells of all active strata for the tokens of one rank, agreed with the other ranks.

    SPMD: tokens are sharded over ranks. Counts, slots and owners are global. Budgets, slopes and gates are not part of
    the cells: they are looked up in the hierarchy whenever an objective is evaluated.

    count_J   live tokens of this rank in its joint cells, float64
    """

    stages: Stages
    levels: tuple[Level, ...]
    forests: tuple[Forest, ...]
    layout: TokenLayout
    count_J: Tensor
    rank: int
    world_size: int

    @property
    def shared(self) -> SharedCells:
        """Itself; of `Cells` what they are for one process."""
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, masked ones included: the length of every [T] argument."""
        return self.layout.num_tokens

    def level(self, stratum: str) -> Level:
        """The level of an active stratum, by name."""
        for level in self.levels:
            if level.name == stratum:
                return level
        raise ValueError(f"cells: no active stratum is called {stratum!r}; there are {[lv.name for lv in self.levels]}")

    def num_cells(self, stratum: str) -> int:
        """Cells of a stratum over all ranks."""
        return self.level(stratum).num_cells

    def hard_level(self, stratum: str) -> Level:
        """`level`, or ValueError where soft membership puts a token into several of its cells."""
        level = self.level(stratum)
        if level.soft:
            raise ValueError(f"cells: a token lies in several cells of {stratum!r}, whose membership is soft")
        return level

    def cell_per_token(self, stratum: str) -> Tensor:
        """Index of every token's cell in `hard_level(stratum)`, int64 [T]; without meaning at masked tokens."""
        level = self.hard_level(stratum)
        return self.layout.at_tokens(level.cell_J.double()).round().long()


@dataclass(frozen=True, eq=False)
class Cells:
    """Joint cells of one rank's tokens: what it knows before the ranks have talked.

    Wherever cells are evaluated these stand for `shared`, those of one process that holds all tokens.

    columns    of each stratum the labels [J] and whether the stratum is present
    tokens_J   live tokens, int64 in units of 1/unit tokens; unit is 1, with soft membership the units of a token
    """

    stages: Stages
    columns: tuple[Column, ...]
    tokens_J: Tensor
    layout: TokenLayout
    unit: int

    @cached_property
    def _dense(self) -> list[tuple[Tensor, Tensor]]:
        """Of each stratum its labels, ascending, and the cell of every joint cell."""
        return [dense_ids(column.label_E, column.present_E) for column in self.columns]

    def census(self) -> Tensor:
        """Int64 [cells, 5]: stratum, label, stratum and label of the parent in the chain (-1, 0 without one), live
        tokens of this rank in units of 1/unit."""
        rows = []
        parent_J = torch.stack([torch.full_like(self.tokens_J, -1), torch.zeros_like(self.tokens_J)])
        for index, (column, (label_C, cell_J)) in enumerate(zip(self.columns, self._dense, strict=True)):
            num = label_C.numel()
            if index >= self.stages.num_chain:
                parent_J = torch.stack([torch.full_like(self.tokens_J, -1), torch.zeros_like(self.tokens_J)])
            count_C = self.tokens_J.new_zeros(num + 1).index_add_(0, cell_J, self.tokens_J)[:num]
            parent_C = parent_J.new_zeros(2, num + 1).index_copy_(1, cell_J, parent_J)
            wrong = ((parent_C[:, cell_J] != parent_J).any(0) & (cell_J < num)).nonzero()
            if wrong.numel():
                cell = cell_J[wrong[0, 0]]
                pair = [tuple(side) for side in (parent_C[:, cell].tolist(), parent_J[:, wrong[0, 0]].tolist())]
                raise self._not_nested(index, int(label_C[cell]), *pair)
            rows.append(torch.stack([torch.full_like(label_C, index), label_C, *parent_C[:, :num], count_C], 1))
            own = torch.stack([torch.full_like(column.label_E, index), column.label_E])
            parent_J = torch.where(cell_J < num, own, parent_J)
        return torch.cat(rows) if rows else self.tokens_J.new_zeros(0, 5)

    @cached_property
    def shared(self) -> SharedCells:
        """These cells where one process holds all tokens."""
        return self.share([self.census()], 0)

    def share(self, censuses: Sequence[Tensor], rank: int) -> SharedCells:
        """The cells with global counts, and for those of several ranks their slot in the shared buffer and their owner;
        cells below the floor of their stratum (`Stratum.min_tokens`) are merged into their parents.

        Pure. A cell's owner is the lowest rank that holds it; slots go by label. Every rank must pass the same
        `censuses`, in rank order, its own at position `rank`; they may live on any device.

        Raises ValueError where a cell has different parents on two ranks, and where censuses[rank] is not this census.
        """
        own = self.census()
        if not 0 <= rank < len(censuses):
            raise ValueError(f"rank: must be within the {len(censuses)} censuses, got {rank}")
        if not torch.equal(censuses[rank].to(own.device), own):
            raise ValueError(f"censuses[{rank}]: is not the census of these cells; they must be in rank order")
        table = torch.cat([census.cpu() for census in censuses])
        rank_R = torch.cat([torch.full((len(census),), index) for index, census in enumerate(censuses)])
        of_stratum = [table[:, 0] == index for index in range(len(self.columns))]
        total = int(table[of_stratum[0], 4].sum()) if of_stratum else 0  # the coarsest stratum is nowhere missing
        levels = tuple(
            self._level(index, table[rows], rank_R[rows], rank, total) for index, rows in enumerate(of_stratum)
        )
        forests = tuple(build_forest(stage, levels) for stage in self.stages.forests)
        count_J = self.tokens_J.double() / self.unit
        return SharedCells(self.stages, levels, forests, self.layout, count_J, rank, len(censuses))

    def _level(self, index: int, table: Tensor, rank_R: Tensor, rank: int, total: int) -> Level:
        """One stratum, from the rows of all ranks about it; `total` live tokens over all ranks, in units of 1/unit."""
        column, (label_C, cell_J) = self.columns[index], self._dense[index]
        label_G, cell_R = torch.unique(table[:, 1], return_inverse=True)
        num, floor = label_G.numel(), self.stages.min_tokens[index]
        parent_G = torch.zeros(num, 2, dtype=torch.int64).index_copy_(0, cell_R, table[:, 2:4])
        wrong = (parent_G[cell_R] != table[:, 2:4]).any(1).nonzero()
        if wrong.numel():
            cell = cell_R[wrong[0, 0]]
            pair = tuple(parent_G[cell].tolist()), tuple(table[wrong[0, 0], 2:4].tolist())
            raise self._not_nested(index, int(label_G[cell]), *pair)
        count_G = torch.zeros(num, dtype=torch.int64).index_add_(0, cell_R, table[:, 4])
        owner_G = torch.full((num,), len(rank_R)).scatter_reduce_(0, cell_R, rank_R, "amin")
        is_shared_G = torch.bincount(cell_R, minlength=num) > 1
        small_G = count_G < floor * self.unit
        slot_G = is_shared_G.cumsum(0) - 1
        at_C = torch.searchsorted(label_G, label_C.cpu())
        held_C = is_shared_G[at_C].nonzero().squeeze(1)
        own = (Part(self.stages.strata[index], column.names),) if column.names else ()
        figures = torch.stack([count_G.double() / self.unit, (~small_G).double()])
        tally = (SegmentSum(part.value(label_G), len(part.names))(figures) for part in (*own, *column.parts))
        device = label_C.device
        return Level(
            name=self.stages.strata[index],
            label_C=label_C,
            cell_J=cell_J,
            count_C=(count_G[at_C].double() / self.unit).to(device),
            acting_C=~small_G[at_C].to(device),
            owned_C=((owner_G[at_C] == rank) & ~small_G[at_C]).to(device),
            slots=Slots(held_C.to(device), slot_G[at_C][held_C].to(device), int(is_shared_G.sum())),
            num_cells=num,
            num_tokens=total // self.unit,
            merged=(int(small_G.sum()), int(count_G[small_G].sum()) / self.unit) if floor else None,
            names=column.names,
            parts=column.parts,
            tally=tuple(tally),
            soft=column.soft,
            everywhere=column.present_E is None,
        )

    def called(self, index: int, label: int) -> str:
        """A label of a stratum for a message: with its name where it has one."""
        if index < 0:
            return "none (the stratum is missing there)"
        names = self.columns[index].names
        return f"{label} ({names[label]!r})" if names and 0 <= label < len(names) else str(label)

    def _not_nested(self, index: int, label: int, first: tuple[int, int], second: tuple[int, int]) -> ValueError:
        """The error for a cell with tokens in two cells of coarser strata."""
        name = self.stages.strata[index]
        low, high = (
            f"in {self.stages.strata[at] if at >= 0 else self.stages.strata[0]} {self.called(at, label)}"
            for at, label in sorted((first, second))
        )
        above = self.stages.strata[max(first[0], second[0])]
        return ValueError(
            f"labels[{name!r}]: value {self.called(index, label)} has tokens {low} and {high}; every {name} must lie "
            f"in one {above}, and values must be unique over the batch; two classifications of the same tokens are no "
            "chain: use their `join`, or make one of them a branch"
        )

    def level(self, stratum: str) -> Level:
        """As `SharedCells.level`, of one process."""
        return self.shared.level(stratum)

    def num_cells(self, stratum: str) -> int:
        """As `SharedCells.num_cells`, of one process."""
        return self.shared.num_cells(stratum)

    def cell_per_token(self, stratum: str) -> Tensor:
        """As `SharedCells.cell_per_token`, of one process."""
        return self.shared.cell_per_token(stratum)

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, masked ones included: the length of every [T] argument."""
        return self.layout.num_tokens


def make_cells(
    stages: Stages,
    columns: Mapping[str, Column],
    num_tokens: int,
    mask: Tensor | None,
    batch: tuple[int, int] | None,
    membership: Membership | None = None,
) -> Cells:
    """Cells of the strata `columns`, in the order of `stages`, for this rank's tokens.

    `columns` hold a label per token, or per entry of `membership`; `batch` is the shape of the flattened tokens. Tokens
    are laid out by rows where each lies in one joint cell, else by joint cell.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    ordered = [columns[name] for name in stages.strata]
    device = mask.device if mask is not None else ordered[0].label_E.device if ordered else torch.device("cpu")
    weight, unit = mask, 1
    if membership is not None:
        weight, unit = membership.share_TQ.flatten(), Membership.UNIT
    rows = None if batch is None or membership is not None else rows_of(ordered, mask, batch)
    if rows is not None and batch is not None:
        at_R, ordered, tokens_R = rows
        joint_R, ordered, num = join(ordered, len(at_R), device)
        of_rows = torch.full((batch[0],), num, device=device).index_copy_(0, at_R, joint_R)
        layout = rows_as_pieces(batch, mask, of_rows, num)
        tokens_J = torch.zeros(num, dtype=torch.int64, device=device).index_add_(0, joint_R, tokens_R)
    else:
        at_L = torch.arange(num_tokens, device=device) if weight is None else weight.nonzero().squeeze(1)
        if weight is not None:
            ordered = [column.at(at_L) for column in ordered]
        joint_L, ordered, num = join(ordered, len(at_L), device)
        share_TQ = None if membership is None else membership.share_TQ.double() / unit
        layout = entries_as_pieces(joint_L, at_L, num, num_tokens, batch, mask, share_TQ)
        tokens_L = torch.ones_like(joint_L) if membership is None or weight is None else weight[at_L].long()
        tokens_J = torch.zeros(num, dtype=torch.int64, device=device).index_add_(0, joint_L, tokens_L)
    return Cells(stages, tuple(ordered), tokens_J, layout, unit)
