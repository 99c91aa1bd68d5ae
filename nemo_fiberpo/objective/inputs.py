"""What the objective refuses of its input: cells of another hierarchy, tensors that do not fit, non-finite values."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .hierarchy import Hierarchy
from .sharing import Cells, Reduce, SharedCells


def checked(cells: Cells | SharedCells, hierarchy: Hierarchy | None, **tokens: Tensor) -> SharedCells:
    """The shared cells, after the checks that they are of this hierarchy, and that `tokens`, by the names of their
    arguments, are floating-point [T] on the device of the cells."""
    cells = cells.shared
    if hierarchy is not None:
        hierarchy.check_cells(cells)
    for name, value in tokens.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{name}: must be a floating-point tensor, got {got}")
        if value.ndim != 1 or value.numel() != cells.num_tokens:
            raise ValueError(f"{name}: must have shape [{cells.num_tokens}] like the labels, got {list(value.shape)}")
        if value.device != cells.count_J.device:
            raise ValueError(f"{name}: is on {value.device}, but the cells are on {cells.count_J.device}")
    return cells


def find_bad(value_T: Tensor, cells: SharedCells) -> str | None:
    """The first value of a live token that is not finite, and its place, for a message; None without one."""
    batch, mask_T = cells.layout.batch, cells.layout.mask_T
    bad_T = ~(value_T.abs() <= kernels.LARGEST.get(value_T.dtype, torch.finfo(value_T.dtype).max))
    bad = (bad_T if mask_T is None else bad_T & mask_T).nonzero()
    if not bad.numel():
        return None
    index = int(bad[0])
    where = f"sample {index // batch[1]}, token position {index % batch[1]}" if batch else None
    return f"{value_T[index].item()} on a live token, {where or f'token {index} of the flat batch'}"


def check_sums(
    summed: Tensor,
    bad_2: Tensor,
    log_ratio: Tensor,
    weight: Tensor | None,
    cells: SharedCells,
    reduce: Reduce | None,
) -> None:
    """Refuse bad input on any rank, and a reduction over another number of ranks than share the cells."""
    *here, bad_ratios, bad_weights, ranks = torch.cat([bad_2, summed]).tolist()
    if ranks != cells.world_size:
        what = f"sums over {int(ranks)} rank(s)" if reduce is not None else "is required"
        raise ValueError(f"reduce: {what}, but the cells are shared by {cells.world_size} rank(s); see `Cells.share`")
    names, values = ("log_ratio", "weighted_advantage"), (log_ratio, weight)
    for own, total, name, value in zip(here, (bad_ratios, bad_weights), names, values, strict=True):
        if own and value is not None:
            raise ValueError(
                f"{name}: {find_bad(value, cells)}; {round(total)} such tokens in all, all live values must be finite"
            )
        if total:
            raise ValueError(
                f"{name}: {round(total)} live tokens on another rank are not finite; see that rank's error"
            )
