"""Cells that several ranks hold: agreed once from everybody's census, and the one seam for collectives.

Nothing here communicates. The caller gathers the censuses of one rollout in any way it likes, and hands the objective a
`Reduce` that sums a small buffer over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .cells import Cells
from .levels import Level, not_nested, tallies

Reduce = Callable[[Tensor], Tensor]
"""Float64 one-dimensional buffer -> its sum over all ranks that hold tokens, the same bits on each of them."""


def share(cells: Cells, censuses: Sequence[Tensor], rank: int) -> Cells:
    """`cells` with global counts, and for the cells of several ranks their slot in the shared buffer and their owner;
    cells below the floor of their stratum (`Stratum.min_tokens`) are merged into their parents.

    Pure. A cell's owner is the lowest rank that holds it; slots go by (level, label). Every rank must pass the same
    `censuses`, in rank order, its own at position `rank`; they may live on any device.

    Raises ValueError where a cell has different parents on two ranks, and where censuses[rank] is not this census.
    """
    own = cells.census()
    if not 0 <= rank < len(censuses):
        raise ValueError(f"rank: must be within the {len(censuses)} censuses, got {rank}")
    if not torch.equal(censuses[rank].to(own.device), own):
        raise ValueError(f"censuses[{rank}]: is not the census of these cells; they must be in rank order")
    table = torch.cat([census.cpu() for census in censuses])
    rank_N = torch.cat([torch.full((len(census),), index) for index, census in enumerate(censuses)])
    levels: list[Level] = []
    next_slot = 0
    for index, level in enumerate(cells.levels):
        of_level = table[:, 0] == index
        above = levels[-1] if levels else None
        shared, next_slot = _share_level(level, above, table[of_level], rank_N[of_level], rank, next_slot)
        levels.append(shared)
    return replace(cells, levels=tuple(levels), rank=rank, world_size=len(censuses), num_shared=next_slot)


def _share_level(
    level: Level, above: Level | None, table: Tensor, rank_N: Tensor, rank: int, next_slot: int
) -> tuple[Level, int]:
    """One level, from the rows of all ranks about it and the shared level above it; also the first slot that is still
    free."""
    label_G, cell_N = torch.unique(table[:, 1], return_inverse=True)
    num = label_G.numel()
    parent_G = torch.zeros(num, dtype=torch.int64).index_copy_(0, cell_N, table[:, 2])
    wrong = (parent_G[cell_N] != table[:, 2]).nonzero()
    if wrong.numel():
        cell = int(cell_N[wrong[0]])
        assert above is not None
        raise not_nested(
            level.name, int(label_G[cell]), level.names, above, int(parent_G[cell]), int(table[wrong[0], 2])
        )
    count_G = torch.zeros(num, dtype=torch.int64).index_add_(0, cell_N, table[:, 3])
    holders_G = torch.bincount(cell_N, minlength=num)
    owner_G = torch.full((num,), len(rank_N)).scatter_reduce_(0, cell_N, rank_N, "amin")
    is_shared_G = holders_G > 1
    real_G = label_G >= 0 if level.traits.partial else torch.ones_like(is_shared_G)
    small_G = real_G & (count_G < level.traits.min_tokens * level.unit)
    acting_G = real_G & ~small_G
    slot_G = is_shared_G.cumsum(0) - 1 + next_slot

    device = level.label_C.device
    at_C = torch.searchsorted(label_G, level.label_C.cpu())
    shared_C = is_shared_G[at_C].nonzero().squeeze(1)
    return (
        replace(
            level,
            count_C=(count_G[at_C].double() / level.unit).to(device),
            owned_C=((owner_G[at_C] == rank) & acting_G[at_C]).to(device),
            shared_C=shared_C.to(device),
            slot_C=slot_G[at_C][shared_C].to(device),
            num_cells=int(real_G.sum()),
            num_tokens=int(count_G.sum()) // level.unit,
            small_C=_small(level, above, small_G[at_C].to(device)),
            merged=(int(small_G.sum()), int(count_G[small_G].sum()) / level.unit),
            tally=tallies(level.parts, label_G, count_G, acting_G, level.unit),
        ),
        next_slot + int(is_shared_G.sum()),
    )


def _small(level: Level, above: Level | None, small_C: Tensor) -> Tensor | None:
    """`Level.small_C` from the cells that are below the floor. Where the stratum is missing, a cell repeats its parent:
    it follows where that one goes."""
    if level.traits.partial and above is not None and above.small_C is not None:
        small_C = small_C | ((level.label_C < 0) & torch.isin(level.up_C, above.small_C))
    elif not level.traits.min_tokens:
        return None
    return small_C.nonzero().squeeze(1)


def exchange(head: Tensor, values: list[Tensor], cells: Cells, reduce: Reduce | None) -> tuple[Tensor, list[Tensor]]:
    """Sum `head` (float64 [n]) and, for the shared cells, `values` (float64 [2, C] per level) over the ranks.

    One call of `reduce`, on n + 2 * num_shared numbers, also on a rank without tokens; none where `reduce` is None.
    Cells that one rank holds alone keep their local values.
    """
    if reduce is None:
        if cells.world_size > 1:
            raise ValueError(f"reduce: these cells are shared by {cells.world_size} ranks, so a reduction is required")
        return head, values
    packed = head.new_zeros(2, cells.num_shared)
    for level, value in zip(cells.levels, values, strict=True):
        packed[:, level.slot_C] = value[:, level.shared_C]
    total = reduce(torch.cat([head, packed.flatten()]))
    summed = total[head.numel() :].view(2, cells.num_shared)
    out = [value.clone() for value in values]
    for level, value in zip(cells.levels, out, strict=True):
        value[:, level.shared_C] = summed[:, level.slot_C]
    return total[: head.numel()], out
