"""Weights and advantages -> value of the objective and per-token coefficients: (2), (6), (18), (30), gradient (19)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cells import Cells
from .drift import bad_tokens, check_tokens, num_bad, place
from .fibration import Gates, TokenSums, evaluate
from .hierarchy import Hierarchy, positive_number
from .ratio_gating import RatioGating
from .ratio_objective import evaluate_gating
from .regimes import Report, make_report, report_parts
from .sharing import Reduce
from .wording import nearest

WEIGHTS = ("trajectory_mean", "token_mean", "fixed_length_mean")


@dataclass(frozen=True, eq=False)
class Surrogate:
    """value: J of all ranks; coefficients: [T], dJ/dlogp of this rank's tokens; report: the gates of all ranks.

    parts   what the report is made from, see `regimes.merge_parts`
    """

    value: float
    coefficients: Tensor
    report: Report
    parts: list[Tensor] = field(repr=False)


def token_weights(
    cells: Cells,
    kind: str = "trajectory_mean",
    *,
    stratum: str = "trajectory",
    length: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Predetermined weights w_i of (2), with the denominators of all ranks.

        trajectory_mean     1 / (|Tj| T_tau(i))     (18), (30): every trajectory counts the same
        token_mean          1 / N                   every token counts the same
        fixed_length_mean   1 / (|Tj| length)       every token counts the same, whatever the lengths came out as

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
    level = cells.level(stratum)
    if level.traits.partial:
        raise ValueError(f"stratum: {stratum!r} is missing in parts of the tree; build cells of it by itself")
    if kind == "trajectory_mean":
        weight_C = 1.0 / (level.num_cells * level.count_C)
        cell_T = cells.cell_per_token(stratum)
        weight_T = weight_C.to(dtype)[cell_T] if weight_C.numel() else weight_C.new_zeros(cells.num_tokens, dtype=dtype)
    else:
        total = level.num_tokens if length is None else level.num_cells * positive_number(length, "length")
        weight_T = level.count_C.new_full((cells.num_tokens,), 1.0 / max(total, 1), dtype=dtype)
    return weight_T if cells.layout.mask_T is None else torch.where(cells.layout.mask_T, weight_T, 0.0)


def on_policy_coefficients(weighted_advantage: Tensor, cells: Cells) -> Tensor:
    """Coefficients at log-ratio exactly 0, where the Jacobian is the identity: w_i A_i on live tokens, 0 elsewhere.

    [T] -> [T], no reduction. Right only where the old log-probabilities come from the very model, weights, precision
    and layout that is trained. Raises ValueError for a non-finite value on a live token of this rank.
    """
    check_tokens("weighted_advantage", weighted_advantage, cells)
    if num_bad(weighted_advantage, cells):
        index = int(bad_tokens(weighted_advantage, cells).nonzero()[0])
        value = weighted_advantage[index].item()
        raise ValueError(f"weighted_advantage: {value} on a live token, {place(index, cells)}; it must be finite")
    mask_T = cells.layout.mask_T
    live_T = weighted_advantage.detach()
    return live_T.clone() if mask_T is None else torch.where(mask_T, live_T, 0.0)


def surrogate(
    log_ratio: Tensor,
    weighted_advantage: Tensor,
    cells: Cells,
    hierarchy: Hierarchy,
    reduce: Reduce | None = None,
    gating: RatioGating | None = None,
) -> Surrogate:
    """J = sum_i w_i A_i rhat_i over all ranks, (18) and (30), its per-token coefficients, and the report of the gates.

    Arguments and errors as `token_coefficients`. `reduce` is called `hierarchy.num_reductions` times, also on a rank
    without tokens; with `gating` half as often and once more. That is twice without branches: (1) counts of non-finite
    input and S+, S- of the shared cells; (2) J, the report's sums, Z+, Z- of the shared cells.

    gating   a map G of `ratio_gating` instead of FiberPO's: J = sum_i w_i A_i G(r)_i, (2). The hierarchy then only
             reports: its gates as they would act on these log-ratios, and as clipped tokens those that G cuts. A map
             that couples the tokens of a stratum needs it among the active ones, else ValueError

    SPMD: coefficients are sharded like the tokens; value and report are the same on every rank.
    """
    sizes: list[torch.Size] = []

    def head(gates: Gates, sums: TokenSums) -> Tensor:
        parts = [sums.total_2C.sum().reshape(1), *report_parts(gates, sums, cells)]
        sizes.extend(part.shape for part in parts)
        return torch.cat([part.reshape(-1) for part in parts])

    if gating is None:
        coefficients, summed = evaluate(log_ratio, weighted_advantage, cells, hierarchy, reduce, head)
    else:
        tokens = log_ratio, weighted_advantage, cells
        coefficients, summed = evaluate_gating(gating, *tokens, hierarchy, reduce, head)
    flat = summed.split([size.numel() for size in sizes])
    parts = [part.view(size) for part, size in zip(flat, sizes, strict=True)]
    return Surrogate(float(parts[0]), coefficients, make_report(parts[1:], cells), parts[1:])
