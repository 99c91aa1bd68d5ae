"""Log-ratios -> signed channels -> per-cell sums, means and drifts, in float64; and the refusal of non-finite input.

Per token: x = log-ratio where live, else 0; the positive channel holds max(x, 0), the negative one min(x, 0), by one
label mask x >= 0, so that each token is in exactly one channel (EQUATIONS (13) and 4.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .branches import BranchedCells, extract
from .cells import Cells
from .sharing import Reduce, exchange

LARGEST = 1e280
"""Magnitudes beyond it (float64 only) count as non-finite: a sum of them could overflow."""


@dataclass(frozen=True, eq=False)
class Drift:
    """Per level, coarsest first, float64 [2, C]: channel means M (9), (33) and residual means X_n = M_n - M_{n-1}.

    Global for every cell that this rank holds. `local_sum_2` [2] is this rank's sum of either channel over its tokens,
    `local` [2, C] per level that over its tokens of every cell. A cell that is merged into its parent has its mean.
    `reference_2C` is what tokens measure their own residual from where there are branches (see branches.py), in their
    joint cells; without branches it is the mean of the finest cell.
    """

    mean: list[Tensor]
    residual: list[Tensor]
    local_sum_2: Tensor
    local: list[Tensor]
    reference_2C: Tensor | None = None


def compute_dtype(value: Tensor) -> torch.dtype:
    """Dtype of elementwise math: float64 and float32 stay, half types are raised to float32."""
    return value.dtype if value.dtype == torch.float64 else torch.float32


def check_tokens(name: str, value_T: Tensor, cells: Cells) -> None:
    """Refuse a tensor that is not a floating-point [T] on the device of the cells."""
    device = cells.layout.cell_P.device
    if not isinstance(value_T, Tensor) or not value_T.is_floating_point():
        raise ValueError(
            f"{name}: must be a floating-point tensor, got {getattr(value_T, 'dtype', type(value_T).__name__)}"
        )
    if value_T.ndim != 1 or value_T.numel() != cells.num_tokens:
        raise ValueError(f"{name}: must have shape [{cells.num_tokens}] like the labels, got {list(value_T.shape)}")
    if value_T.device != device:
        raise ValueError(f"{name}: is on {value_T.device}, but the cells are on {device}")


def measure(
    log_ratio_T: Tensor, cells: Cells, reduce: Reduce | None = None, weighted_advantage_T: Tensor | None = None
) -> Drift:
    """Means and residual means of all cells; the first of the two reductions, the first half of them with branches.

    Sums S^l are taken over tokens for the finest level only and added up to the coarser ones; M = S / N with the global
    count N. The buffer is [non-finite log-ratios, non-finite weighted advantages, S+ and S- of the shared cells].

    Raises ValueError on every rank where a live token of any rank has a non-finite log-ratio or weighted advantage.
    SPMD: tokens sharded; the result is the same on every rank that holds the cell.
    """
    sums_2P, advantage_ok = _token_sums(log_ratio_T, weighted_advantage_T, cells)
    ok = bool(torch.isfinite(sums_2P).all())
    bad = [0 if ok else num_bad(log_ratio_T, cells)]
    bad.append(0 if advantage_ok or weighted_advantage_T is None else num_bad(weighted_advantage_T, cells))
    local = cells.layout.fold(sums_2P)
    own_sums = cells.up(local) if cells.levels else []
    head, sums = exchange(local.new_tensor(bad), own_sums, cells, reduce)
    _refuse_non_finite(bad, head.tolist(), log_ratio_T, weighted_advantage_T, cells)
    mean = [sum_2C / level.count_C for sum_2C, level in zip(sums, cells.levels, strict=True)]
    if isinstance(cells, BranchedCells):
        residual, reference_2C = extract(sums, cells, reduce)
        return Drift(mean, residual, local.sum(1), own_sums, reference_2C)
    residual = mean[:1]
    for index, level in enumerate(cells.levels[1:], 1):
        above_2C = mean[index - 1][:, level.parent_C]
        if level.small_C is not None:
            mean[index][:, level.small_C] = above_2C[:, level.small_C]
        residual.append(mean[index] - above_2C)
    return Drift(mean, residual, local.sum(1), own_sums)


def _token_sums(log_ratio_T: Tensor, weighted_advantage_T: Tensor | None, cells: Cells) -> tuple[Tensor, bool]:
    """Channel sums per piece, [2, P], and whether the sums of the weighted advantages are finite."""
    sums_2P = cells.layout.zeros()
    dtype = compute_dtype(log_ratio_T)
    totals = []
    for block in cells.layout.blocks():
        x = block.take(log_ratio_T, dtype, "x")
        block.add(sums_2P, block.negative(x), x)
        if weighted_advantage_T is not None:
            totals.append(block.take(weighted_advantage_T, dtype, "y").sum())
    return sums_2P, not totals or bool(torch.isfinite(torch.stack(totals)).all())


def bad_tokens(value_T: Tensor, cells: Cells) -> Tensor:
    """Bool [T]: live tokens whose value is not finite."""
    bad_T = ~torch.isfinite(value_T) | (value_T.abs() > LARGEST)
    return bad_T if cells.layout.mask_T is None else bad_T & cells.layout.mask_T


def num_bad(value_T: Tensor, cells: Cells) -> int:
    """How many live tokens have a value that is not finite."""
    return int(bad_tokens(value_T, cells).sum())


def _refuse_non_finite(
    here: list[int], everywhere: list[float], log_ratio_T: Tensor, weighted_advantage_T: Tensor | None, cells: Cells
) -> None:
    for count, total, name, value_T in zip(
        here, everywhere, ("log_ratio", "weighted_advantage"), (log_ratio_T, weighted_advantage_T), strict=True
    ):
        if count:
            assert value_T is not None
            index = int(bad_tokens(value_T, cells).nonzero()[0])
            raise ValueError(
                f"{name}: {value_T[index].item()} on a live token, {place(index, cells)}; "
                f"{int(total)} such tokens in all, all live values must be finite"
            )
        if total:
            raise ValueError(f"{name}: {int(total)} live tokens on another rank are not finite; see that rank's error")


def place(index: int, cells: Cells) -> str:
    """Where a token is: sample and position in it where the shape of the batch is known."""
    if cells.shape is None:
        return f"token {index} of the flat batch"
    return f"sample {index // cells.shape[1]}, token position {index % cells.shape[1]}"
