"""What every gate is doing: named fields that ride in the second reduction, and the report that is made of them.

Fields are float64 tensors; each has a reduction over ranks and micro-batches, `sum` or `max` (`MAXIMA`). A node that
several ranks hold is counted by its owner alone. In a buffer that is summed, maxima get a place per rank.

Regimes of a cell's gate: it passes where |X| <= C; beyond, it rolls back where its derivative is not 0, else it is
zeroed (|X| >= C* = C (1 + 1/k) with the gate (10)). Five of the nine combinations of a cell's two channels have a name;
they follow each other when the whole drift of a trajectory grows, if the falling channel reaches its budget first:

    G-I         both pass                       the gradient is the ordinary one
    G-II,r      neg rolls back, pos passes
    G-II        neg zeroed, pos passes          the base weight is s+ alone
    G-III,r     neg zeroed, pos rolls back
    G-III       both zeroed                     the base weight is 1, only the tokens' residuals are left

The other four have pos first. Where the ratios of a trajectory average to 1, (65), its falling channel has at least the
drift of the rising one, so that these four cannot occur with C-* <= C+; in a sample they can. By the token clips of its
tokens a cell is in L-I (no live token beyond the clip with its own residual), L-II (some), or L-III (all).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .divergence import kl_estimate, tv_estimate
from .fibration import Drift, Gates, Tokens, checked, gate_cells, measure, weigh
from .forest import SegmentSum
from .gates import aggregate_gate, zeroed_from
from .hierarchy import Hierarchy
from .sharing import Cells, Level, Reduce, SharedCells, all_reduce

__all__ = ["GLOBAL_REGIMES", "LOCAL_REGIMES", "STATES", "global_regimes", "named_regimes", "zeroed_from"]

CHANNELS = ("pos", "neg")
STATES = ("pass", "rollback", "zeroed")
GLOBAL_REGIMES = (
    "G-I",
    "G-II,r",
    "G-II",
    "G-III,r",
    "G-III",
    "pos rollback, neg pass",
    "pos zeroed, neg pass",
    "pos rollback, neg rollback",
    "pos zeroed, neg rollback",
)
LOCAL_REGIMES = ("L-I", "L-II", "L-III")
_INDEX = ((0, 1, 2), (5, 7, 3), (6, 8, 4))  # by the state of pos (row) and of neg (column)
REGIMES = GLOBAL_REGIMES[:5]
"""Those with a name in the paper; cells in another combination of the channels' gates are "other"."""

BINS = 66
"""Bins of the histograms of |X| / C: four to an octave from 2^-8 to 2^8, one below, one above."""
HISTOGRAM_EDGES = tuple(2.0 ** (step / 4.0) for step in range(-32, 33))
STRATUM_FIELDS = ("channels", "histogram", "regimes", "divergence", "maxima", "named", "parts")
MAXIMA = frozenset({"largest", "maxima"})
"""Fields that are reduced by their maximum, by the last part of their name; all others are summed."""


@dataclass(frozen=True)
class ChannelReport:
    """One channel of one stratum, over all its cells and ranks.

    pass_through, rollback, zeroed   fractions of the cells in each regime of the gate
    drift_mean, drift_max            |X|, the drift of a cell beyond that of its parent, nats per token
    budget_used_mean, _max           |X| / C
    histogram                        cells by |X| / C, in the bins between `HISTOGRAM_EDGES`
    """

    pass_through: float
    rollback: float
    zeroed: float
    drift_mean: float
    drift_max: float
    budget_used_mean: float
    budget_used_max: float
    histogram: tuple[int, ...] = ()


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


@dataclass(frozen=True)
class StratumReport:
    """One stratum: its cells, and its two channels by name.

    cells        those with a gate of their own
    named        figures of every named cell of them, by name; "part.name" for those of a part of a join
    merged       cells merged into their parents, and their live tokens as a share of the stratum's; None without floor
    regimes      fraction of the cells in each of REGIMES, and of the others
    divergence   KL and TV of a cell (A.3; TV to first order): mean over the cells, each counting the same, and
                 maximum. For trajectories the mean is the trajectory-normalised divergence (51)
    """

    name: str
    cells: int
    channels: dict[str, ChannelReport]
    named: dict[str, NamedReport] = field(default_factory=dict)
    merged: tuple[int, float] | None = None
    regimes: dict[str, float] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Figures of one evaluation over all ranks.

    clipped       fraction of live tokens whose own residual exceeds the token clip; under another gating map, of those
                  whose ratio it cuts
    mean, abs_mean, largest    of the log-ratio over live tokens: mean, mean magnitude, largest magnitude
    kl, tv        estimates of A.3 over all live tokens (see divergence.py)
    """

    strata: tuple[StratumReport, ...]
    tokens: int
    clipped: float
    mean: float
    abs_mean: float
    largest: float
    kl: float
    tv: float

    def metrics(self) -> dict[str, float]:
        """Flat names for a logger: "{stratum}/{pos|neg}/{figure}", "{stratum}/regime/{name}",
        "{stratum}/{kl|tv}_{mean|max}", "{stratum}/merged_{cells|tokens}" where there is a floor; of named cells
        "{stratum}.{cell}/token_share", "{stratum}.{cell}/{pos|neg}/{drift|budget_used|regime}", and of named parts of a
        join "{stratum}.{part}.{name}/token_share", "{stratum}.{part}.{name}/{pos|neg}/{drift|beyond}"."""
        out: dict[str, float] = {}
        for stratum in self.strata:
            out[f"{stratum.name}/cells"] = float(stratum.cells)
            out |= {f"{stratum.name}/regime/{regime}": share for regime, share in stratum.regimes.items()}
            out |= {f"{stratum.name}/{figure}": value for figure, value in stratum.divergence.items()}
            for channel, report in stratum.channels.items():
                figures = {key: value for key, value in vars(report).items() if key != "histogram"}
                out |= {f"{stratum.name}/{channel}/{key}": value for key, value in figures.items()}
            if stratum.merged is not None:
                out[f"{stratum.name}/merged_cells"] = float(stratum.merged[0])
                out[f"{stratum.name}/merged_tokens"] = stratum.merged[1]
            for name, named in stratum.named.items():
                out[f"{stratum.name}.{name}/token_share"] = named.token_share
                for channel, values in named.figures.items():
                    out |= {f"{stratum.name}.{name}/{channel}/{key}": value for key, value in values.items()}
        out |= {"token/live": float(self.tokens), "token/clipped": self.clipped}
        out |= {"log_ratio/mean": self.mean, "log_ratio/abs_mean": self.abs_mean, "log_ratio/max": self.largest}
        return out | {"log_ratio/kl": self.kl, "log_ratio/tv": self.tv}

    def histograms(self) -> dict[str, list[int]]:
        """ "{stratum}/{pos|neg}/budget_used" -> cells by |X| / C, see `ChannelReport.histogram`."""
        return {
            f"{stratum.name}/{channel}/budget_used": list(report.histogram)
            for stratum in self.strata
            for channel, report in stratum.channels.items()
        }


def _states(drift: Tensor, budget: Tensor, slope: Tensor) -> Tensor:
    """0 where the gate passes, 1 where it rolls back, 2 where it is zeroed."""
    return torch.where(drift.abs() <= budget, 0, torch.where(slope != 0, 1, 2))


def _count(index: Tensor, counts: Tensor, num: int) -> Tensor:
    """How many of those entries that count have each index, float64 [num]. Integers add up the same in any order."""
    return torch.zeros(num, dtype=torch.int64, device=index.device).index_add_(0, index, counts.long()).double()


def report_fields(drift: Drift, gates: Gates, cells: SharedCells, value: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """This rank's fields: J, [live tokens, clipped ones, S+, S-], the largest |ell|, and those of every stratum."""
    out = {
        "value": value.reshape(1),
        "tokens": torch.cat([torch.stack([cells.count_J.sum(), clipped]), drift.sums_2J.sum(1)]),
        "largest": torch.cat([drift.largest_P, value.new_zeros(1)]).amax().reshape(1),
    }
    gated = zip(cells.forests, drift.mean, drift.drift, gates.budget, gates.slope, strict=True)
    for forest, mean, x, budget, slope in gated:
        figures = torch.stack([x.abs(), x.abs() / budget, _states(x, budget, slope).double()])
        for stratum, nodes in forest.slices.items():
            level = cells.levels[stratum]
            fields = _of_stratum(level, forest.cell_N[nodes], figures[..., nodes], mean[:, nodes], drift.sums_2J)
            out |= {f"{level.name}/{name}": tensor for name, tensor in fields.items()}
    return out


def _of_stratum(level: Level, cell_N: Tensor, figures: Tensor, mean_2N: Tensor, sums_2J: Tensor) -> dict[str, Tensor]:
    """Fields of one stratum from |X|, |X| / C and the state of its nodes, [3, 2, N], and the means of their channels.

    channels     [5, 2] over cells: how many are in each state, sums of |X| and of |X| / C
    histogram    [2, BINS]: cells by |X| / C
    regimes      [6]: cells in each of REGIMES, and in the others
    divergence   [2]: sums of KL and TV
    maxima       [3, 2]: of |X| and |X| / C by channel; of KL and TV
    named        [3, 2, names]: `figures` of the cells that have a name
    parts        [2, 2, names of all parts]: sums of the channels over this rank's tokens, and cells that do not pass
    """
    owned, states = level.owned_C[cell_N], figures[2]
    counted = torch.cat([torch.stack([states == state for state in range(3)]).double(), figures[:2]]) * owned
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64, device=states.device)
    bins = torch.bucketize(figures[1].contiguous(), edges) + torch.tensor([[0], [BINS]], device=states.device)
    regime = torch.tensor(_INDEX, device=states.device)[states[0].long(), states[1].long()]
    divergence = torch.stack([kl_estimate(mean_2N), tv_estimate(mean_2N)])
    largest = torch.cat([figures[:2], divergence[None]])
    label = level.label_C[cell_N]
    named = figures.new_zeros(3, 2, len(level.names or ()))
    if level.names:
        named.index_copy_(2, label, figures * owned)
    parts = [figures.new_zeros(2, 2, 0)]
    for part in level.parts:
        of_tokens = SegmentSum(part.value(level.label_C), len(part.names))(level.sums(sums_2J))
        beyond = SegmentSum(part.value(label), len(part.names))((states > 0).double() * owned)
        parts.append(torch.stack([of_tokens, beyond]))
    return {
        "channels": counted.sum(-1),
        "histogram": _count(bins.flatten(), owned.repeat(2), 2 * BINS).view(2, BINS),
        "regimes": _count(regime.clamp_max(len(REGIMES)), owned, len(REGIMES) + 1),
        "divergence": (divergence * owned).sum(-1),
        "maxima": torch.cat([largest, largest.new_full((3, 2, 1), -torch.inf)], 2).amax(2),
        "named": named,
        "parts": torch.cat(parts, 2),
    }


def _is_maximum(name: str) -> bool:
    return name.rpartition("/")[2] in MAXIMA


def pack(fields: Mapping[str, Tensor], cells: SharedCells) -> dict[str, Tensor]:
    """The fields for a buffer that is summed over the ranks of `cells`: maxima get a place per rank."""
    out = dict(fields)
    for name, value in fields.items():
        if _is_maximum(name):
            out[name] = value.new_zeros(*value.shape, cells.world_size)
            out[name][..., cells.rank] = value
    return out


def unpack(summed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fields of all ranks from the summed parts of `pack`; other parts than fields are left out."""
    return {name: value.amax(-1) if _is_maximum(name) else value for name, value in summed.items()}


def empty_fields(cells: SharedCells) -> dict[str, Tensor]:
    """The fields of no tokens."""
    shapes: dict[str, tuple[int, ...]] = {"value": (1,), "tokens": (4,), "largest": (1,)}
    for level in cells.levels:
        of_parts = sum(len(part.names) for part in level.parts)
        sizes = (5, 2), (2, BINS), (len(REGIMES) + 1,), (2,), (3, 2), (3, 2, len(level.names or ())), (2, 2, of_parts)
        shapes |= {f"{level.name}/{name}": size for name, size in zip(STRATUM_FIELDS, sizes, strict=True)}
    device = cells.layout.device
    return {
        name: torch.full(shape, -torch.inf if _is_maximum(name) else 0.0, dtype=torch.float64, device=device)
        for name, shape in shapes.items()
    }


def merge(groups: Sequence[Mapping[str, Tensor]], empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fields of evaluations that share no cell, such as one a micro-batch, together, starting from `empty`."""
    out = dict(empty)
    for fields in groups:
        for name, value in fields.items():
            out[name] = torch.maximum(out[name], value) if _is_maximum(name) else out[name] + value
    return out


def make_report(fields: Mapping[str, Tensor], cells: SharedCells) -> tuple[float, Report]:
    """J and the report, from the fields of all ranks, by one copy to the host."""
    flat = torch.cat([value.reshape(-1) for value in fields.values()]).cpu()
    split = flat.split([value.numel() for value in fields.values()])
    host = {name: part.view(value.shape) for (name, value), part in zip(fields.items(), split, strict=True)}
    live, clipped, pos, neg = host["tokens"].tolist()
    count = max(live, 1.0)
    report = Report(
        strata=tuple(_stratum_report(level, host) for level in cells.levels),
        tokens=round(live),
        clipped=clipped / count,
        mean=(pos + neg) / count,
        abs_mean=(pos - neg) / count,
        largest=float(host["largest"]),
        kl=-(pos + neg) / count,
        tv=(pos - neg) / count / 2.0,
    )
    return float(host["value"]), report


def _stratum_report(level: Level, host: Mapping[str, Tensor]) -> StratumReport:
    cells = max(level.num_acting, 1)
    fields = {name: host[f"{level.name}/{name}"] for name in ("channels", "regimes", "divergence", "maxima")}
    shares, most = (fields["channels"] / cells).T.tolist(), fields["maxima"].nan_to_num(neginf=0.0).T.tolist()
    histogram = host[f"{level.name}/histogram"].long().tolist()
    channels = {}
    for at, channel in enumerate(CHANNELS):
        passes, rollback, zeroed, drift, used = shares[at]
        counts = tuple(histogram[at])
        channels[channel] = ChannelReport(passes, rollback, zeroed, drift, most[at][0], used, most[at][1], counts)
    kl, tv = (fields["divergence"] / cells).tolist()
    divergence = {"kl_mean": kl, "kl_max": most[0][2], "tv_mean": tv, "tv_max": most[1][2]}
    regimes = dict(zip((*REGIMES, "other"), (fields["regimes"] / cells).tolist(), strict=True))
    merged = (level.merged[0], level.merged[1] / max(level.num_tokens, 1)) if level.merged else None
    named = _named_cells(level, host[f"{level.name}/named"]) | _named_parts(level, host[f"{level.name}/parts"])
    return StratumReport(level.name, level.num_acting, channels, named, merged, regimes, divergence)


def _named_cells(level: Level, figures: Tensor) -> dict[str, NamedReport]:
    """Of the named cells that have tokens, and a gate of their own."""
    if not level.names:
        return {}
    tokens, acting = level.tally[0].tolist()
    keys = "drift", "budget_used", "regime"
    return {
        name: NamedReport(tokens[cell] / max(level.num_tokens, 1), _figures(keys, figures[:, :, cell]))
        for cell, name in enumerate(level.names)
        if acting[cell]
    }


def _named_parts(level: Level, figures: Tensor) -> dict[str, NamedReport]:
    """Of the names of the parts of a join that have tokens."""
    out = {}
    tallies = level.tally[len(level.tally) - len(level.parts) :]
    sizes = [len(part.names) for part in level.parts]
    for part, (tokens, acting), sums in zip(level.parts, tallies, figures.split(sizes, 2), strict=True):
        values = torch.stack([sums[0].abs() / tokens, sums[1] / acting.clamp_min(1.0)])
        for at in tokens.nonzero().squeeze(1).tolist():
            share = float(tokens[at]) / level.num_tokens
            out[f"{part.name}.{part.names[at]}"] = NamedReport(share, _figures(("drift", "beyond"), values[:, :, at]))
    return out


def _figures(keys: Sequence[str], values: Tensor) -> dict[str, dict[str, float]]:
    """[figures, 2] by channel and name of the figure."""
    rows = values.T.tolist()
    return {channel: dict(zip(keys, row, strict=True)) for channel, row in zip(CHANNELS, rows, strict=True)}


def global_regimes(drift_2C: Tensor, budget_2C: Tensor, slope_C: Tensor) -> Tensor:
    """Index into GLOBAL_REGIMES for every cell under the gate (10), int64 [C].

    `drift_2C` holds the drift of either channel beyond the parent's, row 0 pos, row 1 neg, of any sign; `budget_2C` and
    `slope_C` the budgets C and slopes k. Pure and elementwise.
    """
    states = _states(drift_2C, budget_2C, aggregate_gate(drift_2C, budget_2C, slope_C)[1])
    return torch.tensor(_INDEX, device=states.device)[states[0], states[1]]


@dataclass(frozen=True, eq=False)
class StratumRegimes:
    """The regimes of the cells of one stratum that this rank holds and that have a gate of their own.

    label_C             int64 [C], ascending
    global_C, local_C   int64 [C], indices into GLOBAL_REGIMES and LOCAL_REGIMES
    owned_C             bool [C]: this rank counts the cell
    """

    name: str
    label_C: Tensor
    global_C: Tensor
    local_C: Tensor
    owned_C: Tensor

    def counts(self) -> dict[str, int]:
        """Cells in each regime, by name. Those of several ranks add up to the cells of the whole batch."""
        out: dict[str, int] = {}
        for names, index_C in ((GLOBAL_REGIMES, self.global_C), (LOCAL_REGIMES, self.local_C)):
            number = torch.bincount(index_C[self.owned_C], minlength=len(names)).tolist()
            out |= dict(zip(names, number, strict=True))
        return out


def named_regimes(
    log_ratio: Tensor, cells: Cells | SharedCells, hierarchy: Hierarchy, reduce: Reduce | None = None
) -> tuple[StratumRegimes, ...]:
    """The regimes of all cells of every active stratum, coarsest first: those that `token_coefficients` acts by.

    Args and errors as `token_coefficients`; `reduce` is called as often as in the forward half of that function (once
    without branches) for the sums of the channels, and once for the clipped tokens.
    SPMD: tokens are sharded; a cell of several ranks has the same regimes on each of them.
    """
    cells = checked(cells, hierarchy, log_ratio=log_ratio)
    tokens = Tokens.of(cells, log_ratio, torch.ones_like(log_ratio))
    drift, _ = measure(tokens, cells, reduce)
    gates = gate_cells(drift, cells, hierarchy)
    counted = weigh(tokens, cells, drift, gates, exponentiate=False)
    clipped_J = cells.layout.cell_sums(counted.clipped)
    local = [forest.up(clipped_J) for forest in cells.forests]
    parts = {str(index): forest.slots.pack(local[index]) for index, forest in enumerate(cells.forests)}
    summed = all_reduce(parts, reduce) if parts else {}
    out: dict[int, StratumRegimes] = {}
    for index, forest in enumerate(cells.forests):
        clipped_N = forest.slots.unpack(local[index], summed[str(index)])
        states = _states(drift.drift[index], gates.budget[index], gates.slope[index])
        # Sums of shares are rounded; a share is at least 1/255.
        local_N = (clipped_N > 1e-3).long() + (clipped_N > forest.count_N - 1e-3).long()
        global_N = torch.tensor(_INDEX, device=states.device)[states[0], states[1]]
        for stratum, nodes in forest.slices.items():
            level, cell_N = cells.levels[stratum], forest.cell_N[nodes]
            labels, owned = level.label_C[cell_N], level.owned_C[cell_N]
            out[stratum] = StratumRegimes(level.name, labels, global_N[nodes], local_N[nodes], owned)
    return tuple(out[stratum] for stratum in sorted(out))
