"""What every gate is doing: regimes, drift and budget use per stratum and channel, and how many tokens are clipped.

All of it rides in the second reduction as sums. A cell that several ranks hold is counted by its owner alone. Maxima
get a slot per rank, so that a sum over ranks carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cells import Cells
from .divergence import kl_estimate, tv_estimate
from .fibration import Gates, TokenSums
from .levels import Level
from .named_cells import CHANNELS, NamedReport, by_name, by_part, name_reports
from .named_regimes import GLOBAL_REGIMES, by_slope

REGIMES = GLOBAL_REGIMES[:5]
"""Those with a name in the paper; cells in another combination of the channels' gates are "other"."""


@dataclass(frozen=True)
class ChannelReport:
    """One channel of one stratum, over all its cells and ranks.

    pass_through, rollback, zeroed   fractions of the cells in each regime of the gate (10)
    drift_mean, drift_max            |X|, the drift of a cell beyond that of its parent, nats per token
    budget_used_mean, _max           |X| / C
    """

    pass_through: float
    rollback: float
    zeroed: float
    drift_mean: float
    drift_max: float
    budget_used_mean: float
    budget_used_max: float


@dataclass(frozen=True)
class StratumReport:
    """One stratum: its cells, and its two channels by name.

    cells        those with a gate of their own
    named        figures of every named cell of them, by name; "part.name" for those of a part of a join
    merged       cells merged into their parents, and their live tokens as a share of the stratum's; None without floor
    regimes      fraction of the cells in each of REGIMES, and of the others
    divergence   KL and TV of a cell (A.3; TV to first order): mean over the cells, each counting the same, and maximum,
                 0 at least. For trajectories the mean is the trajectory-normalised divergence (51)
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
                out |= {f"{stratum.name}/{channel}/{key}": value for key, value in vars(report).items()}
            if stratum.merged is not None:
                out[f"{stratum.name}/merged_cells"] = float(stratum.merged[0])
                out[f"{stratum.name}/merged_tokens"] = stratum.merged[1]
            for name, named in stratum.named.items():
                out[f"{stratum.name}.{name}/token_share"] = named.token_share
                for channel, figures in named.figures.items():
                    out |= {f"{stratum.name}.{name}/{channel}/{key}": value for key, value in figures.items()}
        out |= {"token/live": float(self.tokens), "token/clipped": self.clipped}
        out |= {"log_ratio/mean": self.mean, "log_ratio/abs_mean": self.abs_mean, "log_ratio/max": self.largest}
        return out | {"log_ratio/kl": self.kl, "log_ratio/tv": self.tv}


def report_parts(gates: Gates, sums: TokenSums, cells: Cells) -> list[Tensor]:
    """This rank's figures as float64 tensors that are summed over ranks; sizes are the same on every rank.

    First [live tokens, clipped tokens, S+, S-], then per level: sums over owned cells [9, 2] (5 per channel, then those
    of `_joint`), figures of named cells [3, 2, names], of named parts of a join [2, 2, their names], maxima
    [3, 2, world_size] (2 per channel, then KL and TV); last the largest |ell| [world_size].
    """
    live = cells.layout.mask_T
    count = cells.num_tokens if live is None else live.sum()
    tokens = gates.mean_2C.new_zeros(4)
    tokens[0], tokens[1], tokens[2:] = count, sums.clipped, gates.drift.local_sum_2
    parts = [tokens]
    drift = gates.drift
    for level, mean, local, residual, budget, slope in zip(
        cells.levels, drift.mean, drift.local, drift.residual, gates.budget, gates.slope, strict=True
    ):
        size = residual.abs()
        used = size / budget
        figures = torch.stack([(slope == 1.0).double(), (slope < 0.0).double(), (slope == 0.0).double(), size, used])
        divergence = torch.stack([kl_estimate(mean), tv_estimate(mean)])
        if level.small_C is not None:
            divergence[:, level.small_C] = 0.0  # that of the parent
        joint = _joint(level, slope, divergence)
        parts.append(torch.cat([(figures * level.owned_C).sum(2), joint.view(4, 2)]))
        parts.append(by_name(level, size, used, slope))
        parts.append(by_part(level, local, slope))
        maxima = size.new_zeros(3, 2, cells.world_size)
        if size.numel():
            maxima[:, :, cells.rank] = torch.stack([size, used, divergence]).amax(2)
        parts.append(maxima)
    largest = gates.mean_2C.new_zeros(cells.world_size)
    largest[cells.rank] = sums.largest
    return [*parts, largest]


def merge_parts(groups: Sequence[Sequence[Tensor]], cells: Cells) -> list[Tensor]:
    """The parts that this rank contributes to a report on all `cells`, from those of groups of whole cells.

    `groups` are parts of evaluations that share no cell (`Surrogate.parts`), of the same strata and names, each with
    slots of its own for maxima; none at all gives parts of nothing. `cells` has the cells of all groups and ranks.
    Sums over the ranks of what is returned go to `make_report`.
    """
    device = cells.layout.cell_P.device
    merged = [torch.zeros(4, dtype=torch.float64, device=device)]
    for level in cells.levels:
        merged.append(merged[0].new_zeros(9, 2))
        merged.append(merged[0].new_zeros(3, 2, len(level.names or ())))
        merged.append(merged[0].new_zeros(2, 2, sum(len(part.names) for part in level.traits.parts)))
        merged.append(merged[0].new_zeros(3, 2, cells.world_size))
    merged.append(merged[0].new_zeros(cells.world_size))
    maxima = {*range(4, 4 * len(cells.levels) + 1, 4), len(merged) - 1}
    for parts in groups:
        for index, part in enumerate(parts):
            if index in maxima:
                own = merged[index][..., cells.rank]
                own.copy_(torch.maximum(own, part.amax(-1)))
            else:
                merged[index] += part
    return merged


def _joint(level: Level, slope: Tensor, divergence: Tensor) -> Tensor:
    """Over owned cells: how many are in each of REGIMES and in no named regime, and the sums of KL and TV; [8]."""
    regime = by_slope(slope)[level.owned_C].clamp(max=len(REGIMES))
    return torch.cat([torch.bincount(regime, minlength=6).to(divergence.dtype), (divergence * level.owned_C).sum(1)])


def make_report(parts: list[Tensor], cells: Cells) -> Report:
    """The report from the summed parts of all ranks (see `report_parts`)."""
    live, clipped, *channel_sums = parts[0].tolist()
    mean_2 = parts[0][2:] / max(live, 1.0)
    strata = []
    for index, level in enumerate(cells.levels):
        sums, of_cells, of_parts, maxima = parts[1 + 4 * index : 5 + 4 * index]
        shares = sums / max(level.num_acting, 1)
        share, most = shares[:5].T.tolist(), maxima.amax(2).T.tolist()
        *regimes, kl, tv = shares[5:].reshape(-1).tolist()
        channels = {}
        for at, channel in enumerate(CHANNELS):
            passes, rollback, zeroed, drift, used = share[at]
            channels[channel] = ChannelReport(passes, rollback, zeroed, drift, most[at][0], used, most[at][1])
        divergence = {"kl_mean": kl, "kl_max": most[0][2], "tv_mean": tv, "tv_max": most[1][2]}
        names = dict(zip((*REGIMES, "other"), regimes, strict=True))
        merged = (level.merged[0], level.merged[1] / max(level.num_tokens, 1)) if level.traits.min_tokens else None
        named = name_reports(level, of_cells, of_parts)
        strata.append(StratumReport(level.name, level.num_acting, channels, named, merged, names, divergence))
    return Report(
        strata=tuple(strata),
        tokens=int(live),
        clipped=clipped / max(live, 1.0),
        mean=sum(channel_sums) / max(live, 1.0),
        abs_mean=(channel_sums[0] - channel_sums[1]) / max(live, 1.0),
        largest=float(parts[-1].max()),
        kl=float(kl_estimate(mean_2)),
        tv=float(tv_estimate(mean_2)),
    )
