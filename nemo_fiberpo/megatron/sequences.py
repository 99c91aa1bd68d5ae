"""How the samples of a micro-batch become the rows that a rank's model reads: padded or packed, split over CP or not.

Per-token columns of samples have the shape [b, s - 1]: entry t belongs to the token at position t + 1 of a sequence of
at most s tokens, whose log-prob the model's output at position t gives. Rows have the shape [r, t] that the model sees
on this rank, with one more place per sequence (the last token predicts nothing) and with padding. `Rows` maps one to
the other, so labels, masks, old log-probs and coefficients follow the trajectory wherever its tokens lie, and a target
is always the next token of the whole sequence, shifted before anything was split.

Context parallelism splits a sequence into 2 cp chunks, of which rank i has chunks i and 2 cp - 1 - i: Megatron's
zig-zag, which balances causal attention. Packed rows do so sequence by sequence, as Transformer Engine's THD format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routed:
    """The tokens of a micro-batch from which the routers of a mixture of experts learn to balance, see `router_losses`:
    those of its sequences, prompts included; neither padding nor sequences that the loss leaves out.

    mask     bool [r, t], True for such tokens; sharded over cp as the rows are
    per_row  int64 [r], how many each row has on all context-parallel ranks together
    """

    mask: Tensor
    per_row: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """One micro-batch as this rank's model reads it.

    tokens      int64 [r, t], 0 at padding
    targets     int64 [r, t], the next token of the sequence, 0 where there is none
    positions   int64 [r, t], positions within the sequence
    source      int64 [r, t], index into the flattened [b, s - 1] columns, -1 where no entry belongs
    routed      the tokens that routers balance
    seq_length  t times the size of the CP group: what Megatron's schedules want to be told
    packed      `PackedSeqParams` of a packed row, None for padded rows

    SPMD: sharded over cp, the same on ranks that differ in tp or pp alone.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    source: Tensor
    routed: Routed
    seq_length: int
    packed: Any = None

    def to(self, device: torch.device | int) -> Rows:
        """The same on another device."""
        tokens, targets, positions, source, mask, per_row = (
            part.to(device)
            for part in (
                self.tokens, self.targets, self.positions, self.source, self.routed.mask, self.routed.per_row
            )
        )  # fmt: skip
        packed = self.packed
        if packed is not None:
            starts = packed.cu_seqlens_q.to(device)
            packed = replace(packed, cu_seqlens_q=starts, cu_seqlens_kv=starts)
        return Rows(tokens, targets, positions, source, Routed(mask, per_row), self.seq_length, packed)

    def take(self, column: Tensor, fill: Any = 0) -> Tensor:
        """A column of the samples, [b, s - 1], in rows, [r, t]; `fill` where no entry belongs. Further dimensions of an
        entry stay behind."""
        end = column.new_full((1, *column.shape[2:]), fill)
        return torch.cat([column.flatten(0, 1), end])[self.source.to(column.device)]

    def put(self, values: Tensor, out: Tensor) -> None:
        """Write values in rows, [r, t], to their places in a column of the samples, [b, s - 1] and contiguous. Further
        dimensions of an entry stay behind."""
        here = self.source >= 0
        flat = out.view(-1, *out.shape[2:])
        flat[self.source[here].to(out.device)] = values[here.to(values.device)].to(out)


def zigzag(length: int, cp_size: int, cp_rank: int, device: torch.device | None = None) -> Tensor:
    """Positions of a sequence of `length` that a context-parallel rank holds, int64 [length / cp], ascending.

    Raises ValueError where `length` does not divide into 2 cp_size chunks.
    """
    position = torch.arange(length, device=device)
    if cp_size == 1:
        return position
    if length % (2 * cp_size):
        raise ValueError(
            f"sequence length: {length} does not divide by {2 * cp_size}, twice the context-parallel size; pad it"
        )
    chunks = position.view(2 * cp_size, -1)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def length_multiple(tp_size: int, cp_size: int, sequence_parallel: bool) -> int:
    """What lengths of sequences must be multiples of: the chunks of context parallelism are of equal length, and what
    a CP rank holds divides over the TP ranks where sequence parallelism splits it."""
    return (2 * cp_size if cp_size > 1 else 1) * (tp_size if sequence_parallel else 1)


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def padded_rows(
    tokens: Tensor,
    samples: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    counted: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    multiple: int = 1,
    seq_length: int | None = None,
) -> Rows:
    """Rows of one sample each, padded on the right: tokens int64 [b, s] -> r = b.

    Args
        samples     int64 [r], those of the b that this micro-batch has; columns keep all b
        lengths     int [b], in 1..s: what lies behind is padding, which routers do not balance; None where all s
                    tokens of every sequence are its own
        counted     bool [b], False for sequences that the loss leaves out: routers do not balance them either
        multiple    of `length_multiple`; the rows' width is s rounded up to it
        seq_length  a larger width, a multiple of `multiple`, such as one that several ranks agreed on
    """
    b, s = tokens.shape
    width = _row_width(seq_length, s, multiple)
    if samples is None:
        samples = torch.arange(b, device=tokens.device)
    place = zigzag(width, cp_size, cp_rank, tokens.device)
    padded = torch.nn.functional.pad(tokens[samples], (0, width - s))[:, place]
    source = torch.where(place < s - 1, samples[:, None] * (s - 1) + place, -1)
    # A learned position embedding need not reach as far as the padding.
    position = place.clamp(max=s - 1).expand(len(samples), -1)
    real = torch.tensor(_lengths(lengths, b, s), device=tokens.device)
    number = (real if counted is None else torch.where(counted.to(real.device), real, 0))[samples]
    routed = Routed(place < number[:, None], number)
    return _with_targets(Rows(padded, padded, position, source, routed, width), tokens)


def packed_rows(
    tokens: Tensor,
    lengths: Tensor | Sequence[int],
    samples: Tensor | None = None,
    *,
    counted: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    multiple: int = 1,
    seq_length: int | None = None,
) -> Rows:
    """One row of several samples one behind the other, r = 1, in the THD format of `PackedSeqParams`.

    Args
        tokens      int64 [b, s], padded on the right
        lengths     int [b], in 1..s; each sequence is padded to `multiple` by itself
        samples     int64, those of the b that this micro-batch has; columns keep all b
        counted     as in `padded_rows`
        seq_length  a larger width of the row, a multiple of `multiple`; what is left over is a sequence of padding

    Padding counts as part of a sequence (`cu_seqlens_q` says where sequences begin in the row): attention is causal, so
    no live token sees it.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    b, s = tokens.shape
    real = _lengths(lengths, b, s)
    kept = [True] * b if counted is None else counted.tolist()
    chosen = list(range(b)) if samples is None else samples.tolist()
    spans = packed_spans([real[sample] for sample in chosen], multiple)
    width = _row_width(seq_length, sum(spans), multiple)
    parts: list[tuple[Tensor, ...]] = []
    for sample, span in zip(chosen, spans, strict=True):
        place, last = zigzag(span, cp_size, cp_rank, tokens.device), real[sample] - 1
        inside = place.clamp(max=last)
        source = torch.where(place < last, sample * (s - 1) + place, -1)
        mask = (place <= last) & kept[sample]
        parts.append((torch.where(place <= last, tokens[sample, inside], 0), inside, source, mask))
    if width > sum(spans):
        spans.append(width - sum(spans))
        nothing = tokens.new_zeros(spans[-1] // cp_size)
        parts.append((nothing, nothing, nothing - 1, nothing.bool()))
    row, position, source, mask = (torch.cat(columns)[None] for columns in zip(*parts, strict=True))
    starts = torch.tensor([0, *spans], device=tokens.device).cumsum(0).to(torch.int32)
    longest = max(spans)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    number = torch.tensor([sum(real[sample] * kept[sample] for sample in chosen)], device=tokens.device)
    return _with_targets(Rows(row, row, position, source, Routed(mask, number), width, packed), tokens)


def _lengths(lengths: Tensor | Sequence[int] | None, b: int, s: int) -> list[int]:
    if lengths is None:
        return [s] * b
    real = lengths.tolist() if isinstance(lengths, Tensor) else [int(length) for length in lengths]
    if len(real) != b or not all(1 <= length <= s for length in real):
        raise ValueError(f"lengths: must be {b} numbers within 1..{s}, got {real}")
    return real


def packed_spans(lengths: Sequence[int], multiple: int) -> list[int]:
    """Places that each sequence takes in a packed row."""
    return [round_up(length, multiple) for length in lengths]


def _row_width(seq_length: int | None, least: int, multiple: int) -> int:
    width = seq_length or round_up(least, multiple)
    if width % multiple or width < least:
        raise ValueError(f"seq_length: {width} must be a multiple of {multiple} and at least {least}")
    return width


def _with_targets(rows: Rows, tokens: Tensor) -> Rows:
    return replace(rows, targets=rows.take(tokens[:, 1:]))


def gather_rows(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Values of this rank's rows, [r, t], with those of the other context-parallel ranks: [r, cp t], in rank order.

    The replicated case of `groups`: every rank of the axis has all tokens and computes the same loss. The backward
    pass keeps the part of this rank's own tokens (`GATHERED["slice"]`), without a collective.
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    gathered: Tensor = _GatherRows.apply(values, group)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        ctx.rank, ctx.width = dist.get_rank(group), values.shape[-1]
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[..., ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width], None


def balanced(lengths: Sequence[int], bins: int, together: int = 1) -> list[list[int]]:
    """Indices of `lengths` in `bins` lists of equally many, about equal sums: the longest first, back and forth. Runs
    of `together` indices stay together."""
    runs = [range(first, first + together) for first in range(0, len(lengths), together)]
    order = sorted(runs, key=lambda run: (-sum(lengths[index] for index in run), run.start))
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for place, run in enumerate(order):
        turn, within = divmod(place, bins)
        dealt[within if turn % 2 == 0 else bins - 1 - within].extend(run)
    return dealt
