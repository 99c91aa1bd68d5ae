"""Where the tokens of each finest cell lie in the flat token axis: the only code that reduces over tokens.

Two layouts serve the same four calls. RowLayout holds where [T] is a row-major batch each of whose rows lies in one
finest cell: no per-token index is kept and sums run along rows. ScatteredLayout holds for any other order, with one
int32 index per token. Either is worked through in blocks of tokens, so temporaries stay in cache.

A piece (_P) is what a layout sums into: a row, or a finest cell. `cell_P` maps pieces to finest cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens of a block. On a CPU its ten buffers should stay in cache, and it should be several times the 32768 elements
# that torch gives to one thread: with two threads, blocks of a quarter of this take twice as long.
CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 26


INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


class Workspace:
    """Buffers as large as a block, made once and written again for every block.

    They stay in cache, where a fresh result for every operation would push the ones before it out.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The buffer of this name, with what it last held. No block is larger than the first one."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Consecutive tokens; `bits` is -1 at live tokens and 0 at masked ones, None where all are live.

    Selection is done on the bits of the numbers: `value & bits` is exactly 0.0 at masked tokens whatever they hold,
    where a product would keep NaN, and torch.where costs about twenty times an arithmetic operation on a CPU. Results
    are buffers of the workspace: valid until the same name is asked for again.
    """

    tokens: slice
    shape: tuple[int, ...]
    bits: Tensor | None
    space: Workspace
    device: torch.device

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """A buffer with one value per token of this block."""
        return self.space.buffer(name, dtype, self.shape, self.device)

    def take(self, value_T: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """The block's tokens of `value_T`, exactly 0 at masked ones. Not to be written: it may be `value_T` itself."""
        value = value_T[self.tokens].view(self.shape)
        if value.dtype != dtype:
            value = self.buffer(name, dtype).copy_(value)
        if self.bits is None:
            return value
        out = self.buffer(name, dtype)
        torch.bitwise_and(value.view(INTEGER[dtype]), self.bits, out=out.view(INTEGER[dtype]))
        return out

    def negative(self, value: Tensor) -> Tensor:
        """-1 where value < 0, else 0, as integers of the same width: the channel of a token; -0.0 is not below 0."""
        whole = INTEGER[value.dtype]
        unsigned_zero = torch.add(value, 0.0, out=self.buffer("negative", value.dtype))
        return unsigned_zero.view(whole).bitwise_right_shift_(torch.iinfo(whole).bits - 1)

    def clear_masked(self, value: Tensor) -> Tensor:
        """Set `value` to exactly 0 at masked tokens, in place."""
        if self.bits is not None:
            value.view(INTEGER[value.dtype]).bitwise_and_(self.bits)
        return value

    def wide(self, value: Tensor) -> Tensor:
        """`value` in float64."""
        return value if value.dtype == torch.float64 else self.buffer("wide", torch.float64).copy_(value)

    def mixed(self, value: Tensor) -> Tensor:
        """What `value` comes to at the token, where a token is in several cells (membership.py); it may be written."""
        return value

    def total(self, value: Tensor) -> Tensor:
        """Float64 sum over live tokens."""
        return self.clear_masked(value).sum(dtype=torch.float64)

    def write(self, out_T: Tensor, value: Tensor) -> None:
        """Put `value` into the block's tokens of `out_T`, exactly 0 at masked ones."""
        out_T[self.tokens] = self.clear_masked(value).view(-1)

    def accumulate(self, out_T: Tensor, value: Tensor) -> None:
        """As `write`, added to what is there."""
        out_T[self.tokens] += self.clear_masked(value).view(-1)

    def write_rest(self, out_T: Tensor, value: Tensor, part: Tensor) -> None:
        """Put `value` - `part`, which are both 0 at masked tokens, into the block's tokens of `out_T`."""
        torch.sub(value, part, out=out_T[self.tokens].view(self.shape))


@dataclass(frozen=True, slots=True)
class RowBlock(_Tokens):
    """Consecutive rows. Token values are [rows, S]."""

    rows: slice

    def own(self, table_2P: Tensor, neg: Tensor, name: str) -> Tensor:
        """Per token the entry of its piece and its own channel."""
        whole = INTEGER[table_2P.dtype]
        pos_P, neg_P = table_2P.view(whole)[:, self.rows, None]
        out = self.buffer(name, table_2P.dtype)
        torch.bitwise_and(neg, pos_P ^ neg_P, out=out.view(whole)).bitwise_xor_(pos_P)
        return out

    def add(self, sums_2P: Tensor, neg: Tensor, value: Tensor) -> None:
        """Set the float64 sums of each piece and channel to those of `value`; a row lies in one block only."""
        whole = INTEGER[value.dtype]
        in_neg = self.buffer("part", value.dtype)
        torch.bitwise_and(value.view(whole), neg, out=in_neg.view(whole))
        torch.sum(self.wide(in_neg), 1, out=sums_2P[1, self.rows])
        self.add_undivided(sums_2P, torch.sub(value, in_neg, out=in_neg))

    def add_undivided(self, sums_2P: Tensor, value: Tensor) -> None:
        """As `add`, with all tokens in the positive channel: one sum instead of two."""
        torch.sum(self.wide(value), 1, out=sums_2P[0, self.rows])


@dataclass(frozen=True, slots=True)
class ScatteredBlock(_Tokens):
    """Tokens in any order of cells. Token values are [tokens]."""

    cell: Tensor
    num_cells: int

    def _index(self, neg: Tensor) -> Tensor:
        return torch.bitwise_and(neg, self.num_cells, out=self.buffer("index", neg.dtype)).add_(self.cell)

    def own(self, table_2P: Tensor, neg: Tensor, name: str) -> Tensor:
        """Per token the entry of its cell and its own channel."""
        out = self.buffer(name, table_2P.dtype)
        return torch.index_select(table_2P.reshape(-1), 0, self._index(neg), out=out)

    def add(self, sums_2P: Tensor, neg: Tensor, value: Tensor) -> None:
        """Add `value` in float64 to the sums of each token's cell and own channel."""
        index = self.buffer("index64", torch.int64).copy_(self._index(neg))
        sums_2P.view(-1).scatter_add_(0, index, self.wide(value))

    def add_undivided(self, sums_2P: Tensor, value: Tensor) -> None:
        """As `add`, with all tokens in the positive channel."""
        sums_2P[0].scatter_add_(0, self.buffer("index64", torch.int64).copy_(self.cell), self.wide(value))


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
        """Per-cell values as per-piece values; 0 where all tokens are masked, so that there is no cell to read."""
        if not self.num_cells:
            return table_2C.new_zeros(2, self.cell_P.numel())
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

    def _bits(self, tokens: slice, shape: tuple[int, ...], space: Workspace) -> Tensor | None:
        if self.mask_T is None:
            return None
        out = space.buffer("bits", torch.int32, shape, self.mask_T.device)
        return out.copy_(self.mask_T[tokens].view(shape)).neg_()


@dataclass(frozen=True, eq=False)
class RowLayout(TokenLayout):
    """Rows of `length` tokens, each with all its live tokens in one finest cell. Rows may share a cell; a row without
    live tokens points at cell 0 and adds nothing to it."""

    length: int

    def blocks(self) -> Iterator[Block]:
        num_rows = self.cell_P.numel() if self.num_cells else 0
        step = max(1, self._block_tokens() // self.length) if num_rows else 1
        space = Workspace()
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            tokens = slice(first * self.length, last * self.length)
            shape = (last - first, self.length)
            bits = self._bits(tokens, shape, space)
            yield RowBlock(tokens, shape, bits, space, self.cell_P.device, slice(first, last))

    def cell_per_token(self) -> Tensor:
        return self.cell_P.repeat_interleave(self.length)


@dataclass(frozen=True, eq=False)
class ScatteredLayout(TokenLayout):
    """One finest cell index per token (0 at masked tokens); the pieces are the cells."""

    cell_T: Tensor

    def blocks(self) -> Iterator[Block]:
        step, space = self._block_tokens(), Workspace()
        for first in range(0, self.num_tokens if self.num_cells else 0, step):
            tokens = slice(first, min(first + step, self.num_tokens))
            shape, device = (tokens.stop - first,), self.cell_T.device
            bits = self._bits(tokens, shape, space)
            yield ScatteredBlock(tokens, shape, bits, space, device, self.cell_T[tokens], self.num_cells)

    def spread(self, table_2C: Tensor) -> Tensor:
        return table_2C

    def fold(self, sums_2P: Tensor) -> Tensor:
        return sums_2P

    def cell_per_token(self) -> Tensor:
        return self.cell_T.long()
