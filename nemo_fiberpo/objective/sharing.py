"""Cells: which tokens count together. Each rank builds `Cells` from its own labels; `SharedCells` add what only all
ranks together know: global counts, forests, and the nodes that several ranks hold.

Nothing here communicates. The caller gathers the censuses of a rollout as it likes, and hands the objective a `Reduce`
that sums a small buffer over the ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .forest import Forest, SegmentSum, Slots, build_forest, cells_of_rows, dense_ids, join
from .forest import Level as Level
from .kernels import Entries, TokenLayout, entries_as_pieces
from .labels import Column, Membership, Part

Reduce = Callable[[Tensor], Tensor]
"""Float64 one-dimensional buffer -> its sum over all ranks that hold tokens, the same bits on each of them."""


def all_reduce(parts: Mapping[str, Tensor], reduce: Reduce | None) -> dict[str, Tensor]:
    """The named float64 tensors summed over the ranks, in one call of `reduce`; as they are where it is None. Every
    rank must pass the same names and shapes."""
    if reduce is None or not parts:
        return dict(parts)
    total = reduce(torch.cat([part.reshape(-1) for part in parts.values()]))
    split = total.split([part.numel() for part in parts.values()])
    return {name: flat.view(part.shape) for (name, part), flat in zip(parts.items(), split, strict=True)}


def sum_nodes(
    values: Sequence[tuple[Slots, Tensor]], reduce: Reduce | None, riders: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Values of nodes or cells [..., N], summed over the ranks where several hold one; and the sums of the riders. One
    call of `reduce`."""
    if reduce is None:
        return [value for _, value in values], dict(riders)
    packed = {f"nodes {index}": slots.pack(value) for index, (slots, value) in enumerate(values)}
    summed = all_reduce({**riders, **packed}, reduce)
    shared = [summed.pop(name) for name in packed]
    return [slots.unpack(value, total) for (slots, value), total in zip(values, shared, strict=True)], summed


@dataclass(frozen=True)
class Riders:
    """Numbers of the caller's that ride in the first reduction of an evaluation."""

    parts: Mapping[str, Tensor]  # float64, of the same names and shapes on every rank
    check: Callable[[Mapping[str, Tensor]], None]  # is given their sums over the ranks first of all, and may raise


NO_RIDERS = Riders({}, lambda summed: None)


@dataclass(frozen=True)
class Stages:
    """The order in which a hierarchy extracts its strata."""

    strata: tuple[str, ...]  # names of the active ones: the chain, coarsest first, then the branches
    num_chain: int  # how many of them are the chain
    forests: tuple[range, ...]  # the strata of every forest
    visits: tuple[int, ...]  # the order in which forests are extracted, see `fibration`
    min_tokens: tuple[int, ...]  # by stratum: a cell with fewer live tokens has no gate of its own; 0 for no floor


class _Queries(ABC):
    """What can be asked of cells. `Cells` answer for one process that holds all tokens."""

    layout: TokenLayout

    @property
    @abstractmethod
    def shared(self) -> SharedCells:
        """Cells with the figures of all ranks."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, masked ones included: the length of every [T] argument."""
        return self.layout.num_tokens

    def level(self, stratum: str) -> Level:
        """The level of an active stratum, by name."""
        levels = {level.name: level for level in self.shared.levels}
        if stratum not in levels:
            raise ValueError(f"cells: no active stratum is called {stratum!r}; there are {list(levels)}")
        return levels[stratum]

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
        """Index of every token's cell in `hard_level(stratum)`, int64 [T]; meaningless at masked tokens."""
        return self.layout.at_tokens(self.hard_level(stratum).cell_J.double()).round().long()


@dataclass(frozen=True, eq=False)
class SharedCells(_Queries):
    """Cells of all active strata for the tokens of one rank, agreed with the other ranks. Budgets, slopes and gates are
    not part of them: the hierarchy gives them whenever an objective is evaluated. Counts, slots and owners are global.
    """

    stages: Stages
    levels: tuple[Level, ...]
    forests: tuple[Forest, ...]
    layout: TokenLayout
    count_J: Tensor  # live tokens of this rank in its joint cells, float64
    rank: int
    world_size: int

    @property
    def shared(self) -> SharedCells:
        return self


@dataclass(frozen=True, eq=False)
class Cells(_Queries):
    """Joint cells of one rank's tokens: what it knows before the ranks have talked."""

    stages: Stages
    columns: tuple[Column, ...]  # of each stratum: the labels of joint cells, and whether the stratum is present
    tokens_J: Tensor  # live tokens, int64 in units of 1/unit tokens
    layout: TokenLayout
    unit: int  # 1, with soft membership the units of a token

    @cached_property
    def _dense(self) -> list[tuple[Tensor, Tensor]]:
        """Of each stratum its labels, ascending, and the cell of every joint cell."""
        return [dense_ids(column.label_E, column.present_E) for column in self.columns]

    def census(self) -> Tensor:
        """Int64 [cells, 5]: stratum, label, stratum and label of the parent in the chain (-1, 0 without one), live
        tokens of this rank in units of 1/unit. Raises ValueError where a cell has two parents."""
        rows = [self.tokens_J.new_zeros(0, 5)]
        roots_2J = above_2J = torch.stack([torch.full_like(self.tokens_J, -1), torch.zeros_like(self.tokens_J)])
        for index, (column, (label_C, cell_J)) in enumerate(zip(self.columns, self._dense, strict=True)):
            num = label_C.numel()
            parent_2C = self._parents(index, label_C, cell_J, above_2J if index < self.stages.num_chain else roots_2J)
            count_C = self.tokens_J.new_zeros(num + 1).index_add_(0, cell_J, self.tokens_J)[:num]
            rows.append(torch.stack([torch.full_like(label_C, index), label_C, *parent_2C, count_C], 1))
            own_2J = torch.stack([torch.full_like(column.label_E, index), column.label_E])
            above_2J = torch.where(cell_J < num, own_2J, above_2J)
        return torch.cat(rows)

    @cached_property
    def shared(self) -> SharedCells:
        """These cells where one process holds all tokens."""
        return self.share([self.census()], 0)

    def share(self, censuses: Sequence[Tensor], rank: int) -> SharedCells:
        """The cells with global counts, and for those of several ranks their slot in the shared buffer and their owner,
        the lowest rank that holds the cell. Those below the floor of their stratum are merged into their parents.

        Every rank must pass the same `censuses`, on any device, in rank order, its own at position `rank`. Raises
        ValueError where a cell has different parents on two ranks, and where censuses[rank] is not this census.
        """
        own = self.census()
        if not 0 <= rank < len(censuses):
            raise ValueError(f"rank: must be within the {len(censuses)} censuses, got {rank}")
        if not torch.equal(censuses[rank].to(own.device), own):
            raise ValueError(f"censuses[{rank}]: is not the census of these cells; they must be in rank order")
        table = torch.cat([census.cpu() for census in censuses])
        rank_R = torch.arange(len(censuses)).repeat_interleave(torch.tensor([len(census) for census in censuses]))
        total = int(table[table[:, 0] == 0, 4].sum()) // self.unit  # the coarsest stratum is nowhere missing
        levels = tuple(self._level(index, table, rank_R, rank, total) for index in range(len(self.columns)))
        forests = tuple(build_forest(strata, levels) for strata in self.stages.forests)
        count_J = self.tokens_J.double() / self.unit
        return SharedCells(self.stages, levels, forests, self.layout, count_J, rank, len(censuses))

    def _level(self, index: int, table: Tensor, rank_R: Tensor, rank: int, total: int) -> Level:
        """One stratum, from the censuses of all ranks; `total` live tokens over all ranks."""
        column, (label_C, cell_J), floor = self.columns[index], self._dense[index], self.stages.min_tokens[index]
        rows = table[:, 0] == index
        rank_R, table = rank_R[rows], table[rows]
        label_G, cell_R = torch.unique(table[:, 1], return_inverse=True)
        self._parents(index, label_G, cell_R, table[:, 2:4].T)
        zeros_G = torch.zeros_like(label_G)
        count_G = zeros_G.index_add(0, cell_R, table[:, 4])
        owner_G = zeros_G.scatter_reduce(0, cell_R, rank_R, "amin", include_self=False)
        small_G = count_G < floor * self.unit
        shared_G = torch.bincount(cell_R, minlength=len(label_G)) > 1
        at_C = torch.searchsorted(label_G, label_C.cpu())
        held_C = shared_G[at_C].nonzero().squeeze(1)
        place_C = (shared_G.cumsum(0) - 1)[at_C][held_C]
        named = (Part(self.stages.strata[index], column.names),) if column.names else ()
        figures = torch.stack([count_G.double() / self.unit, (~small_G).double()])
        device = label_C.device
        acting_C = ~small_G[at_C].to(device)
        return Level(
            name=self.stages.strata[index],
            label_C=label_C,
            cell_J=cell_J,
            count_C=figures[0, at_C].to(device),
            acting_C=acting_C,
            owned_C=((owner_G == rank) & ~small_G)[at_C].to(device),
            slots=Slots(held_C.to(device), place_C.to(device), int(shared_G.sum())),
            num_cells=len(label_G),
            num_tokens=total,
            merged=(int(small_G.sum()), int(count_G[small_G].sum()) / self.unit) if floor else None,
            names=column.names,
            parts=column.parts,
            tally=tuple(SegmentSum(part.value(label_G), len(part.names))(figures) for part in (*named, *column.parts)),
            soft=column.soft,
            everywhere=column.present_E is None,
            sums=SegmentSum(cell_J, len(label_C)),
            part_sums=tuple(SegmentSum(column.part_E(part), len(part.names)) for part in column.parts),
            part_cells=tuple(SegmentSum(part.value(label_C[acting_C]), len(part.names)) for part in column.parts),
        )

    def _parents(self, index: int, label_C: Tensor, cell_E: Tensor, parent_2E: Tensor) -> Tensor:
        """Stratum and label of the parent of every cell [2, C], from those of entries in the cells. Raises ValueError
        where entries of one cell have different parents."""
        num = label_C.numel()
        parent_2C = parent_2E.new_zeros(2, num + 1).index_copy_(1, cell_E, parent_2E)
        wrong = ((parent_2C[:, cell_E] != parent_2E).any(0) & (cell_E < num)).nonzero()
        if not wrong.numel():
            return parent_2C[:, :num]

        def place(at: int, label: int) -> str:
            known = self.columns[at].called(label) if at >= 0 else "none (the stratum is missing there)"
            return f"{strata[max(at, 0)]} {known}"

        entry, strata = int(wrong[0, 0]), self.stages.strata
        cell, name = int(cell_E[entry]), strata[index]
        first, second = sorted((parent_2C[:, cell].tolist(), parent_2E[:, entry].tolist()))
        value = self.columns[index].called(int(label_C[cell]))
        raise ValueError(
            f"labels[{name!r}]: value {value} has tokens in {place(*first)} and in {place(*second)}; every {name} must "
            f"lie in one {strata[second[0]]}, and values must be unique over the batch; two classifications of the "
            "same tokens are no chain: use their `join`, or make one of them a branch"
        )


def make_cells(
    stages: Stages,
    columns: Mapping[str, Column],
    num_tokens: int,
    mask: Tensor | None,
    batch: tuple[int, int] | None,
    membership: Membership | None,
) -> Cells:
    """Cells of the strata `columns`, in the order of `stages`, for this rank's tokens.

    `columns` hold a label per token, or per entry of `membership`; `batch` is the shape of the flattened tokens. Tokens
    are laid out by rows where each lies in one joint cell, else by joint cell.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    ordered = [columns[name] for name in stages.strata]
    device = mask.device if mask is not None else ordered[0].label_E.device if ordered else torch.device("cpu")
    weight = mask if membership is None else membership.share_TQ.flatten()
    at = torch.arange(num_tokens, device=device) if weight is None else weight.nonzero().squeeze(1)
    tokens = torch.ones_like(at) if weight is None else weight[at].long()
    joint, ordered, num = join([column if weight is None else column.at(at) for column in ordered], len(at), device)
    tokens_J = torch.zeros(num, dtype=torch.int64, device=device).index_add_(0, joint, tokens)
    unit, cell_P = 1 if membership is None else Membership.UNIT, None
    if batch is not None and membership is None and num_tokens:
        cell_P, entries = cells_of_rows(joint, at, num, batch), Entries(None if mask is None else mask.view(batch))
    if cell_P is None:
        share_TQ = None if membership is None else membership.share_TQ.double() / unit
        cell_P, entries = entries_as_pieces(joint, at, num, num_tokens, share_TQ)
    layout = TokenLayout(num_tokens, batch, mask, cell_P, SegmentSum(cell_P, num), entries)
    return Cells(stages, tuple(ordered), tokens_J, layout, unit)
