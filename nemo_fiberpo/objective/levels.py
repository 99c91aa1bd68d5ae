"""The cells of one stratum: their labels, parents and counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pieces import Pieces, dense_ids


@dataclass(frozen=True, eq=False)
class Level:
    """The cells of one active stratum that hold a live token of this rank.

    label_C        label value, ascending
    parent_C       index of the enclosing cell in the next coarser level; None at the coarsest
    local_count_C  live tokens of this rank, int64
    count_C        live tokens of all ranks, float64 (of this rank alone until `Cells.share`)
    owned_C        bool; this rank speaks for the cell where every cell is to be counted once
    shared_C       indices of the cells that other ranks hold too;  slot_C: their places in the shared buffer
    num_cells      cells of the stratum over all ranks;  num_tokens: their live tokens over all ranks
    names          names of the label values: value v is names[v]
    partial        the stratum is missing in parts of the tree: a cell of negative label repeats its parent there. It
                   has no drift of its own, no rank owns it, and `num_cells` leaves it out
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
    partial: bool = False

    @property
    def up_C(self) -> Tensor:
        """`parent_C` of a level that has one above it."""
        assert self.parent_C is not None
        return self.parent_C

    def called(self, label: int) -> str:
        """A label value for a message: with its name where it has one."""
        if self.partial and label < 0:
            return "none (the stratum is missing there)"
        return f"{label} ({self.names[label]!r})" if self.names and 0 <= label < len(self.names) else str(label)


def build_levels(
    strata: Sequence[str], pieces: Pieces, names: Mapping[str, tuple[str, ...]], partial: Collection[str] = ()
) -> tuple[tuple[Level, ...], Tensor]:
    """Levels and the finest cell of each piece, from the labels of the pieces."""
    levels: list[Level] = []
    above_P = None
    for name, label_P in zip(strata, pieces.label_KP, strict=True):
        label_C, cell_P = dense_ids(label_P)
        num = label_C.numel()
        level_names = names.get(name)
        owned_C = torch.ones(num, dtype=torch.bool, device=label_C.device)
        if name in partial:
            owned_C = label_C >= 0
        _check_named(name, label_C[owned_C] if name in partial else label_C, level_names)
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
        figures = int(owned_C.sum()) if name in partial else num, int(count_C.sum())
        counts = count_C, count_C.double()
        levels.append(
            Level(name, label_C, parent_C, *counts, owned_C, none, none, *figures, level_names, name in partial)
        )
        above_P = cell_P
    assert above_P is not None
    return tuple(levels), above_P


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
