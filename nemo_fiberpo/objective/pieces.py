"""Token labels reduced to few pieces before any cell is made: rows, else runs of equal labels, else single tokens.

Sorting half a million labels costs more than the objective itself; comparing neighbours does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MIN_ROW, MAX_ROW = 32, 1 << 16


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces with at least one live token: their labels per stratum [P], live-token counts [P] in units of 1/`unit`
    tokens, and the way back.

    Rows: `row_length`, and `live_R`, the rows that are pieces, out of `num_units`.
    Runs: of live tokens (_L) with equal labels; `length_R` in tokens, `piece_R` where several runs are one piece, and
    `live_L`, the places of live tokens (None for everywhere) out of `num_units` tokens.
    """

    label_KP: list[Tensor]
    count_P: Tensor
    num_units: int
    row_length: int = 0
    live_R: Tensor | None = None
    length_R: Tensor | None = None
    piece_R: Tensor | None = None
    live_L: Tensor | None = None
    unit: int = 1

    def expand(self, cell_P: Tensor) -> Tensor:
        """Per-piece cells as cells per row, or per token; 0 for rows and tokens that are not live."""
        if self.row_length:
            assert self.live_R is not None
            return cell_P.new_zeros(self.num_units).index_copy_(0, self.live_R, cell_P)
        cell_R = cell_P if self.piece_R is None else cell_P.index_select(0, self.piece_R)
        live_L = cell_R if self.length_R is None else cell_R.repeat_interleave(self.length_R)
        if self.live_L is None:
            return live_L
        return live_L.new_zeros(self.num_units).scatter_(0, self.live_L, live_L)


def make_pieces(label_KT: list[Tensor], mask_T: Tensor | None, shape: tuple[int, int] | None) -> Pieces:
    """Rows of `shape` where each of them lies in one cell of every stratum; else rows of any other length for which
    that holds; else runs. What masked tokens hold is not looked at, so it cannot change the choice."""
    if shape is not None and label_KT[0].numel():
        rows = _rows(label_KT, mask_T, shape[1])
        if rows is not None:
            return rows
    runs, length = _runs(label_KT, mask_T)
    rows = _rows(label_KT, mask_T, length) if length else None
    return runs if rows is None else rows


def weighted_pieces(label_KT: list[Tensor], weight_T: Tensor, unit: int) -> Pieces:
    """Pieces of entries that count for `weight_T`, integers in units of 1/`unit` tokens; none where that is 0."""
    at_L = weight_T.nonzero().squeeze(1)
    labels = [label_T.index_select(0, at_L) for label_T in label_KT]
    weight_L = weight_T.index_select(0, at_L).long()
    return _by_cell(Pieces(labels, weight_L, weight_T.numel(), live_L=at_L, unit=unit))


def _rows(label_KT: list[Tensor], mask_T: Tensor | None, length: int) -> Pieces | None:
    num_rows = label_KT[0].numel() // length
    if mask_T is None:
        count_R = torch.full((num_rows,), length, dtype=torch.int64, device=label_KT[0].device)
        at_R = None
    else:
        mask_RS = mask_T.view(num_rows, length)
        count_R = mask_RS.sum(1)
        at_R = mask_RS.to(torch.uint8).argmax(1, keepdim=True)
        dead_RS = ~mask_RS
    live_R = count_R.nonzero().squeeze(1)
    label_KR = []
    # finest first: it is the one that differs where a row holds several trajectories
    for label_T in reversed(label_KT):
        label_RS = label_T.view(num_rows, length)
        first_R = label_RS[:, :1] if at_R is None else label_RS.gather(1, at_R)
        same_RS = label_RS == first_R
        if mask_T is not None:
            same_RS |= dead_RS
        if not bool(same_RS.all()):
            return None
        label_KR.append(first_R.squeeze(1)[live_R])
    return Pieces(label_KR[::-1], count_R[live_R], num_rows, row_length=length, live_R=live_R)


def _runs(label_KT: list[Tensor], mask_T: Tensor | None) -> tuple[Pieces, int]:
    """Runs of live tokens with equal labels in every stratum, or the finest cells they belong to; and a row length for
    which every row holds tokens of one run alone, 0 if there is none."""
    num_tokens = label_KT[0].numel()
    at_L = None if mask_T is None else mask_T.nonzero().squeeze(1)
    label_KL = label_KT if at_L is None else [label_T.index_select(0, at_L) for label_T in label_KT]
    num = label_KL[0].numel()
    differs_L = label_KL[-1][1:] != label_KL[-1][:-1]
    if 2 * int(differs_L.sum()) > num:  # tokens in no order: runs would not be fewer
        return _by_cell(Pieces(label_KL, torch.ones_like(label_KL[0]), num_tokens, live_L=at_L)), 0
    for label_L in label_KL[:-1]:
        differs_L |= label_L[1:] != label_L[:-1]
    first_R = differs_L.nonzero().squeeze(1) + 1
    start_R = torch.cat([first_R.new_zeros(min(num, 1)), first_R])
    length_R = torch.diff(start_R, append=start_R.new_tensor([num]))
    labels = [label_L.index_select(0, start_R) for label_L in label_KL]
    runs = Pieces(labels, length_R, num_tokens, length_R=length_R, live_L=at_L)
    last_R = first_R - 1
    if at_L is not None:
        first_R, last_R = at_L[first_R], at_L[last_R]
    return _by_cell(runs), _row_length(first_R, last_R, num_tokens)


def _by_cell(runs: Pieces) -> Pieces:
    """Runs put together by their finest label, where that says all: each coarser label is the same in all of them."""
    finest_R = runs.label_KP[-1]
    label_C, piece_R = dense_ids(finest_R)
    if 2 * label_C.numel() > finest_R.numel():
        return runs
    some_C = torch.zeros_like(label_C).scatter_(0, piece_R, torch.arange(finest_R.numel(), device=finest_R.device))
    label_KC = [label_R.index_select(0, some_C) for label_R in runs.label_KP]
    for label_R, of_C in zip(runs.label_KP, label_KC[:-1], strict=False):
        if not torch.equal(of_C.index_select(0, piece_R), label_R):
            return runs  # cells that do not nest: whoever builds the levels says which
    count_C = torch.zeros_like(label_C).index_add_(0, piece_R, runs.count_P)
    return replace(runs, label_KP=label_KC, count_P=count_C, piece_R=piece_R)


def _row_length(first_P: Tensor, last_P: Tensor, num_tokens: int) -> int:
    """Largest divisor of T, from MIN_ROW to MAX_ROW, that puts the first token of every run but the first (`first_P`)
    and the last token of the run before it (`last_P`) into different rows; 0 if there is none."""
    if first_P.numel() >= max(num_tokens // MIN_ROW, 1):
        return 0
    low = range(1, math.isqrt(num_tokens) + 1)
    divisors = {size for part in low if num_tokens % part == 0 for size in (part, num_tokens // part)}
    for length in sorted(divisors, reverse=True):
        if MIN_ROW <= length <= MAX_ROW and bool((first_P // length > last_P // length).all()):
            return length
    return 0


def dense_ids(label_P: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct labels, ascending, and the index of each piece's label among them; a table where labels are close."""
    if label_P.numel() == 0:
        return label_P, label_P
    low, high = (int(end) for end in torch.aminmax(label_P))
    if high - low >= 4 * label_P.numel() + 1024:
        label_C, cell_P = torch.unique(label_P, return_inverse=True)
        return label_C, cell_P
    shifted_P = label_P - low
    present = torch.zeros(high - low + 1, dtype=torch.int64, device=label_P.device).index_fill_(0, shifted_P, 1)
    return present.nonzero().squeeze(1) + low, (present.cumsum(0) - 1).index_select(0, shifted_P)
