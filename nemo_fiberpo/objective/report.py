"""What every gate is doing: named fields that ride in the second reduction, and the report made from them. Each is
reduced over ranks and micro-batches by its sum or maximum. A node of several ranks is counted by its owner only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from .fibration import Drift, Gates
from .gates import REGIMES, STATES, constant, regimes, states
from .sharing import Level, SharedCells, all_reduce

CHANNELS = ("pos", "neg")
BINS = 66  # of the histograms of |X| / C: four to an octave from 2^-8 to 2^8, one below, one above
HISTOGRAM_EDGES = tuple(2.0 ** (step / 4.0) for step in range(-32, 33))
MAXIMA = ("largest", "maxima")  # the fields that are reduced by their maximum


@dataclass(frozen=True)
class ChannelReport:
    """One channel of one stratum, over the cells of all ranks."""

    pass_through: float  # this and the next two: fractions of the cells in each state of the gate
    rollback: float
    zeroed: float
    drift_mean: float  # of |X|, the drift of a cell beyond that of its parent, nats per token
    drift_max: float
    budget_used_mean: float  # of |X| / C
    budget_used_max: float
    histogram: tuple[int, ...] = ()  # cells by |X| / C, in the bins between `HISTOGRAM_EDGES`


@dataclass(frozen=True)
class NamedReport:
    """One named cell of a stratum, or all its cells with the same name in a part of its join."""

    token_share: float  # its live tokens, with those in merged cells, as a share of the stratum's
    # By channel. Of a cell: `drift` |X|, `budget_used` |X| / C, and `regime`, an index into STATES. Of a part: `drift`,
    # |mean| of the channel over its tokens; over its cells `budget_used_mean`, of |X| / C, and `beyond`, the
    # fraction not in pass.
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class StratumReport:
    """One stratum: its cells with a gate of their own, and its channels by name."""

    name: str
    cells: int
    channels: dict[str, ChannelReport]
    named: dict[str, NamedReport] = field(default_factory=dict)  # by name; "part.name" for those of a part of a join
    # cells merged into their parents, and their live tokens as a share of the stratum's; None without a floor
    merged: tuple[int, float] | None = None
    regimes: dict[str, float] = field(default_factory=dict)  # fraction of the cells in each of REGIMES, and in another
    # "kl_mean", "kl_max" and so on: KL and TV of the cells (A.3; TV to first order), each cell counting the same. For
    # trajectories the mean is the trajectory-normalised divergence (51).
    divergence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Figures of one evaluation over all ranks."""

    strata: tuple[StratumReport, ...]
    tokens: int  # live ones
    clipped: float  # the share whose own residual is clipped; under another gating map, whose ratio it cuts
    mean: float  # of the log-ratio over live tokens, as the next two
    abs_mean: float
    largest: float
    kl: float  # estimates of A.3 over all live tokens, see diagnostics/divergence.py
    tv: float

    def metrics(self) -> dict[str, float]:
        """Flat names for a logger: "{stratum}/{pos|neg}/{figure}", "{stratum}/regime/{name}",
        "{stratum}/{kl|tv}_{mean|max}", "{stratum}/merged_{cells|tokens}" where there is a floor; of named cells
        "{stratum}.{cell}/token_share", "{stratum}.{cell}/{pos|neg}/{drift|budget_used|regime}", and of named parts of a
        join "{stratum}.{part}.{name}/token_share", "{stratum}.{part}.{name}/{pos|neg}/{drift|budget_used_mean|beyond}".
        """
        out: dict[str, float] = {}
        for stratum in self.strata:
            name = stratum.name
            out[f"{name}/cells"] = float(stratum.cells)
            out |= {f"{name}/regime/{regime}": share for regime, share in stratum.regimes.items()}
            out |= {f"{name}/{figure}": value for figure, value in stratum.divergence.items()}
            for channel, report in stratum.channels.items():
                out |= {f"{name}/{channel}/{key}": value for key, value in vars(report).items() if key != "histogram"}
            if stratum.merged is not None:
                out |= {f"{name}/merged_cells": float(stratum.merged[0]), f"{name}/merged_tokens": stratum.merged[1]}
            for cell, named in stratum.named.items():
                out[f"{name}.{cell}/token_share"] = named.token_share
                for channel, figures in named.figures.items():
                    out |= {f"{name}.{cell}/{channel}/{key}": value for key, value in figures.items()}
        out |= {"token/live": float(self.tokens), "token/clipped": self.clipped}
        out |= {"log_ratio/mean": self.mean, "log_ratio/abs_mean": self.abs_mean, "log_ratio/max": self.largest}
        return out | {"log_ratio/kl": self.kl, "log_ratio/tv": self.tv}

    def histograms(self) -> dict[str, list[int]]:
        """ "{stratum}/{pos|neg}/budget_used" -> cells by |X| / C, see `ChannelReport.histogram`."""
        channels = {f"{at.name}/{channel}": report for at in self.strata for channel, report in at.channels.items()}
        return {f"{name}/budget_used": list(report.histogram) for name, report in channels.items()}


def empty_fields(cells: SharedCells) -> dict[str, Tensor]:
    """The fields of no tokens. For K strata, with names of all strata (of all parts of joins) one after the other:

    value, largest, tokens   J; the largest |ell|; live tokens, clipped ones, S+, S-
    sums         [K, 6, 2] over cells: how many are in each state, |X|, and |X| / C, by channel; KL and TV
    maxima       [K, 3, 2] of |X| and |X| / C, by channel; of KL and TV
    histogram    [K, 2, BINS]: cells by |X| / C
    regimes      [K, 6]: cells in each of REGIMES, and in another
    named        [3, 2, names]: |X|, |X| / C and state of the cells that have a name
    parts        [3, 2, names]: sums of the channels over this rank's tokens; over cells |X| / C; cells that do not pass
    """
    num = len(cells.levels)
    names = sum(len(level.names or ()) for level in cells.levels)
    of_parts = sum(len(part.names) for level in cells.levels for part in level.parts)
    shapes: dict[str, tuple[int, ...]] = {"value": (1,), "tokens": (4,), "largest": (1,), "sums": (num, 6, 2)}
    shapes |= {"maxima": (num, 3, 2), "histogram": (num, 2, BINS), "regimes": (num, len(REGIMES) + 1)}
    shapes |= {"named": (3, 2, names), "parts": (3, 2, of_parts)}
    return {
        name: cells.count_J.new_full(shape, -torch.inf if name in MAXIMA else 0.0) for name, shape in shapes.items()
    }


def _named_fields(fields: Mapping[str, Tensor], cells: SharedCells) -> list[tuple[Tensor, list[Tensor]]]:
    """Of each stratum its slice of `named`, and its slices of `parts`."""
    of_parts = fields["parts"].split([len(part.names) for level in cells.levels for part in level.parts], 2)
    named, parts = fields["named"].split([len(level.names or ()) for level in cells.levels], 2), iter(of_parts)
    return [(of_level, [next(parts) for _ in level.parts]) for of_level, level in zip(named, cells.levels, strict=True)]


def _count(index: Tensor, counts: Tensor, num: int) -> Tensor:
    """Entries that count by their index, [..., N] -> float64 [..., num]. Integers add up the same in any order."""
    return counts.new_zeros(*counts.shape[:-1], num, dtype=torch.int64).index_add_(-1, index, counts.long()).double()


def report_fields(drift: Drift, gates: Gates, cells: SharedCells, value: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """This rank's fields, from J and the number of clipped ones of its own tokens."""
    out = empty_fields(cells)
    out["value"] = value.reshape(1)
    out["tokens"] = torch.cat([torch.stack([cells.count_J.sum(), clipped]), drift.sums_2J.sum(1)])
    out["largest"] = torch.cat([drift.largest_P, value.new_zeros(1)]).amax().reshape(1)
    named = _named_fields(out, cells)
    gated = zip(cells.forests, drift.mean, drift.drift, gates.budget, gates.slope, strict=True)
    for forest, mean, x, budget, slope in gated:
        owned, label, state = forest.owned_N, forest.label_N, states(x, budget, slope)
        figures = torch.stack([x.abs(), x.abs() / budget, state.double()])
        divergence = torch.stack([-mean.sum(0), (mean[0] - mean[1]) / 2.0])  # KL and TV, see diagnostics/divergence.py
        largest = torch.cat([figures[:2], divergence[None]])
        in_state = state == torch.arange(len(STATES), device=state.device)[:, None, None]
        sums, figures = torch.cat([in_state.double(), largest]) * owned, figures * owned
        channel = torch.stack([2 * forest.stratum_N, 2 * forest.stratum_N + 1])
        bins = BINS * channel + torch.bucketize(largest[1], constant(HISTOGRAM_EDGES, x.dtype, x.device))
        regime = (len(REGIMES) + 1) * forest.stratum_N + regimes(state).clamp_max(len(REGIMES))
        out["histogram"] += _count(bins.flatten(), owned.repeat(2), out["histogram"].numel()).view_as(out["histogram"])
        out["regimes"] += _count(regime, owned, out["regimes"].numel()).view_as(out["regimes"])
        for index, nodes in forest.slices.items():
            level, (of_cells, of_parts) = cells.levels[index], named[index]
            out["sums"][index] = sums[..., nodes].sum(-1)
            if nodes.stop > nodes.start:
                out["maxima"][index] = largest[..., nodes].amax(-1)
            if level.names:
                of_cells.index_copy_(2, label[nodes], figures[..., nodes])
            of_cell = torch.stack([figures[1, :, nodes], ((state[:, nodes] > 0) & owned[nodes]).double()])
            for of_tokens, by_name, out_of_part in zip(level.part_sums, level.part_cells, of_parts, strict=True):
                out_of_part.copy_(torch.cat([of_tokens(drift.sums_2J)[None], by_name(of_cell)]))
    return out


def pack(fields: Mapping[str, Tensor], cells: SharedCells) -> dict[str, Tensor]:
    """The fields for a buffer that is summed over the ranks of `cells`: maxima have a place per rank."""
    place = cells.rank, cells.world_size - 1 - cells.rank
    return {name: pad(value[..., None], place) if name in MAXIMA else value for name, value in fields.items()}


def unpack(summed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fields of all ranks, from the sums of those of `pack`."""
    return {name: value.amax(-1) if name in MAXIMA else value for name, value in summed.items()}


def merge(groups: Sequence[Mapping[str, Tensor]], empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fields of evaluations that share no cell, such as those of micro-batches, together; `empty` for none."""
    out = dict(empty)
    for name, value in (item for fields in groups for item in fields.items()):
        out[name] = torch.maximum(out[name], value) if name in MAXIMA else out[name] + value
    return out


def make_report(fields: Mapping[str, Tensor], cells: SharedCells) -> tuple[float, Report]:
    """J and the report, from the fields of all ranks, by one copy to the host."""
    host = all_reduce(fields, torch.Tensor.cpu)
    names = zip(cells.levels, _named_fields(host, cells), strict=True)
    strata = tuple(_stratum_report(level, index, host, *named) for index, (level, named) in enumerate(names))
    live, clipped, pos, neg = host["tokens"].tolist()
    count = max(live, 1.0)
    mean, abs_mean, largest = (pos + neg) / count, (pos - neg) / count, max(float(host["largest"]), 0.0)
    report = Report(strata, round(live), clipped / count, mean, abs_mean, largest, kl=-mean, tv=abs_mean / 2.0)
    return float(host["value"]), report


def _stratum_report(
    level: Level, index: int, host: Mapping[str, Tensor], of_cells: Tensor, of_parts: Sequence[Tensor]
) -> StratumReport:
    cells = max(level.num_acting, 1)
    *shares, (kl, tv) = (host["sums"][index] / cells).tolist()
    *most, (kl_max, tv_max) = host["maxima"][index].nan_to_num(neginf=0.0).tolist()
    histograms, channels = host["histogram"][index].long().tolist(), {}
    for at, channel in enumerate(CHANNELS):
        (passes, rollback, zeroed, drift, used), bins = (share[at] for share in shares), tuple(histograms[at])
        channels[channel] = ChannelReport(passes, rollback, zeroed, drift, most[0][at], used, most[1][at], bins)
    divergence = {"kl_mean": kl, "kl_max": kl_max, "tv_mean": tv, "tv_max": tv_max}
    in_regime = dict(zip((*REGIMES, "other"), (host["regimes"][index] / cells).tolist(), strict=True))
    merged = (level.merged[0], level.merged[1] / max(level.num_tokens, 1)) if level.merged else None
    named = _named_reports(level, of_cells, of_parts)
    return StratumReport(level.name, level.num_acting, channels, named, merged, in_regime, divergence)


def _named_reports(level: Level, of_cells: Tensor, of_parts: Sequence[Tensor]) -> dict[str, NamedReport]:
    """Of named cells with tokens and a gate of their own, from [3, 2, names]; and of the names of each part of a join
    that have tokens, from [3, 2, names]."""
    out, total, tallies = dict[str, NamedReport](), max(level.num_tokens, 1), list(level.tally)

    def add(name: str, tokens: float, keys: tuple[str, ...], figures: Tensor) -> None:
        rows = zip(CHANNELS, figures.T.tolist(), strict=True)
        out[name] = NamedReport(tokens / total, {channel: dict(zip(keys, row, strict=True)) for channel, row in rows})

    if level.names:
        tokens, acting = tallies.pop(0).tolist()
        for at in (at for at in range(len(level.names)) if acting[at]):
            add(level.names[at], tokens[at], ("drift", "budget_used", "regime"), of_cells[:, :, at])
    of_part = ("drift", "budget_used_mean", "beyond")
    for part, (tokens, acting), sums in zip(level.parts, tallies, of_parts, strict=True):
        figures = torch.cat([sums[:1].abs() / tokens, sums[1:] / acting.clamp_min(1.0)])
        for at in tokens.nonzero().squeeze(1).tolist():
            add(f"{part.name}.{part.names[at]}", float(tokens[at]), of_part, figures[:, :, at])
    return out
