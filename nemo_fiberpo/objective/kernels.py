"""Tokens in pieces, and the three passes over them: the only code that touches a token.

    measure   signed channel sums, and the count of bad input
    weigh     residual, clip, exp: y = w A rhat, and its sums
    pull      add what the cells give back to their tokens

A pass is a pure function of tensors [P, S], P pieces of S entries; what it returns begins with P. `torch.compile` fuses
it into one kernel: by default on a GPU only; NEMO_FIBERPO_COMPILE=auto|0|1 or `compile_passes` choose. Math is in
float32, or float64 for float64 input. Sums are float64, along a piece and then over pieces in their order: two runs
give the same bits.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forest import SegmentSum, read
from .gates import log_clip

LARGEST = {torch.float32: torch.finfo(torch.float32).max, torch.float64: 1e280}
"""Larger magnitudes count as non-finite: a float64 sum of them could overflow."""
LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 500.0}  # ratios that no gate bounds are exp(min(ell, this))
LONGEST = 256  # largest length of pieces that are cut; halved until padding adds at most a quarter
BLOCK = 1 << 16  # entries that an uncompiled pass works on at a time
MOST_GRAPHS = 64  # of one pass
MODES = ("auto", "0", "1")


class Entries(NamedTuple):
    """The entries of joint cells: tokens; with soft membership, pairs of a token and a value that it has a share in."""

    live: Tensor | None  # bool [P, S], places that hold a live entry; None where all do
    # with soft membership, float64: shares at every place [P, S], 0 without an entry; those of a token, largest first
    share: Tensor | None = None
    share_TQ: Tensor | None = None
    # int64: the token of an entry [P, S], and the places of a token's entries [T, Q]; None for rows as they stand
    token: Tensor | None = None
    place_TQ: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where the entries lie: in pieces of one joint cell each. Pieces are the rows of the batch as they stand, if every
    row lies in one joint cell; else the entries of each joint cell in turn, cut to a fixed length and padded."""

    num_tokens: int  # of this rank, masked ones included
    batch: tuple[int, int] | None  # (B, S) of the flattened tokens where it is known
    mask_T: Tensor | None  # bool, live tokens; None where all are
    cell_P: Tensor  # joint cell of a piece; J where no token of the piece is live
    to_cells: SegmentSum  # sums of pieces by joint cell
    entries: Entries

    def spread(self, value_T: Tensor) -> Tensor:
        """Values of tokens at the places of their entries, [P, S]; arbitrary at places without a live entry."""
        token = self.entries.token
        if token is None:
            return value_T.reshape(self.batch or ())
        return value_T.index_select(0, token.view(-1)).view_as(token)

    def collect(self, value_PS: Tensor) -> Tensor:
        """Values of entries at their tokens, summed by share, [T]. Values at places of masked tokens must be 0."""
        place_TQ, share_TQ = self.entries.place_TQ, self.entries.share_TQ
        if place_TQ is None or not value_PS.numel():
            return value_PS.reshape(-1) if place_TQ is None else value_PS.new_zeros(self.num_tokens)
        value_T = value_PS.reshape(-1).index_select(0, place_TQ.view(-1))
        if share_TQ is not None:  # as a correction to the first entry: exact where all entries are equal
            value_TQ = value_T.view_as(share_TQ)
            correction_T = (share_TQ * (value_TQ - value_TQ[:, :1])).sum(1)
            value_T = (value_TQ[:, 0] + correction_T).to(value_PS.dtype)
        return value_T if self.mask_T is None else value_T.masked_fill_(~self.mask_T, 0.0)

    def masked(self, value_T: Tensor, other: float = 0.0) -> Tensor:
        """Values of live tokens, and `other` at masked ones, whatever they hold."""
        return value_T if self.mask_T is None else torch.where(self.mask_T, value_T, other)

    def cell_sums(self, value_P: Tensor) -> Tensor:
        """Sums of pieces as sums of joint cells: [P] -> [J], [P, k] -> [k, J]."""
        return self.to_cells(value_P.movedim(0, -1))

    def table(self, value_J: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of joint cells at their pieces, [k, J] -> [P, k]; 0 at a piece without a live token."""
        return read(value_J, self.cell_P).to(dtype).T.contiguous()

    def sum_tokens(self, value_T: Tensor) -> Tensor:
        """Float64 sums of the values of live tokens over joint cells: [T] -> [J]."""
        return self.cell_sums(_sum(_live(self.spread(value_T).double(), self.entries), self.entries))

    def at_tokens(self, value_J: Tensor) -> Tensor:
        """A float64 value of joint cells read at their tokens: [J] -> [T]; 0 at masked ones."""
        shape = self.batch or () if self.entries.token is None else self.entries.token.shape
        return self.collect(_live(read(value_J, self.cell_P)[:, None].expand(shape), self.entries))


def entries_as_pieces(
    joint_L: Tensor, at_L: Tensor, num_cells: int, num_tokens: int, share_TQ: Tensor | None
) -> tuple[Tensor, Entries]:
    """The joint cell of every piece, and its entries, from live entries in any order: their joint cells, and their
    places among all entries, which are token-major."""
    order, length_J = torch.argsort(joint_L, stable=True), torch.bincount(joint_L, minlength=num_cells)
    size = LONGEST
    while size > 1 and 4 * int((-(-length_J // size)).sum()) * size > 5 * len(order):
        size //= 2
    pieces_J = -(-length_J // size)
    cell_P = torch.arange(num_cells, device=order.device).repeat_interleave(pieces_J)
    begin_J = (pieces_J.cumsum(0) - pieces_J) * size - (length_J.cumsum(0) - length_J)
    place_L = torch.empty_like(order)
    place_L[order] = torch.arange(len(order), device=order.device) + begin_J[joint_L[order]]

    def scattered(value: Tensor, index: Tensor, *shape: int) -> Tensor:
        return value.new_zeros(shape).view(-1).index_copy_(0, index, value).view(shape)

    shape, per_token = (len(cell_P), size), 1 if share_TQ is None else share_TQ.shape[1]
    live, token = scattered(joint_L >= 0, place_L, *shape), scattered(at_L // per_token, place_L, *shape)
    place_TQ, share = scattered(place_L, at_L, num_tokens, per_token), None
    if share_TQ is not None:
        share = scattered(share_TQ.flatten()[at_L], place_L, *shape)
        share_TQ, largest_first = share_TQ.sort(1, descending=True)
        place_TQ = place_TQ.gather(1, largest_first)
    return cell_P, Entries(None if bool(live.all()) else live, share, share_TQ, token, place_TQ)


class Weighed(NamedTuple):
    """y where nothing saturates, [P, S]; and float64 sums over the entries of each piece, weighed by share: of y and of
    its saturated part by channel [P, 2], of the objective and of clipped entries [P]."""

    passed: Tensor
    total: Tensor
    saturated: Tensor
    value: Tensor
    clipped: Tensor


def compute_dtype(value: Tensor) -> torch.dtype:
    """Dtype of elementwise math: half types are raised to float32."""
    return value.dtype if value.dtype == torch.float64 else torch.float32


def _live(value: Tensor, entries: Entries) -> Tensor:
    """`value`, and 0 at places without a live entry, whatever they hold."""
    if entries.live is None:
        return value
    return value & entries.live if value.dtype == torch.bool else torch.where(entries.live, value, 0.0)


def _sum(value: Tensor, entries: Entries) -> Tensor:
    """Float64 sums of pieces, weighed by share."""
    return (value if entries.share is None else value * entries.share).sum(-1, dtype=torch.float64)


def _negative(x: Tensor) -> Tensor:
    """1 where an entry is in the negative channel, else 0: to multiply by, which a CPU does faster than to select."""
    return (x < 0).to(x.dtype)


def _by_channel(value: Tensor, negative: Tensor, entries: Entries) -> Tensor:
    """Sums of the entries of either channel, [P, 2]."""
    neg = _sum(value * negative, entries)
    return torch.stack([_sum(value, entries) - neg, neg], 1)


def _own(table: Tensor, negative: Tensor) -> Tensor:
    """The entry of each place's own channel, [P, 2] -> [P, S]."""
    return table[:, 0, None] * (1.0 - negative) + table[:, 1, None] * negative


def _of_token(value: Tensor, entries: Entries) -> Tensor:
    """The sum of a token's entries by share, at each of them."""
    if entries.share_TQ is None or not value.numel():
        return value
    return (entries.share_TQ * value.reshape(-1)[entries.place_TQ]).sum(1).to(value.dtype)[entries.token]


def measure(log_ratio: Tensor, weight: Tensor | None, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 1, by piece: S^+ and S^- [P, 2], (9) before the division; the largest |ell| [P]; how many live entries have
    a bad log-ratio and a bad weight [P, 2]. With any of them the sums are meaningless."""
    x = _live(log_ratio.to(compute_dtype(log_ratio)), entries)
    size = x.abs()
    sizes = [size, torch.zeros_like(x) if weight is None else weight.to(compute_dtype(weight)).abs()]
    bad = [_sum(_live(~(value <= LARGEST[value.dtype]), entries), entries) for value in sizes]
    return _by_channel(x, _negative(x), entries), size.amax(-1).double(), torch.stack(bad, 1)


def _gated(x: Tensor, table: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """log rhat of every entry, clip(ell - O^l, +-eps) + offset^l with l its own channel; and whether the clip acts.
    `table` [P, 5] holds O^+, O^-, offset^+, offset^-, eps."""
    residual = x - _own(table[:, :2], negative)
    clipped = log_clip(residual, table[:, 4:])
    return clipped + _own(table[:, 2:4], negative), residual != clipped


def gate(log_ratio: Tensor, table: Tensor, entries: Entries) -> Tensor:
    """log rhat of every entry, [P, S]; `table` as in `_gated`."""
    x = log_ratio.to(table.dtype)
    return _live(_gated(x, table, _negative(x))[0], entries)


def weigh(
    log_ratio: Tensor, weight: Tensor, table: Tensor, entries: Entries, exponentiate: bool, use_min: bool
) -> Weighed:
    """Pass 2: y = w A rhat of every entry (the weight itself without `exponentiate`), split by its token clip.

    With `use_min` the objective is sum_i w_i min(r_i A_i, rhat_i A_i): where r_i A_i is the smaller one, y leaves the
    sums, and its gradient w_i A_i r_i is passed on as it is. `table` as in `_gated`.
    """
    x, weight = log_ratio.to(table.dtype), weight.to(table.dtype)
    negative = _negative(x)
    gated, outside = _gated(x, table, negative)
    y = _live(weight * _of_token(gated, entries).exp() if exponentiate else weight, entries)
    free = None
    if use_min:
        free = weight * x.clamp_max(LARGEST_EXPONENT[x.dtype]).exp()
        takes = _live(free < y, entries)
        free, y = torch.where(takes, free, 0.0), torch.where(takes, 0.0, y)
    saturated, total = y * outside, _by_channel(y, negative, entries)
    passed, value = y - saturated, total.sum(1)
    if free is not None:
        passed, value = passed + free, value + _sum(free, entries)
    clipped = _sum(_live(outside, entries).to(y.dtype), entries)
    return Weighed(passed, total, _by_channel(saturated, negative, entries), value, clipped)


def pull(passed: Tensor, log_ratio: Tensor, adjoint: Tensor, entries: Entries) -> Tensor:
    """Pass 3: the coefficient of every entry, [P, S]: `passed` + Z^l."""
    return _live(passed + _own(adjoint, _negative(log_ratio.to(passed.dtype))), entries)


class Passes:
    """Runs a pass: compiled where the mode says so, unless the compiler has failed before; else in blocks. With
    `fullgraph` it is an error where torch gives up on compiling, and not silence."""

    def __init__(self) -> None:
        self.mode, self.failed = "auto", False
        self.compiled = cache(lambda function: torch.compile(function, dynamic=True, fullgraph=True))

    def __call__(self, function: Any, *arguments: Any) -> Any:
        mode = os.environ.get("NEMO_FIBERPO_COMPILE", self.mode)
        if mode not in MODES:
            raise ValueError(f"NEMO_FIBERPO_COMPILE: must be one of {', '.join(MODES)}, got {mode!r}")
        if self.failed or not (mode == "1" or (mode == "auto" and arguments[0].device.type == "cuda")):
            return _in_blocks(function, arguments)
        try:
            with _compiling():
                return self.compiled(function)(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failed = True
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}. NEMO_FIBERPO_COMPILE=0 does not try"
            what = f"torch.compile failed on nemo_fiberpo's {function.__name__}, which now runs uncompiled"
            warnings.warn(f"{what}: {why}", stacklevel=2)
        return _in_blocks(function, arguments)


@contextmanager
def _compiling() -> Iterator[None]:
    """Lets torch compile, whatever is set around it (`megatron.cpu` has a stance against it and a function mode), and
    more often than its limit allows: there are graphs for a single piece, for pieces of one entry, without a mask."""
    stance = getattr(torch.compiler, "set_stance", lambda stance: nullcontext())  # since torch 2.6
    with stance("default"), torch._C.DisableTorchFunction(), torch._dynamo.config.patch(cache_size_limit=MOST_GRAPHS):
        yield


def _in_blocks(function: Any, arguments: tuple[Any, ...]) -> Any:
    """On a CPU by blocks of pieces, so that temporaries stay in cache, unless shares tie the pieces together."""
    pieces, length = arguments[0].shape
    step = max(1, BLOCK // max(length, 1))
    entries = next(argument for argument in arguments if isinstance(argument, Entries))
    if arguments[0].device.type != "cpu" or entries.share_TQ is not None or pieces <= step:
        return function(*arguments)

    def blocks(argument: Any) -> Iterable[Any]:
        if isinstance(argument, Entries):
            return repeat(argument) if argument.live is None else map(Entries, argument.live.split(step))
        return argument.split(step) if isinstance(argument, Tensor) else repeat(argument)

    parts = [function(*block) for block in zip(*map(blocks, arguments), strict=False)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return getattr(type(parts[0]), "_make", tuple)(torch.cat(column) for column in zip(*parts, strict=True))


run = Passes()


def compile_passes(mode: str) -> None:
    """Whether the passes are compiled: "auto" (on a GPU), "0" or "1". NEMO_FIBERPO_COMPILE overrides it."""
    if mode not in MODES:
        raise ValueError(f"compile: must be one of {', '.join(MODES)}, got {mode!r}")
    run.mode = mode
