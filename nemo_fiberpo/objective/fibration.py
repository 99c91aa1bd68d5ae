"""The gating operator on forests of cells and its exact adjoint: (26), (31), (32) and the gradient (19).

Per channel l, a_i^l = ell_i where token i is in channel l, else 0; A_j^l its sums over joint cells, N_j their tokens,
both of this rank; count_n the tokens of a node over all ranks. Forests are extracted one after the other, each from
what the earlier ones have left. A chain is one forest; its branches follow it, and `sweeps` repeats both:

    O = 0, X_f = 0
    for f in visits:     m = up(A - N O) / count          the mean of what is left, (9) and (33)      one reduction
                         X_f += m - m[parent];  O += m[leaf]
    log rhat_i = L_i = clip(ell_i - O^{l_i}, +-eps) + offset^{l_i},   l_i the token's own channel
    offset^l = sum over f and the path from the leaf to the root of g(X_f^+) + g(X_f^-),  + clip(-O^{-l}, +-eps)

While no gate and no clip acts, L_i = ell_i. With G = g'(X), y_i = w_i A_i rhat_i (or any other derivative of a function
of L), Y^l its sums over joint cells, Y = Y^+ + Y^-:

    Obar^l = sums of those y of channel l whose own clip is saturated + [|O^l| > eps] Y^{-l},   Z = 0
    for f in reversed(visits):  mbar = minus_children((G - 1) up(Y)) + Obar at the leaves             one reduction
                                b = mbar / count, summed over the path to the root;  Z += b;  Obar -= N b
    c_i = dJ / d ell_i = [own clip not saturated] y_i + Z^{l_i}

With G - 1 and the saturated part as seeds every Z is exactly 0 on-policy, and c_i = w_i A_i to the bit.

SPMD: tokens are sharded over ranks. A node's values are global on every rank that holds it. A, N and Obar are this
rank's parts; only sums at shared nodes travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .gates import log_clip
from .hierarchy import Hierarchy
from .inputs import check_sums, checked
from .kernels import Weighed
from .sharing import NO_RIDERS, Cells, Reduce, Riders, SharedCells, all_reduce, sum_nodes


@dataclass(frozen=True, eq=False)
class Tokens:
    """Log-ratios and weights (those of `kernels.weigh`) of this rank's tokens: [T], and in pieces [P, S]."""

    log_ratio: Tensor
    weight: Tensor | None
    log_ratio_PS: Tensor
    weight_PS: Tensor | None

    @classmethod
    def of(cls, cells: SharedCells, log_ratio: Tensor, weight: Tensor | None = None) -> Tokens:
        """From tensors that `checked` has passed, without their gradients."""
        log_ratio, weight = log_ratio.detach(), None if weight is None else weight.detach()
        spread = cells.layout.spread
        return cls(log_ratio, weight, spread(log_ratio), None if weight is None else spread(weight))

    def without_weights(self) -> Tokens:
        """What `coefficients` needs, so that it does not run beside weights that only the other passes read."""
        return replace(self, weight=None, weight_PS=None)


@dataclass(frozen=True, eq=False)
class Drift:
    """Log-ratios by cell, float64."""

    sums_2J: Tensor  # A: this rank's channel sums of joint cells
    mean: list[Tensor]  # per forest [2, N]: channel means M of the nodes, over all their tokens
    drift: list[Tensor]  # per forest [2, N]: X, the drift of a node beyond its parent and the earlier forests
    reference_2J: Tensor  # O: what tokens measure their own residual from
    largest_P: Tensor  # the largest |ell| of each piece


@dataclass(frozen=True, eq=False)
class Quiet:
    """Gates that are taken to pass: nodes, bool [N] per forest, and the token clips of joint cells, bool [J]."""

    nodes: tuple[Tensor, ...]
    tokens_J: Tensor


@dataclass(frozen=True, eq=False)
class Gates:
    """Budget C and derivative G of the gates of all nodes, [2, N] per forest; and what tokens read of their joint cell,
    see `kernels.gate`."""

    budget: list[Tensor]
    slope: list[Tensor]
    table_5J: Tensor


def measure(
    tokens: Tokens, cells: SharedCells, reduce: Reduce | None, riders: Riders = NO_RIDERS, check: bool = True
) -> tuple[Drift, dict[str, Tensor]]:
    """The extraction: O and X; and the sums of the riders, which are checked first. Raises ValueError on every rank
    where a live token of any rank has a non-finite value, or where other ranks are summed than share the cells. Without
    `check` the host reads nothing, and such input gives meaningless values."""
    layout, forests = cells.layout, cells.forests
    sums_P2, largest_P, bad_P2 = kernels.run(kernels.measure, tokens.log_ratio_PS, tokens.weight_PS, layout.entries)
    sums_2J, bad_2 = layout.cell_sums(sums_P2), bad_P2.sum(0)
    checks = {"checks": torch.cat([bad_2, bad_2.new_ones(1)]), **riders.parts}
    sums, summed = sum_nodes([(forest.slots, forest.up(sums_2J)) for forest in forests], reduce, checks)
    riders.check(summed)
    if check:
        check_sums(summed["checks"], bad_2, tokens.log_ratio, tokens.weight, cells, reduce)
    mean = [sums_2N / forest.count_N for sums_2N, forest in zip(sums, forests, strict=True)]
    drift, reference_2J = [torch.zeros_like(mean_2N) for mean_2N in mean], torch.zeros_like(sums_2J)
    for number, index in enumerate(cells.stages.visits):
        forest, mean_2N = forests[index], mean[index]
        if number:  # the first forest is extracted from all there is
            left_2N = forest.up(sums_2J - cells.count_J * reference_2J)
            (left_2N,), _ = sum_nodes([(forest.slots, left_2N)], reduce, {})
            mean_2N = left_2N / forest.count_N
        drift[index] = drift[index] + forest.minus_parent(mean_2N)
        reference_2J = reference_2J + forest.at(mean_2N)
    return Drift(sums_2J, mean, drift, reference_2J, largest_P), summed


def gate_cells(drift: Drift, cells: SharedCells, hierarchy: Hierarchy, quiet: Quiet | None = None) -> Gates:
    """g(X) and G of every node, with the gate, budgets and slope of its stratum; and the offsets of joint cells. Those
    that are `quiet` pass, whatever their drift."""
    budgets, slopes = [], []
    clip_J = hierarchy.clip_of(cells)
    if quiet is not None:
        clip_J = torch.where(quiet.tokens_J, torch.inf, clip_J)
    offset_J = torch.zeros_like(clip_J)
    for number, (forest, drift_2N) in enumerate(zip(cells.forests, drift.drift, strict=True)):
        bounds = [
            hierarchy.active[index].bounds_of(forest.label_N[at], forest.count_N[at], cells.levels[index].names)
            for index, at in forest.slices.items()
        ]
        budget_2N, slope_N = (torch.cat(part, -1) for part in zip(*bounds, strict=True))
        gated = []
        for gate, run in groupby(forest.slices, lambda index: hierarchy.gate_of(hierarchy.active[index])):
            nodes = [forest.slices[index] for index in run]
            at = slice(nodes[0].start, nodes[-1].stop)
            gated.append(gate(drift_2N[:, at], budget_2N[:, at], slope_N[at]))
        value_2N, slope_2N = (torch.cat(part, -1) for part in zip(*gated, strict=True))
        if quiet is not None:
            value_2N = torch.where(quiet.nodes[number], drift_2N, value_2N)
            slope_2N = torch.where(quiet.nodes[number], 1.0, slope_2N)
        offset_J = offset_J + forest.path(value_2N.sum(0))
        budgets.append(budget_2N)
        slopes.append(slope_2N)
    offset_2J = offset_J + log_clip(-drift.reference_2J.flip(0), clip_J)
    return Gates(budgets, slopes, torch.cat([drift.reference_2J, offset_2J, clip_J[None]]))


def weigh(
    tokens: Tokens, cells: SharedCells, drift: Drift, gates: Gates, exponentiate: bool = True, use_min: bool = False
) -> Weighed:
    """y of every token and its sums, see `kernels.weigh`."""
    table = cells.layout.table(gates.table_5J, kernels.compute_dtype(tokens.log_ratio))
    pieces = tokens.log_ratio_PS, tokens.weight_PS, table, cells.layout.entries
    weighed: Weighed = kernels.run(kernels.weigh, *pieces, exponentiate, use_min)
    return weighed


def coefficients(
    tokens: Tokens,
    weighed: Weighed,
    cells: SharedCells,
    drift: Drift,
    gates: Gates,
    reduce: Reduce | None,
    riders: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The adjoint: c of every token, [T] in the dtype of `log_ratio`; and the sums of `riders`."""
    layout = cells.layout
    total_2J, saturated_2J = layout.cell_sums(weighed.total), layout.cell_sums(weighed.saturated)
    total_J = total_2J.sum(0)
    beyond_2J = drift.reference_2J.abs() > gates.table_5J[4]
    blocked_2J = saturated_2J + torch.where(beyond_2J, total_2J.flip(0), 0.0)
    adjoint_2J = torch.zeros_like(blocked_2J)
    summed: dict[str, Tensor] = {}
    for index in reversed(cells.stages.visits):
        forest = cells.forests[index]
        back_2N = forest.minus_children((gates.slope[index] - 1.0) * forest.up(total_J)) + forest.at_leaves(blocked_2J)
        (back_2N,), told = sum_nodes([(forest.slots, back_2N)], reduce, riders)
        back_2J = forest.path(back_2N / forest.count_N)
        adjoint_2J = adjoint_2J + back_2J
        blocked_2J = blocked_2J - cells.count_J * back_2J
        riders, summed = {}, summed | told
    if not cells.forests:
        summed = all_reduce(riders or {"nothing": adjoint_2J.new_zeros(0)}, reduce)
    adjoint = layout.table(adjoint_2J, weighed.passed.dtype)
    out = kernels.run(kernels.pull, weighed.passed, tokens.log_ratio_PS, adjoint, layout.entries)
    return narrowed(layout.collect(out), tokens.log_ratio.dtype), summed


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`; beyond its range, its largest number."""
    limit = torch.finfo(dtype).max
    return value if value.dtype == dtype else value.clamp(-limit, limit).to(dtype)


def token_coefficients(
    log_ratio: Tensor,
    weighted_advantage: Tensor,
    cells: Cells | SharedCells,
    hierarchy: Hierarchy,
    reduce: Reduce | None = None,
    use_min: bool = False,
) -> Tensor:
    """c_j = dJ/d ell_j of J = sum_i w_i A_i rhat_i in closed form: the exact gradient (19) of (18) and (30).

    Args
        log_ratio           [T], current minus old log-probability, nats; float16, bfloat16, float32 or float64
        weighted_advantage  [T], w_i A_i with global weights (see `token_weights`)
        cells, hierarchy    cells of the hierarchy's active strata; budgets and slopes come from the hierarchy
        reduce              sums a float64 vector over the ranks, `hierarchy.num_reductions` times; None for one process
        use_min             J = sum_i w_i min(r_i A_i, rhat_i A_i), the pessimism of PPO on top of the hierarchy: where
                            the token's own ratio is the minimum, its gradient w_i A_i r_i passes through no gate

    Returns [T] in the dtype of `log_ratio`, without a gradient; exactly 0 at masked tokens, whatever they hold.
    Elementwise math is in that dtype (float32 for half types), sums over tokens and all per-cell math in float64.

    Raises ValueError for a non-finite value on a live token, naming sample and token position; on every rank, after the
    first reduction. SPMD: tokens sharded over ranks, the result likewise; independent of how they are split.
    """
    cells = checked(cells, hierarchy, log_ratio=log_ratio, weighted_advantage=weighted_advantage)
    tokens = Tokens.of(cells, log_ratio, weighted_advantage)
    drift, _ = measure(tokens, cells, reduce)
    gates = gate_cells(drift, cells, hierarchy)
    weighed, tokens = weigh(tokens, cells, drift, gates, use_min=use_min), tokens.without_weights()
    return coefficients(tokens, weighed, cells, drift, gates, reduce, {})[0]


class _GatedLogRatio(torch.autograd.Function):
    """L as a function of ell, with the adjoint as its derivative."""

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, cells: SharedCells, hierarchy: Hierarchy, reduce: Reduce | None) -> Tensor:
        tokens = Tokens.of(cells, log_ratio)
        drift, _ = measure(tokens, cells, reduce)
        gates = gate_cells(drift, cells, hierarchy)
        ctx.save_for_backward(log_ratio)
        ctx.held = cells, drift, gates, reduce
        table = cells.layout.table(gates.table_5J, kernels.compute_dtype(log_ratio))
        gated = kernels.run(kernels.gate, tokens.log_ratio_PS, table, cells.layout.entries)
        return cells.layout.collect(gated).to(log_ratio.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cells, drift, gates, reduce = ctx.held
        (log_ratio,) = ctx.saved_tensors
        tokens = Tokens.of(cells, log_ratio, grad)
        weighed = weigh(tokens, cells, drift, gates, exponentiate=False)
        out, _ = coefficients(tokens, weighed, cells, drift, gates, reduce, {})
        return out.to(grad.dtype), None, None, None


def gated_log_ratio(
    log_ratio: Tensor, cells: Cells | SharedCells, hierarchy: Hierarchy, reduce: Reduce | None = None
) -> Tensor:
    """L_i = log rhat_i ((7) with (8)-(16), (31) and (32)), differentiable once in `log_ratio`.

    Arguments, dtype, errors and SPMD layout as `token_coefficients`; half of the calls of `reduce` are made in the
    backward pass, which every rank must therefore run. With shared cells the derivative is that of the sum of all
    ranks' losses. The result is 0 at masked tokens, whose incoming gradient is ignored.
    """
    cells = checked(cells, hierarchy, log_ratio=log_ratio)
    gated: Tensor = _GatedLogRatio.apply(log_ratio, cells, hierarchy, reduce)
    return gated
