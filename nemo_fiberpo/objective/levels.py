"""The cells of one stratum: their labels, parents and counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pieces import Pieces, dense_ids


@dataclass(frozen=True)
class Part:
    """A classification with names that the cells of a stratum are told apart by: its own, or a part of its join.

    A cell of label v >= 0 is called names[v // stride % len(names)].
    """

    name: str
    names: tuple[str, ...]
    stride: int = 1

    def value(self, label: Tensor) -> Tensor:
        """The name's index for labels >= 0."""
        return label // self.stride % len(self.names)


@dataclass(frozen=True)
class Traits:
    """What the hierarchy says of a stratum, as far as cells show it.

    partial     it is missing in parts of the tree: a cell of negative label repeats its parent there. It has no drift
                of its own, no rank owns it, and `num_cells` leaves it out
    min_tokens  a cell with fewer live tokens is merged into its parent; 0 for no floor
    soft        a token may lie in several of its cells, see `membership.py`
    parts       those parts of its join that have names
    """

    partial: bool = False
    min_tokens: int = 0
    soft: bool = False
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class Level:
    """The cells of one active stratum that hold a live token of this rank.

    label_C        label value, ascending
    parent_C       index of the enclosing cell in the next coarser level; None at the coarsest
    local_count_C  live tokens of this rank, int64, in units of 1/unit tokens
    count_C        live tokens of all ranks, float64 (of this rank alone until `Cells.share`)
    owned_C        bool; this rank speaks for the cell where every cell is to be counted once
    shared_C       indices of the cells that other ranks hold too;  slot_C: their places in the shared buffer
    num_cells      cells of the stratum over all ranks;  num_tokens: their live tokens over all ranks
    names          names of the label values: value v is names[v]
    traits         see `Traits`
    unit           1; with soft membership the number of parts that a token is divided into
    small_C        indices of the cells that are merged into their parents, which no rank owns, and of those that repeat
                   such a parent where the stratum is missing. None where there is no floor, here or above a stratum
                   that is missing somewhere, and before `Cells.share`, which alone can tell
    merged         over all ranks, how many cells those are, and how many tokens they have
    tally          by `parts`, float64 [2, names], over all ranks: live tokens, and cells that are not merged
    """

    name: str
    label_C: Tensor
    parent_C: Tensor | None
    local_count_C: Tensor
    count_C: Tensor
    owned_C: Tensor
    shared_C: Tensor
    slot_C: Tensor
    num_cells: int
    num_tokens: int
    names: tuple[str, ...] | None = None
    traits: Traits = Traits()
    unit: int = 1
    small_C: Tensor | None = None
    merged: tuple[int, float] = (0, 0.0)
    tally: tuple[Tensor, ...] = ()

    @property
    def up_C(self) -> Tensor:
        """`parent_C` of a level that has one above it."""
        assert self.parent_C is not None
        return self.parent_C

    @property
    def num_acting(self) -> int:
        """Cells over all ranks that have a gate of their own."""
        return self.num_cells - self.merged[0]

    @property
    def parts(self) -> tuple[Part, ...]:
        """By what its cells are told apart in reports: its own names first, if it has some, then parts of its join."""
        return (*own_part(self.name, self.names), *self.traits.parts)

    def called(self, label: int) -> str:
        """A label value for a message: with its name where it has one."""
        if self.traits.partial and label < 0:
            return "none (the stratum is missing there)"
        return f"{label} ({self.names[label]!r})" if self.names and 0 <= label < len(self.names) else str(label)


def own_part(name: str, names: tuple[str, ...] | None) -> tuple[Part, ...]:
    """The names of a stratum's own cells as a `Part`, if it has any."""
    return (Part(name, names),) if names else ()


def build_levels(
    strata: Sequence[str], pieces: Pieces, names: Mapping[str, tuple[str, ...]], traits: Mapping[str, Traits]
) -> tuple[tuple[Level, ...], Tensor]:
    """Levels and the finest cell of each piece, from the labels of the pieces."""
    levels: list[Level] = []
    above_P = None
    for name, label_P in zip(strata, pieces.label_KP, strict=True):
        label_C, cell_P = dense_ids(label_P)
        num, level_names, of_level = label_C.numel(), names.get(name), traits.get(name, Traits())
        owned_C = torch.ones(num, dtype=torch.bool, device=label_C.device)
        if of_level.partial:
            owned_C = label_C >= 0
        _check_named(name, label_C[owned_C] if of_level.partial else label_C, level_names)
        parent_C = None
        if above_P is not None:
            parent_C = torch.zeros(num, dtype=torch.int64, device=label_C.device)
            parent_C[cell_P] = above_P
            wrong = (parent_C[cell_P] != above_P).nonzero()
            if wrong.numel():
                cell, above = int(cell_P[wrong[0]]), levels[-1]
                parents = int(above.label_C[parent_C[cell]]), int(above.label_C[above_P[wrong[0]]])
                raise not_nested(name, int(label_C[cell]), level_names, above, *parents)
        count_C = torch.zeros(num, dtype=torch.int64, device=label_C.device).index_add_(0, cell_P, pieces.count_P)
        none = torch.zeros(0, dtype=torch.int64, device=label_C.device)
        level = Level(
            name,
            label_C,
            parent_C,
            count_C,
            count_C.double() / pieces.unit,
            owned_C,
            none,
            none,
            num_cells=int(owned_C.sum()) if of_level.partial else num,
            num_tokens=int(count_C.sum()) // pieces.unit,
            names=level_names,
            traits=of_level,
            unit=pieces.unit,
            tally=tallies((*own_part(name, level_names), *of_level.parts), label_C, count_C, owned_C, pieces.unit),
        )
        levels.append(level)
        above_P = cell_P
    assert above_P is not None
    return tuple(levels), above_P


def tallies(parts: Iterable[Part], label_G: Tensor, count_G: Tensor, acting_G: Tensor, unit: int) -> tuple[Tensor, ...]:
    """`Level.tally` from the labels of all cells, their live tokens in 1/unit, and whether they have their own gate."""
    there_G = label_G >= 0
    figures = torch.stack([count_G.double(), acting_G.double()])[:, there_G]
    sums = (
        figures.new_zeros(2, len(part.names)).index_add_(1, part.value(label_G[there_G]), figures) for part in parts
    )
    return tuple(torch.stack([tokens / unit, acting]) for tokens, acting in sums)


def merge_into_parents(values: list[Tensor], levels: Sequence[Level], stage: Iterable[int]) -> list[Tensor]:
    """The adjoint of a small cell's mean being its parent's: its value goes to the parent, finest level first.

    `values`, [2, C] per level, are changed in place and returned. `stage` are indices of nested levels, coarsest first;
    at its first level the mean of a small cell is the constant 0, and its value is dropped.
    """
    stage = list(stage)
    for index in reversed(stage):
        small_C, value = levels[index].small_C, values[index]
        if small_C is None:
            continue
        if index != stage[0]:
            values[index - 1].index_add_(1, levels[index].up_C[small_C], value[:, small_C])
        value[:, small_C] = 0.0
    return values


def _check_named(name: str, label_C: Tensor, names: tuple[str, ...] | None) -> None:
    outside = label_C[(label_C < 0) | (label_C >= len(names))] if names is not None else label_C[:0]
    if outside.numel():
        raise ValueError(
            f"labels[{name!r}]: value {int(outside[0])} has no name; names[{name!r}] has {len(names or ())}"
        )


def not_nested(
    name: str, label: int, names: tuple[str, ...] | None, above: Level, first: int, second: int
) -> ValueError:
    """The error for a cell with tokens in two cells of the next coarser stratum."""
    shown = f"{label} ({names[label]!r})" if names else str(label)
    low, high = sorted((first, second))
    return ValueError(
        f"labels[{name!r}]: value {shown} has tokens in {above.name} {above.called(low)} and in {above.name} "
        f"{above.called(high)}; every {name} must lie in one {above.name}, and values must be unique over the batch; "
        "two classifications of the same tokens are no chain: use their `join`, or make one of them a branch"
    )
