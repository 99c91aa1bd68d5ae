"""Soft membership: a token lies in several cells of a classification, each with a share (EQUATIONS, section 8, soft).

Token i has shares q_ie >= 0 in the values e of one column, sum_e q_ie = 1: a token whose layers, or whose top experts,
differ in partition. The total space is tokens x values x channels, an entry (_E) a token with one of the values. Cells
are cells of entries, which count for q:
    F(r)(i, e, l) = q_ie [l log r_i]_+,    M_c^l = sum_{(i,e) in c} q_ie a_i^l / Q_c,    k = Q_c = sum_{(i,e) in c} q_ie
    L_i = sum_e q_ie L_ie,    L_ie = sum_l [ sum_n g(X_n^l(i, e)) + clip(a_i^l - M_K^l(i, e), +-eps) ]
Strata that do not go by the column have the cells and counts that they have without soft membership. Shares are
integers in units of 1/255, so that counts are exact sums, the same in whatever way tokens are split over ranks. With
shares of 0 and 1 alone all is as with hard labels.

Entries are token-major: those of token i are i P .. i P + P - 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .expert_partitions import MEMBERSHIP_UNITS
from .layout import Block, ScatteredBlock, ScatteredLayout, Workspace


@dataclass(frozen=True, eq=False)
class Membership:
    """Shares of this rank's tokens in the values of `column`: uint8 [T, P] in units of 1/UNIT, 0 at masked tokens."""

    column: str
    weight_TP: Tensor
    UNIT: ClassVar[int] = MEMBERSHIP_UNITS

    @property
    def parts(self) -> int:
        """P, the values of the column."""
        return self.weight_TP.shape[1]

    def largest(self) -> Tensor:
        """The value in which each token has the largest share, the lowest of equal ones: int64 [T]."""
        return self.weight_TP.argmax(1)

    def entries(self, labels: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Labels of entries, int64 [T P], from those of tokens, and which entries count for something, bool [T P]."""
        num, parts = self.weight_TP.shape
        out = {name: label.repeat_interleave(parts) for name, label in labels.items()}
        out[self.column] = torch.arange(parts, device=self.weight_TP.device).repeat(num)
        return out, (self.weight_TP > 0).flatten()


def find_membership(
    labels: Mapping[str, Tensor], columns: Collection[str], mask: Tensor | None, names: Mapping[str, Collection[str]]
) -> Membership | None:
    """The column of `columns` whose labels are shares, if one is: uint8 [T, P].

    Raises ValueError for two of them, for shares that do not sum to 255 at a live token, and where a column has other
    than P names. What masked tokens hold is ignored.
    """
    soft = [name for name in columns if name in labels and _is_soft(labels[name])]
    if not soft:
        return None
    if len(soft) > 1:
        raise ValueError(f"labels[{soft[1]!r}]: is soft, as {soft[0]!r} is; one column at most can have shares")
    name, weight_TP = soft[0], labels[soft[0]]
    where = f"labels[{name!r}]"
    num, parts = weight_TP.shape
    if name in names and len(names[name]) != parts:
        raise ValueError(f"{where}: has shares in {parts} values, but names[{name!r}] has {len(names[name])}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (num,) or mask.dtype != torch.bool:
            raise ValueError(f"mask: must be a tensor of torch.bool, a value for each of the {num} tokens of {where}")
        weight_TP = weight_TP * mask[:, None]
    total_T = weight_TP.sum(1, dtype=torch.int64)
    wrong_T = total_T != Membership.UNIT if mask is None else mask & (total_T != Membership.UNIT)
    if bool(wrong_T.any()):
        index = int(wrong_T.nonzero()[0])
        raise ValueError(
            f"{where}: the shares of token {index} of the flat batch sum to {int(total_T[index])}; those of a live "
            f"token are in units of 1/{Membership.UNIT} and must sum to {Membership.UNIT}"
        )
    return Membership(name, weight_TP)


def _is_soft(label: object) -> bool:
    return isinstance(label, Tensor) and label.ndim == 2 and label.dtype == torch.uint8


@dataclass(frozen=True, slots=True)
class SoftBlock(ScatteredBlock):
    """Entries of consecutive tokens. Values are [tokens P]; sums weigh them by `share`, q, 0 at masked tokens."""

    parts: int
    share: Tensor

    def take(self, value_T: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """The tokens' values at each of their entries."""
        out = self.buffer(name, dtype)
        out.view(-1, self.parts).copy_(value_T[self.tokens, None])
        return self.clear_masked(out)

    def _weighed(self, value: Tensor) -> Tensor:
        return torch.mul(value, self.share, out=self.buffer("weighed", torch.float64))

    def _of_tokens(self, value: Tensor) -> Tensor:
        """sum_e q_ie value_ie, float64 [tokens]."""
        return self._weighed(value).view(-1, self.parts).sum(1)

    def add(self, sums_2P: Tensor, neg: Tensor, value: Tensor) -> None:
        ScatteredBlock.add(self, sums_2P, neg, self._weighed(value))

    def add_undivided(self, sums_2P: Tensor, value: Tensor) -> None:
        ScatteredBlock.add_undivided(self, sums_2P, self._weighed(value))

    def mixed(self, value: Tensor) -> Tensor:
        value.view(-1, self.parts).copy_(self._of_tokens(value)[:, None])
        return value

    def total(self, value: Tensor) -> Tensor:
        return self._weighed(value).sum()

    def write(self, out_T: Tensor, value: Tensor) -> None:
        out_T[self.tokens] = self._of_tokens(value).to(out_T.dtype)

    def accumulate(self, out_T: Tensor, value: Tensor) -> None:
        out_T[self.tokens] += self._of_tokens(value).to(out_T.dtype)

    def write_rest(self, out_T: Tensor, value: Tensor, part: Tensor) -> None:
        whole_T = value.view(-1, self.parts)[:, 0]  # the same at all entries of a token
        out_T[self.tokens] = whole_T - self._of_tokens(part).to(whole_T.dtype)


@dataclass(frozen=True, eq=False)
class SoftLayout(ScatteredLayout):
    """One finest cell per entry, `cell_T` [T P] (0 where the entry counts for nothing); the pieces are the cells."""

    soft: Membership

    def blocks(self) -> Iterator[Block]:
        parts, space, device = self.soft.parts, Workspace(), self.cell_T.device
        step = max(1, self._block_tokens() // parts)
        for first in range(0, self.num_tokens if self.num_cells else 0, step):
            tokens = slice(first, min(first + step, self.num_tokens))
            entries, shape = slice(first * parts, tokens.stop * parts), ((tokens.stop - first) * parts,)
            share = space.buffer("share", torch.float64, shape, device)
            share.copy_(self.soft.weight_TP[tokens].view(-1)).div_(self.soft.UNIT)
            bits = None
            if self.mask_T is not None:
                bits = space.buffer("bits", torch.int32, shape, device)
                bits.view(-1, parts).copy_(self.mask_T[tokens, None]).neg_()
            cell = self.cell_T[entries]
            yield SoftBlock(tokens, shape, bits, space, device, cell, self.num_cells, parts, share)

    def cell_per_token(self) -> Tensor:
        """The cell of each token's largest share."""
        return self.cell_T.view(-1, self.soft.parts).gather(1, self.soft.largest()[:, None]).squeeze(1).long()
