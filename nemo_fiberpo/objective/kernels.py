"""Tokens in pieces, and the three passes over them: the only code that touches a token.

    measure   signed channel sums, and the count of bad input
    weigh     residual, clip, exp: y = w A rhat, and its sums
    pull      add what cells give back to their tokens

The passes are pure functions of plain torch on tensors [P, S], P pieces of S entries; what they return begins with P.
`torch.compile` fuses each into one kernel: by default on a GPU, not on a CPU; NEMO_FIBERPO_COMPILE=auto|0|1 or
`compile_passes` choose. Elementwise math is in float32, float64 for float64 input. Sums are float64,
taken along a piece and then over pieces in their order: two runs give the same bits.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forest import SegmentSum, read
from .gates import log_clip

LARGEST = {torch.float32: torch.finfo(torch.float32).max, torch.float64: 1e280}
"""Magnitudes beyond it count as non-finite: a float64 sum of them could overflow."""
LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 500.0}
"""Ratios that no gate bounds are exp(min(ell, this))."""
LONGEST = 256
"""Largest length of pieces that are cut; of its halves the longest is taken that adds at most a quarter of places."""
BLOCK = 1 << 16
"""Entries that an uncompiled pass works on at a time."""
MODES = ("auto", "0", "1")


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where the entries of joint cells lie. An entry is a token, or with soft membership a token with one share.

    Each piece lies in one joint cell. Pieces are the rows of a batch as they stand, where every row lies in one joint
    cell; else the entries of each joint cell one after the other, cut to a fixed length and filled up.

    batch      (B, S) of the flattened tokens where it is known, for messages
    mask_T     bool, live tokens; None where all are
    cell_P     joint cell of a piece; their number where no token of the piece is live
    live_PS    bool, places that hold a live entry; None where all do
    token_PS   the token of an entry; None for rows as they stand
    entry_TQ   the places of a token's entries, largest share first; Q = 1 with hard labels; None for rows as they stand
    share_TQ   float64, the shares of a token's entries, and share_PS those at every place, 0 where no entry is; None
               with hard labels, where each counts for 1
    """

    num_tokens: int
    shape: tuple[int, int]
    num_cells: int
    batch: tuple[int, int] | None
    mask_T: Tensor | None
    cell_P: Tensor
    live_PS: Tensor | None
    token_PS: Tensor | None = None
    entry_TQ: Tensor | None = None
    share_TQ: Tensor | None = None

    share_PS: Tensor | None = None
    _to_cells: SegmentSum = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_to_cells", SegmentSum(self.cell_P, self.num_cells))

    @property
    def device(self) -> torch.device:
        return self.cell_P.device

    def spread(self, value_T: Tensor) -> Tensor:
        """Values of tokens at their entries' places, [P, S]; anything at places without a live entry."""
        if self.token_PS is not None:
            value_T = value_T.index_select(0, self.token_PS.view(-1))
        return value_T.reshape(self.shape)

    def collect(self, value_PS: Tensor) -> Tensor:
        """Values of entries at their tokens, summed by share, [T]; 0 at masked tokens if it is 0 at their places."""
        if self.entry_TQ is None or not value_PS.numel():
            return value_PS.reshape(-1) if self.entry_TQ is None else value_PS.new_zeros(self.num_tokens)
        value_E = value_PS.reshape(-1).index_select(0, self.entry_TQ.view(-1))
        if self.share_TQ is not None:  # as a correction to the first entry: exact where all entries are equal
            value_TQ = value_E.view_as(self.share_TQ)
            correction_T = (self.share_TQ * (value_TQ - value_TQ[:, :1])).sum(1)
            value_E = (value_TQ[:, 0] + correction_T).to(value_PS.dtype)
        return value_E if self.mask_T is None else torch.where(self.mask_T, value_E, 0.0)

    def cell_sums(self, value_P: Tensor) -> Tensor:
        """Sums of pieces as sums of joint cells: [P] -> [J], [P, k] -> [k, J]."""
        return self._to_cells(value_P.movedim(0, -1))

    def table(self, value_J: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of joint cells at their pieces, [k, J] -> [P, k]; 0 at a piece without a live token."""
        return read(value_J, self.cell_P).to(dtype).T.contiguous()

    def sum_tokens(self, value_T: Tensor) -> Tensor:
        """Float64 sums of values of live tokens over joint cells: [T] -> [J]."""
        value_PS = self.spread(value_T).double()
        if self.live_PS is not None:
            value_PS = torch.where(self.live_PS, value_PS, 0.0)
        return self.cell_sums((value_PS if self.share_PS is None else value_PS * self.share_PS).sum(1))

    def at_tokens(self, value_J: Tensor) -> Tensor:
        """A float64 value of joint cells read at their tokens: [J] -> [T]; 0 at masked ones."""
        value_PS = read(value_J, self.cell_P)[:, None].expand(self.shape)
        if self.live_PS is not None:
            value_PS = torch.where(self.live_PS, value_PS, 0.0)
        return self.collect(value_PS)

    @property
    def entries(self) -> Entries:
        """For the passes."""
        return Entries(self.live_PS, self.share_PS, self.share_TQ, self.token_PS, self.entry_TQ)


def rows_as_pieces(batch: tuple[int, int], mask_T: Tensor | None, joint_R: Tensor, num_cells: int) -> TokenLayout:
    """The layout of rows that lie in one joint cell each; `joint_R` is `num_cells` for rows without a live token."""
    live = None if mask_T is None else mask_T.view(batch)
    return TokenLayout(batch[0] * batch[1], batch, num_cells, batch, mask_T, joint_R, live)


def entries_as_pieces(
    joint_L: Tensor,
    at_L: Tensor,
    num_cells: int,
    num_tokens: int,
    batch: tuple[int, int] | None,
    mask_T: Tensor | None,
    share_TQ: Tensor | None,
) -> TokenLayout:
    """The layout of live entries in any order: their joint cells `joint_L`, and their places `at_L` among all entries,
    which are token-major."""
    device, per_token = joint_L.device, 1 if share_TQ is None else share_TQ.shape[1]
    order, length_J = torch.argsort(joint_L, stable=True), torch.bincount(joint_L, minlength=num_cells)
    size = LONGEST
    while size > 1 and 4 * int((-(-length_J // size)).sum()) * size > 5 * joint_L.numel():
        size //= 2
    pieces_J = -(-length_J // size)
    cell_P = torch.arange(num_cells, device=device).repeat_interleave(pieces_J)
    begin_J = (pieces_J.cumsum(0) - pieces_J) * size - (length_J.cumsum(0) - length_J)
    place_L = torch.empty_like(order)
    place_L[order] = torch.arange(len(order), device=device) + begin_J[joint_L[order]]
    shape = (cell_P.numel(), size)
    token_PS = torch.zeros(shape, dtype=torch.int64, device=device)
    token_PS.view(-1)[place_L] = at_L // per_token
    live_PS = torch.zeros(shape, dtype=torch.bool, device=device)
    live_PS.view(-1)[place_L] = True
    entry_TQ = torch.zeros(num_tokens * per_token, dtype=torch.int64, device=device)
    entry_TQ[at_L] = place_L
    entry_TQ = entry_TQ.view(num_tokens, per_token)
    share_PS = None
    if share_TQ is not None:
        share_PS = torch.zeros(shape, dtype=torch.float64, device=device)
        share_PS.view(-1)[place_L] = share_TQ.flatten()[at_L]
        share_TQ, largest_first = share_TQ.sort(1, descending=True)
        entry_TQ = entry_TQ.gather(1, largest_first)
    return TokenLayout(
        num_tokens, shape, num_cells, batch, mask_T, cell_P, None if bool(live_PS.all()) else live_PS,
        token_PS, entry_TQ, share_TQ, share_PS,
    )  # fmt: skip


class Entries(NamedTuple):
    """What the passes know of a `TokenLayout`."""

    live: Tensor | None
    share: Tensor | None = None
    share_TQ: Tensor | None = None
    token: Tensor | None = None
    place_TQ: Tensor | None = None


class Weighed(NamedTuple):
    """What `weigh` returns: y where nothing saturates, [P, S]; and float64 sums over the entries of each piece, weighed
    by share: of y and of its saturated part by channel [P, 2], of the objective and of clipped entries [P]."""

    passed: Tensor
    total: Tensor
    saturated: Tensor
    value: Tensor
    clipped: Tensor


def compute_dtype(value: Tensor) -> torch.dtype:
    """Dtype of elementwise math: float64 and float32 stay, half types are raised to float32."""
    return value.dtype if value.dtype == torch.float64 else torch.float32


def _live(value: Tensor, entries: Entries) -> Tensor:
    """`value`, and 0 at places without a live entry, whatever they hold."""
    if entries.live is None:
        return value
    return value & entries.live if value.dtype == torch.bool else torch.where(entries.live, value, 0.0)


def _sum(value: Tensor, entries: Entries) -> Tensor:
    if entries.share is not None:
        value = value * entries.share
    return value.sum(-1, dtype=torch.float64)


def _by_channel(value: Tensor, negative: Tensor, entries: Entries) -> Tensor:
    """Sums of the entries of either channel, [P, 2]."""
    neg = _sum(torch.where(negative, value, 0.0), entries)
    return torch.stack([_sum(value, entries) - neg, neg], 1)


def _own(table: Tensor, negative: Tensor) -> Tensor:
    """The entry of each place's own channel, [P, 2] -> [P, S]."""
    return torch.where(negative, table[:, 1, None], table[:, 0, None])


def _of_token(value: Tensor, entries: Entries) -> Tensor:
    """The sum of a token's entries by share, at each of them."""
    if entries.share_TQ is None or not value.numel():
        return value
    return (entries.share_TQ * value.reshape(-1)[entries.place_TQ]).sum(1).to(value.dtype)[entries.token]


def measure(log_ratio: Tensor, weight: Tensor | None, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 1, by piece: S^+ and S^- [P, 2], (9) before the division; the largest |ell| [P]; how many live entries have
    a bad log-ratio and a bad weight [P, 2], in which case the sums have no meaning."""
    x = _live(log_ratio.to(compute_dtype(log_ratio)), entries)
    size = x.abs()
    bad = [_sum(~(size <= LARGEST[x.dtype]), entries)]
    if weight is None:
        bad.append(torch.zeros_like(bad[0]))
    else:
        w = weight.to(compute_dtype(weight))
        bad.append(_sum(_live(~(w.abs() <= LARGEST[w.dtype]), entries), entries))
    return _by_channel(x, x < 0, entries), size.amax(-1).double(), torch.stack(bad, 1)


def gate(log_ratio: Tensor, table: Tensor, entries: Entries) -> Tensor:
    """log rhat of every entry, [P, S]: clip(ell - O^l, +-eps) + offset^l, with l the entry's own channel.

    `table` [P, 5] holds O^+, O^-, offset^+, offset^-, eps.
    """
    x = log_ratio.to(table.dtype)
    negative = x < 0
    return _live(log_clip(x - _own(table[:, :2], negative), table[:, 4:]) + _own(table[:, 2:4], negative), entries)


def weigh(
    log_ratio: Tensor, weight: Tensor, table: Tensor, entries: Entries, exponentiate: bool, use_min: bool
) -> Weighed:
    """Pass 2: y = w A rhat of every entry (the weight itself without `exponentiate`), split by its token clip.

    With `use_min` the objective is sum_i w_i min(r_i A_i, rhat_i A_i): where r_i A_i is the smaller one, y leaves the
    sums, and its gradient w_i A_i r_i is passed on as it is. `table` as in `gate`.
    """
    x, y = log_ratio.to(table.dtype), weight.to(table.dtype)
    negative = x < 0
    residual = x - _own(table[:, :2], negative)
    clipped = log_clip(residual, table[:, 4:])
    outside = residual != clipped
    del residual
    free = y * x.clamp_max(LARGEST_EXPONENT[x.dtype]).exp() if use_min else None
    if exponentiate:
        y = y * _of_token(clipped + _own(table[:, 2:4], negative), entries).exp()
    del clipped
    y = _live(y, entries)
    if free is not None:
        takes = free < y
        free, y = torch.where(takes, free, 0.0), torch.where(takes, 0.0, y)
    saturated = torch.where(outside, y, 0.0)
    total, passed = _by_channel(y, negative, entries), y - saturated
    value = total.sum(1)
    if free is not None:
        passed, value = passed + free, value + _sum(free, entries)
    clips = _sum(_live(outside, entries).to(y.dtype), entries)
    return Weighed(passed, total, _by_channel(saturated, negative, entries), value, clips)


def pull(passed: Tensor, log_ratio: Tensor, adjoint: Tensor, entries: Entries) -> Tensor:
    """Pass 3: the coefficient of every entry, [P, S]: `passed` + Z^l."""
    return _live(passed + _own(adjoint, log_ratio < 0), entries)


class Passes:
    """Runs a pass, compiled or not; where the compiler fails, after one warning, not.

    A pass that is not compiled works through pieces in blocks on a CPU, so that its temporaries stay in cache.
    """

    def __init__(self) -> None:
        self.mode = "auto"
        self._compiled: dict[Any, Any] = {}
        self._failed = False

    def __call__(self, function: Any, *arguments: Any) -> Any:
        if not self._compiles(arguments[0].device):
            return _in_blocks(function, arguments)
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, dynamic=True)
        try:
            return self._compiled[function](*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._failed = True
            said = (str(error).splitlines() or [""])[0]
            warnings.warn(
                f"torch.compile failed on nemo_fiberpo's {function.__name__}, which now runs uncompiled: "
                f"{type(error).__name__}: {said}. NEMO_FIBERPO_COMPILE=0 does not try",
                stacklevel=2,
            )
            return _in_blocks(function, arguments)

    def _compiles(self, device: torch.device) -> bool:
        mode = os.environ.get("NEMO_FIBERPO_COMPILE", self.mode)
        if mode not in MODES:
            raise ValueError(f"NEMO_FIBERPO_COMPILE: must be one of {', '.join(MODES)}, got {mode!r}")
        return not self._failed and (mode == "1" or (mode == "auto" and device.type == "cuda"))


def _in_blocks(function: Any, arguments: tuple[Any, ...]) -> Any:
    pieces, length = arguments[0].shape
    step = max(1, BLOCK // max(length, 1))
    entries = next(argument for argument in arguments if isinstance(argument, Entries))
    if arguments[0].device.type != "cpu" or entries.share_TQ is not None or pieces <= step:
        return function(*arguments)

    def block(argument: Any, at: slice) -> Any:
        if isinstance(argument, Entries):
            return Entries(None if argument.live is None else argument.live[at])
        return argument[at] if isinstance(argument, Tensor) else argument

    starts = range(0, pieces, step)
    parts = [function(*(block(argument, slice(at, at + step)) for argument in arguments)) for at in starts]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Weighed(*joined) if isinstance(parts[0], Weighed) else tuple(joined)


run = Passes()


def compile_passes(mode: str) -> None:
    """Choose whether the passes are compiled: "auto" (on a GPU), "0" or "1". NEMO_FIBERPO_COMPILE comes before it."""
    if mode not in MODES:
        raise ValueError(f"compile: must be one of {', '.join(MODES)}, got {mode!r}")
    run.mode = mode
