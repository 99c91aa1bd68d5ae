"""Where the tokens of each finest cell lie in the flat token axis: the only code that reduces over tokens.

Two layouts serve the same four calls. RowLayout holds where [T] is a row-major batch each of whose rows lies in one
finest cell: no per-token index is kept and sums run along rows. ScatteredLayout holds for any other order, with one
int32 index per token. Either is worked through in blocks of tokens, so temporaries stay in cache.

A piece (_P) is what a layout sums into: a row, or a finest cell. `cell_P` maps pieces to finest cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_BLOCK = 1 << 16
GPU_BLOCK = 1 << 26


INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def keep(value: Tensor, bits: Tensor) -> Tensor:
    """`value` where `bits` is -1 (all ones), exactly 0.0 where it is 0, whatever `value` holds there, NaN and inf too.

    A product would keep NaN, and torch.where costs about twenty times an arithmetic operation on a CPU.
    """
    return (value.view(INTEGER[value.dtype]) & bits).view(value.dtype)


def negative(value: Tensor) -> Tensor:
    """-1 where value < 0, else 0, as integers of the same width: the channel of a token; -0.0 is not below 0."""
    whole = INTEGER[value.dtype]
    return (value + 0.0).view(whole) >> (torch.iinfo(whole).bits - 1)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Consecutive tokens; `bits` is -1 at live tokens and 0 at masked ones, None where all are live."""

    tokens: slice
    bits: Tensor | None

    def live(self, value: Tensor) -> Tensor:
        """`value`, exactly 0 at masked tokens."""
        return value if self.bits is None else keep(value, self.bits)


@dataclass(frozen=True, slots=True)
class RowBlock(_Tokens):
    """Consecutive rows. Token values are [rows, S]."""

    rows: slice
    length: int

    def take(self, value_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The block's tokens of `value_T`, exactly 0 at masked ones."""
        return self.live(value_T[self.tokens].view(-1, self.length).to(dtype))

    def own(self, table_2P: Tensor, neg: Tensor) -> Tensor:
        """Per token the entry of its piece and its own channel."""
        pos_P, neg_P = table_2P.view(INTEGER[table_2P.dtype])[:, self.rows, None]
        chosen: Tensor = pos_P ^ ((pos_P ^ neg_P) & neg)
        return chosen.view(table_2P.dtype)

    def add(self, sums_2P: Tensor, neg: Tensor, value: Tensor) -> None:
        """Set the float64 sums of each piece and channel to those of `value`; a row lies in one block only."""
        in_neg = keep(value, neg)
        torch.sum(value - in_neg, 1, dtype=torch.float64, out=sums_2P[0, self.rows])
        torch.sum(in_neg, 1, dtype=torch.float64, out=sums_2P[1, self.rows])

    def add_undivided(self, sums_2P: Tensor, value: Tensor) -> None:
        """As `add`, with all tokens in the positive channel: one sum instead of two."""
        torch.sum(value, 1, dtype=torch.float64, out=sums_2P[0, self.rows])


@dataclass(frozen=True, slots=True)
class ScatteredBlock(_Tokens):
    """Tokens in any order of cells. Token values are [tokens]."""

    cell: Tensor
    num_cells: int

    def take(self, value_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The block's tokens of `value_T`, exactly 0 at masked ones."""
        return self.live(value_T[self.tokens].to(dtype))

    def own(self, table_2P: Tensor, neg: Tensor) -> Tensor:
        """Per token the entry of its cell and its own channel."""
        return table_2P.reshape(-1).index_select(0, self.cell + (neg & self.num_cells))

    def add(self, sums_2P: Tensor, neg: Tensor, value: Tensor) -> None:
        """Add `value` in float64 to the sums of each token's cell and own channel."""
        index = (self.cell + (neg & self.num_cells)).long()
        sums_2P.view(-1).scatter_add_(0, index, value.to(torch.float64))

    def add_undivided(self, sums_2P: Tensor, value: Tensor) -> None:
        """As `add`, with all tokens in the positive channel."""
        sums_2P[0].scatter_add_(0, self.cell.long(), value.to(torch.float64))


Block = RowBlock | ScatteredBlock


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Common part: the mask (None where every token is live) and the map from pieces to finest cells."""

    num_tokens: int
    num_cells: int
    cell_P: Tensor
    mask_T: Tensor | None

    def blocks(self) -> Iterator[Block]:
        """Blocks that cover all tokens in order; none where no token is live."""
        raise NotImplementedError

    def zeros(self) -> Tensor:
        """Float64 [2, P] to sum into."""
        return torch.zeros(2, self.cell_P.numel(), dtype=torch.float64, device=self.cell_P.device)

    def spread(self, table_2C: Tensor) -> Tensor:
        """Per-cell values as per-piece values."""
        return table_2C.index_select(1, self.cell_P)

    def fold(self, sums_2P: Tensor) -> Tensor:
        """Sums of pieces as sums of cells."""
        out = torch.zeros(2, self.num_cells, dtype=sums_2P.dtype, device=sums_2P.device)
        return out.index_add_(1, self.cell_P, sums_2P)

    def cell_per_token(self) -> Tensor:
        """Finest cell of every token, int64 [T]; without meaning at masked tokens."""
        raise NotImplementedError

    def _block_tokens(self) -> int:
        return CPU_BLOCK if self.cell_P.device.type == "cpu" else GPU_BLOCK

    def _bits(self, tokens: slice) -> Tensor | None:
        return None if self.mask_T is None else self.mask_T[tokens].to(torch.int32).neg_()


@dataclass(frozen=True, eq=False)
class RowLayout(TokenLayout):
    """Rows of `length` tokens, each with all its live tokens in one finest cell. Rows may share a cell; a row without
    live tokens points at cell 0 and adds nothing to it."""

    length: int

    def blocks(self) -> Iterator[Block]:
        num_rows = self.cell_P.numel() if self.num_cells else 0
        step = max(1, self._block_tokens() // self.length) if num_rows else 1
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            tokens = slice(first * self.length, last * self.length)
            bits = self._bits(tokens)
            bits = None if bits is None else bits.view(-1, self.length)
            yield RowBlock(tokens, bits, slice(first, last), self.length)

    def cell_per_token(self) -> Tensor:
        return self.cell_P.repeat_interleave(self.length)


@dataclass(frozen=True, eq=False)
class ScatteredLayout(TokenLayout):
    """One finest cell index per token (0 at masked tokens); the pieces are the cells."""

    cell_T: Tensor

    def blocks(self) -> Iterator[Block]:
        step = self._block_tokens()
        for first in range(0, self.num_tokens if self.num_cells else 0, step):
            tokens = slice(first, min(first + step, self.num_tokens))
            yield ScatteredBlock(tokens, self._bits(tokens), self.cell_T[tokens], self.num_cells)

    def spread(self, table_2C: Tensor) -> Tensor:
        return table_2C

    def fold(self, sums_2P: Tensor) -> Tensor:
        return sums_2P

    def cell_per_token(self) -> Tensor:
        return self.cell_T.long()
