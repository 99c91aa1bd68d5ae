"""Cells: token labels of the active strata -> nested cells with their token counts, and where their tokens lie.

Cells are kept as a tree: tokens -> cells of the finest level -> parents. Everything above the finest level is computed
from its children, so only the finest level ever needs a reduction over tokens, and an only child has exactly the mean
of its parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import RowLayout, ScatteredLayout, TokenLayout
from .levels import Level, Traits, build_levels
from .membership import Membership, SoftLayout
from .pieces import Pieces, make_pieces, weighted_pieces


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of all active strata for the tokens of one rank; `levels` is coarsest first.

    SPMD: tokens are sharded over ranks. Counts, slots and owners cover one rank until `share` has seen the census of
    every rank; it returns the same cells with the global figures. Budgets and slopes are not part of the cells: they
    are looked up in the hierarchy whenever an objective is evaluated.
    """

    levels: tuple[Level, ...]
    layout: TokenLayout = field(repr=False)
    shape: tuple[int, int] | None = None
    rank: int = 0
    world_size: int = 1
    num_shared: int = 0

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

    def cell_per_token(self, stratum: str) -> Tensor:
        """Index of every token's cell in `level(stratum)`, int64 [T]; without meaning at masked tokens.

        Raises ValueError for a stratum in which soft membership puts a token into several cells.
        """
        self._refuse_soft(stratum)
        cell_T = self.layout.cell_per_token()
        for level in reversed(self.levels[self.levels.index(self.level(stratum)) + 1 :]):
            cell_T = level.up_C[cell_T] if level.up_C.numel() else cell_T
        return cell_T

    def _refuse_soft(self, stratum: str) -> None:
        if self.level(stratum).traits.soft:
            raise ValueError(f"cells: a token lies in several cells of {stratum!r}, whose membership is soft")

    def up(self, finest_2C: Tensor) -> list[Tensor]:
        """Sums of the finest level, [2, C], as sums of every level, coarsest first; children are added up."""
        return climb(self.levels, finest_2C)

    def down(self, values: list[Tensor]) -> Tensor:
        """Sum of all levels' [2, C], each read at the ancestors of the finest cells: [2, C of the finest level]."""
        total = values[0]
        for level, value in zip(self.levels[1:], values[1:], strict=True):
            total = value + total[:, level.up_C]
        return total

    def census(self) -> Tensor:
        """Int64 [cells, 4]: level, label, label of the parent (-1 at the coarsest level), live tokens of this rank (in
        units of 1/`Level.unit`)."""
        rows = []
        for index, level in enumerate(self.levels):
            if level.parent_C is None:
                parent_C = torch.full_like(level.label_C, -1)
            else:
                parent_C = self.levels[index - 1].label_C[level.parent_C]
            rows.append(
                torch.stack([torch.full_like(parent_C, index), level.label_C, parent_C, level.local_count_C], 1)
            )
        return torch.cat(rows) if rows else torch.zeros(0, 4, dtype=torch.int64, device=self.layout.cell_P.device)

    def share(self, censuses: Sequence[Tensor], rank: int) -> Cells:
        """These cells with global counts, shared slots and owners; see `sharing.share`."""
        from .sharing import share

        return share(self, censuses, rank)


def climb(levels: Sequence[Level], finest_2C: Tensor) -> list[Tensor]:
    """Sums of the last of `levels`, [2, C], as sums of all of them, coarsest first."""
    sums = [finest_2C]
    for level, parent in zip(reversed(levels), reversed(levels[:-1]), strict=False):
        empty = finest_2C.new_zeros(2, parent.label_C.numel())
        sums.append(empty.index_add_(1, level.up_C, sums[-1]))
    return sums[::-1]


def build_cells(
    strata: Sequence[str],
    labels: Mapping[str, Tensor],
    mask: Tensor | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    shape: tuple[int, int] | None = None,
    traits: Mapping[str, Traits] | None = None,
    soft: Membership | None = None,
) -> Cells:
    """Cells of `strata` (coarsest first); arguments, errors and SPMD layout as in `Hierarchy.cells`.

    Serves where no hierarchy is at hand: `build_cells(["trajectory"], {"trajectory": ids}, mask)` counts trajectories
    for `token_weights`. `traits` by stratum; with `soft`, `labels` are those of its entries.
    """
    num_tokens, mask, chosen = check_arguments(strata, labels, mask, names, shape, soft)
    if not strata:
        return _without_strata(num_tokens, mask, shape, labels)
    pieces = pieces_of([labels[name] for name in strata], mask, shape, soft)
    levels, cell_P = build_levels(strata, pieces, chosen, traits or {})
    return Cells(levels, lay_out(num_tokens, levels[-1].label_C.numel(), cell_P, mask, pieces, soft), shape)


def check_arguments(
    strata: Sequence[str],
    labels: Mapping[str, Tensor],
    mask: Tensor | None,
    names: Mapping[str, Sequence[str]] | None,
    shape: tuple[int, int] | None,
    soft: Membership | None = None,
) -> tuple[int, Tensor | None, dict[str, tuple[str, ...]]]:
    """Number of tokens, the mask (None where all are live) and the names of `strata`, after the checks of them all.

    With `soft` labels are of entries, and `find_membership` has held tokens, mask and shape against each other.
    """
    for name in strata:
        if name not in labels:
            given = ", ".join(map(repr, labels)) or "none"
            raise ValueError(f"labels: the active stratum {name!r} has no labels (given: {given})")
    fields = {f"labels[{name!r}]": labels[name] for name in strata}
    if soft is None:
        num_tokens = check_labels(fields, mask, shape)
    else:
        num_tokens = check_labels(fields, None, None) // soft.parts
    chosen = {name: tuple(names[name]) for name in strata if names and name in names}
    for name, values in chosen.items():
        if len(set(values)) != len(values):
            raise ValueError(f"names[{name!r}]: names must be unique, got {list(values)}")
    if mask is not None and bool(mask.all()):
        mask = None
    return num_tokens, mask, chosen


def pieces_of(
    label_KT: list[Tensor], mask: Tensor | None, shape: tuple[int, int] | None, soft: Membership | None
) -> Pieces:
    """The pieces of tokens, or those of the entries that `soft` divides them into."""
    if soft is not None:
        return weighted_pieces(label_KT, soft.weight_TP.flatten(), soft.UNIT)
    return make_pieces(label_KT, mask, shape)


def lay_out(
    num_tokens: int, num_cells: int, cell_P: Tensor, mask: Tensor | None, pieces: Pieces, soft: Membership | None
) -> TokenLayout:
    """Where the tokens of `num_cells` cells lie; `cell_P` is the cell of each piece."""
    if pieces.row_length:
        return RowLayout(num_tokens, num_cells, pieces.expand(cell_P), mask, pieces.row_length)
    own = torch.arange(num_cells, device=cell_P.device)
    if soft is not None:
        return SoftLayout(num_tokens, num_cells, own, mask, pieces.expand(cell_P.to(torch.int32)), soft)
    return ScatteredLayout(num_tokens, num_cells, own, mask, pieces.expand(cell_P.to(torch.int32)))


def check_labels(fields: Mapping[str, Tensor], mask: Tensor | None, shape: tuple[int, int] | None) -> int:
    """Number of tokens, after the checks of type, dtype, dimension, length and shape."""
    wanted = dict.fromkeys(fields, torch.int64)
    tensors = dict(fields)
    if mask is not None:
        tensors["mask"], wanted["mask"] = mask, torch.bool
    num_tokens = None
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.dtype != wanted[name]:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: must be a tensor of {wanted[name]}, got {got}")
        if value.ndim != 1:
            raise ValueError(f"{name}: must have one dimension [T], got shape {list(value.shape)}")
        if num_tokens is None:
            first, num_tokens = name, value.numel()
        if value.numel() != num_tokens:
            raise ValueError(f"{name}: has {value.numel()} tokens, but {first} has {num_tokens}")
    if shape is not None:
        if len(shape) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
            raise ValueError(f"shape: must be two integers (B, S), got {shape!r}")
        if num_tokens is not None and shape[0] * shape[1] != num_tokens:
            raise ValueError(f"shape: {shape[0]} x {shape[1]} is not the number of tokens, {num_tokens}")
        num_tokens = shape[0] * shape[1]
    return -1 if num_tokens is None else num_tokens


def _without_strata(
    num_tokens: int, mask: Tensor | None, shape: tuple[int, int] | None, labels: Mapping[str, Tensor]
) -> Cells:
    """No active stratum: one nameless cell that no level reports, so that the token clip alone acts."""
    some = mask if mask is not None else next(iter(labels.values()), None)
    if num_tokens < 0:
        if some is None:
            raise ValueError("labels: with no active stratum, labels, mask or shape must tell the number of tokens")
        num_tokens = some.numel()
    device = torch.device("cpu") if some is None else some.device
    cell_T = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    return Cells(
        (), ScatteredLayout(num_tokens, 1, torch.zeros(1, dtype=torch.int64, device=device), mask, cell_T), shape
    )
