"""Figures of the cells that have names, and of the names of a join's parts: of each domain, or partition of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .levels import Level

CHANNELS = ("pos", "neg")


@dataclass(frozen=True)
class NamedReport:
    """One named cell of a stratum, or all its cells that share a name of a part of its join.

    token_share   the live tokens in it, merged cells included, as a share of those of the stratum
    figures       by channel. Of a cell: `drift` |X|, `budget_used` |X| / C, and `regime`: 0 passes, 1 rolls back, 2 is
                  zeroed. Of a part: `drift`, the magnitude of the channel's mean over all its tokens, the same in
                  whatever cells they are; and `beyond`, the fraction of its cells that do not pass
    """

    token_share: float
    figures: dict[str, dict[str, float]]


def by_name(level: Level, size: Tensor, used: Tensor, slope: Tensor) -> Tensor:
    """|X|, |X| / C and the regime by the name of the cell, [3, 2, names], for the cells this rank owns."""
    out = size.new_zeros(3, 2, len(level.names or ()))
    if level.names:
        own = level.owned_C.nonzero().squeeze(1)
        regime = (slope < 0.0).double() + 2.0 * (slope == 0.0)
        out[:, :, level.label_C[own]] = torch.stack([size, used, regime])[:, :, own]
    return out


def by_part(level: Level, local: Tensor, slope: Tensor) -> Tensor:
    """By the names of the parts of a join, [2, 2, names of all of them]: sums of the channels over this rank's tokens,
    and how many of the cells it owns do not pass."""
    there = level.label_C >= 0
    figures = torch.stack([local, (slope != 1.0) * level.owned_C.double()])[:, :, there]
    out = [
        local.new_zeros(2, 2, len(part.names)).index_add_(2, part.value(level.label_C[there]), figures)
        for part in level.traits.parts
    ]
    return torch.cat([*out, local.new_zeros(2, 2, 0)], 2)


def name_reports(level: Level, of_cells: Tensor, of_parts: Tensor) -> dict[str, NamedReport]:
    """By name, from what `by_name` and `by_part` gave, summed over ranks; those of parts are called "part.name"."""
    return _named_cells(level, of_cells) | _named_parts(level, of_parts)


def _named_cells(level: Level, of_cells: Tensor) -> dict[str, NamedReport]:
    """Of the named cells that have tokens, and a gate of their own."""
    if not level.names:
        return {}
    tokens, acting = level.tally[0].tolist()
    keys = "drift", "budget_used", "regime"
    return {
        name: NamedReport(tokens[cell] / max(level.num_tokens, 1), _figures(keys, of_cells[:, :, cell]))
        for cell, name in enumerate(level.names)
        if acting[cell]
    }


def _named_parts(level: Level, of_parts: Tensor) -> dict[str, NamedReport]:
    """Of the names of the parts of a join that have tokens."""
    out = {}
    tally = level.tally[len(level.parts) - len(level.traits.parts) :]
    sizes = [len(part.names) for part in level.traits.parts]
    for part, of_part, sums in zip(level.traits.parts, tally, of_parts.cpu().split(sizes, 2), strict=True):
        tokens, acting = of_part.cpu()
        values = torch.stack([sums[0].abs() / tokens, sums[1] / acting.clamp_min(1.0)])
        for at in tokens.nonzero().squeeze(1).tolist():
            share, figures = float(tokens[at]) / level.num_tokens, _figures(("drift", "beyond"), values[:, :, at])
            out[f"{part.name}.{part.names[at]}"] = NamedReport(share, figures)
    return out


def _figures(keys: Sequence[str], values: Tensor) -> dict[str, dict[str, float]]:
    """[figures, 2] by channel and name of the figure."""
    rows = values.T.tolist()
    return {channel: dict(zip(keys, row, strict=True)) for channel, row in zip(CHANNELS, rows, strict=True)}
