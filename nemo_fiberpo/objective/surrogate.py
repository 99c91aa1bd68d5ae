"""Weights and advantages -> value of the objective and per-token coefficients: (2), (6), (18), (30), gradient (19)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..values import nearest, positive_number
from .baselines import DppoTv
from .fibration import Drift, Tokens, coefficients, gate_cells, measure, narrowed, weigh
from .hierarchy import Hierarchy
from .inputs import checked, find_bad
from .kernels import TokenLayout
from .ratio_gating import Gated, RatioGating, check_gating
from .report import Report, make_report, pack, report_fields, unpack
from .sharing import NO_RIDERS, Cells, Level, Reduce, Riders, SharedCells, all_reduce, sum_nodes

WEIGHTS = ("trajectory_mean", "token_mean", "fixed_length_mean")


@dataclass(frozen=True, eq=False)
class Surrogate:
    """J of all ranks; [T], dJ/dlogp of this rank's tokens; the gates of all ranks, from `fields`, see report.py."""

    value: float
    coefficients: Tensor
    report: Report
    fields: dict[str, Tensor] = field(repr=False)


def token_weights(
    cells: Cells | SharedCells,
    kind: str = "trajectory_mean",
    *,
    stratum: str = "trajectory",
    length: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Predetermined weights w_i of (2), with the denominators of all ranks.

        trajectory_mean     1 / (|Tj| T_tau(i))     (18), (30): every trajectory counts the same
        token_mean          1 / N                   every token counts the same
        fixed_length_mean   1 / (|Tj| length)       every token counts the same, whatever the lengths are

    |Tj| counts trajectories with a live token, T_tau and N live tokens, on all ranks where `cells` is shared.

    Args
        cells    any cells with a level called `stratum`. Where the hierarchy has no such active stratum, make them with
                 `build_cells(["trajectory"], {"trajectory": ids}, mask)`; `share` them like the others
        length   the L of fixed_length_mean, in tokens, > 0

    Returns [T] of `dtype`, 0 at masked tokens. Raises ValueError naming the argument. SPMD: sharded over ranks.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"kind: unknown weighting {kind!r}{nearest(kind, WEIGHTS)}")
    if (kind == "fixed_length_mean") != (length is not None):
        raise ValueError(f"length: is for fixed_length_mean and required there, got {length!r} with {kind}")
    cells = cells.shared
    level = cells.hard_level(stratum)
    if not level.everywhere:
        raise ValueError(f"stratum: {stratum!r} is missing in parts of the tree; build cells of it by itself")
    if kind == "trajectory_mean":
        weight_C = 1.0 / (level.num_cells * level.count_C)
    else:
        total = level.num_tokens if length is None else level.num_cells * positive_number(length, "length")
        weight_C = torch.full_like(level.count_C, 1.0 / max(total, 1))
    return cells.layout.at_tokens(level.at(weight_C)).to(dtype)


def on_policy_coefficients(weighted_advantage: Tensor, cells: Cells | SharedCells) -> Tensor:
    """Coefficients at log-ratio exactly 0, where the Jacobian is the identity: w_i A_i on live tokens, 0 elsewhere.

    [T] -> [T], no reduction. Right only if the old log-probabilities come from the same model, weights, precision and
    layout that are trained. Raises ValueError for a non-finite value on a live token of this rank.
    """
    cells = checked(cells, None, weighted_advantage=weighted_advantage)
    bad = find_bad(weighted_advantage, cells)
    if bad:
        raise ValueError(f"weighted_advantage: {bad}; it must be finite")
    return cells.layout.masked(weighted_advantage.detach().clone())


def surrogate(
    log_ratio: Tensor,
    weighted_advantage: Tensor,
    cells: Cells | SharedCells,
    hierarchy: Hierarchy,
    reduce: Reduce | None = None,
    gating: RatioGating | None = None,
    use_min: bool = False,
    riders: Riders = NO_RIDERS,
    old_log_probs: Tensor | None = None,
) -> Surrogate:
    """J = sum_i w_i A_i rhat_i over all ranks, (18) and (30), its per-token coefficients, and the report of the gates.

    Arguments and errors as `token_coefficients`; with `gating` there are half as many calls of `reduce`, and one more.
    The first has counts of non-finite input, S+, S- of the shared nodes, and `riders`; the first of the adjoint has J
    and the report's fields beside its sums of shared nodes.

    gating   a map G of `ratio_gating` instead of FiberPO's: J = sum_i w_i A_i G(r)_i, (2). The hierarchy then only
             reports: its gates as they would act on these log-ratios, and as clipped tokens those that G cuts. A map
             that couples the tokens of a stratum needs it among the active ones, else ValueError
    old_log_probs   [T], those that `log_ratio` is relative to; needed by `DppoTv` alone, which else is a ValueError

    The host reads twice from the device: what the first reduction says of bad input, and value and report at the end.

    SPMD: coefficients are sharded like the tokens; value and report are the same on every rank.
    """
    cells = checked(cells, hierarchy, log_ratio=log_ratio, weighted_advantage=weighted_advantage)
    tokens = Tokens.of(cells, log_ratio, weighted_advantage)
    if gating is None:
        drift, _ = measure(tokens, cells, reduce, riders)
        gates = gate_cells(drift, cells, hierarchy)
        weighed, tokens = weigh(tokens, cells, drift, gates, use_min=use_min), tokens.without_weights()
        head = pack(report_fields(drift, gates, cells, weighed.value.sum(), weighed.clipped.sum()), cells)
        out, summed = coefficients(tokens, weighed, cells, drift, gates, reduce, head)
    else:
        check_gating(gating, hierarchy)
        gating = with_old(gating, old_log_probs, cells)
        out, summed = _evaluate_map(gating, tokens, cells, hierarchy, reduce, riders)
    fields = unpack(summed)
    value, report = make_report(fields, cells)
    return Surrogate(value, out, report, fields)


def with_old(gating: RatioGating, old_log_probs: Tensor | None, cells: SharedCells) -> RatioGating:
    """The map, with the old log-probs of this rank's live tokens where it compares probabilities."""
    if not isinstance(gating, DppoTv):
        return gating
    if old_log_probs is None:
        raise ValueError("old_log_probs: DppoTv compares probabilities, so it needs those of the old policy")
    checked(cells, None, old_log_probs=old_log_probs)
    return gating.against(cells.layout.masked(old_log_probs.detach().double()))


def _evaluate_map(
    gating: RatioGating, tokens: Tokens, cells: SharedCells, hierarchy: Hierarchy, reduce: Reduce | None, riders: Riders
) -> tuple[Tensor, dict[str, Tensor]]:
    """Coefficients [T] of a ratio-gating map, and the summed fields of the report of the hierarchy's gates, as they
    would act on these log-ratios."""
    layout = cells.layout
    drift, gated, y, level = _gate_tokens(gating, tokens, cells, reduce, riders)
    value, clipped = (y * gated.ratio).sum(), layout.masked(gated.clipped.to(y.dtype)).sum()
    fields = pack(report_fields(drift, gate_cells(drift, cells, hierarchy), cells, value, clipped), cells)
    if level is None:
        given_C, summed = None, all_reduce(fields, reduce)
    else:
        (given_C,), summed = sum_nodes([(level.slots, given_up(gated, y, level, layout))], reduce, fields)
    return narrowed(map_coefficients(gated, y, level, layout, given_C), tokens.log_ratio.dtype), summed


def given_up(gated: Gated, y: Tensor, level: Level, layout: TokenLayout) -> Tensor:
    """By cell of the level, what its tokens give up to the others, [C]."""
    assert gated.left is not None
    return level.sums(layout.sum_tokens(y * gated.left))


def map_coefficients(
    gated: Gated, y: Tensor, level: Level | None, layout: TokenLayout, given_C: Tensor | None
) -> Tensor:
    """Coefficients [T], float64, of a map that has been evaluated at the tokens; `given_C` are the sums of `given_up`
    over all ranks."""
    out = y * gated.diagonal
    if level is not None:
        assert gated.left is not None and gated.right is not None and given_C is not None
        pulled = layout.at_tokens(level.at(given_C))
        # A token alone in its cell, or beyond the budget, gave all there is: the difference is exactly 0.
        out = out + gated.right * (pulled - y * gated.left if gated.others_only else pulled)
    return layout.masked(out)


def feature_sums(gating: RatioGating, x: Tensor, y: Tensor, cells: SharedCells) -> tuple[Level, Tensor, Tensor]:
    """The level whose cells the map couples, each token's count [T] of its cell, and this rank's sums of the feature
    [C]."""
    assert gating.stratum is not None
    level, layout = cells.hard_level(gating.stratum), cells.layout
    count = layout.at_tokens(level.at(level.count_C)).clamp_min(1.0)
    return level, count, level.sums(layout.sum_tokens(gating.feature(x, y >= 0, count)))


def _gate_tokens(
    gating: RatioGating, tokens: Tokens, cells: SharedCells, reduce: Reduce | None, riders: Riders
) -> tuple[Drift, Gated, Tensor, Level | None]:
    """The drift of all cells; the map at the tokens, whose sums over cells ride in the first reduction; w A, float64,
    0 at masked tokens; and the level whose cells the map couples."""
    layout = cells.layout
    assert tokens.weight is not None
    x, y = layout.masked(tokens.log_ratio.double()), layout.masked(tokens.weight.double())
    if gating.stratum is None:
        return measure(tokens, cells, reduce, riders)[0], gating.gate(x, y >= 0, x, x), y, None
    level, count, sum_C = feature_sums(gating, x, y, cells)
    riders = Riders({**riders.parts, "feature": level.slots.pack(sum_C)}, riders.check)
    drift, summed = measure(tokens, cells, reduce, riders)
    total = layout.at_tokens(level.at(level.slots.unpack(sum_C, summed["feature"])))
    return drift, gating.gate(x, y >= 0, total, count), y, level


def gated_ratio(
    log_ratio: Tensor,
    weighted_advantage: Tensor,
    cells: Cells | SharedCells,
    gating: RatioGating,
    reduce: Reduce | None = None,
    old_log_probs: Tensor | None = None,
) -> Tensor:
    """G(r)_i of (2), float64 [T]; 1 at masked tokens. Arguments and errors as `surrogate`, of which this is the first
    reduction. SPMD: sharded like the tokens.
    """
    cells = checked(cells, None, log_ratio=log_ratio, weighted_advantage=weighted_advantage)
    tokens = Tokens.of(cells, log_ratio, weighted_advantage)
    gating = with_old(gating, old_log_probs, cells)
    ratio = _gate_tokens(gating, tokens, cells, reduce, NO_RIDERS)[1].ratio
    return cells.layout.masked(ratio, 1.0)
