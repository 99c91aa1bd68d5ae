"""One optimizer step's samples on this rank, and the conversion from columns of samples to the model's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_fiberpo.megatron.sequences import Rows
from nemo_fiberpo.objective import Corrected, SharedCells
from nemo_fiberpo.objective.optimistic import PartCells


@dataclass(frozen=True)
class Minibatch:
    """This rank's part of one optimizer step; every sequence holds one entry per micro-batch, tensors [r, t] in rows.

    rows                the model's inputs, see `megatron.sequences`
    old_log_probs       of the tokens that the rows' entries belong to, as all below
    init_log_probs      under the initial policy; None without a KL penalty
    weights             float64, w_i with global denominators, 0 at masked tokens
    weighted_advantage  float64, w_i A_i, times the weight of a rollout correction
    mask                bool, live tokens
    cells               of all these tokens, flattened in this order; shared with the other ranks
    microbatch_cells    for one pass: the cells of each micro-batch (`one_pass_cells`); None for two passes
    guessed             for optimistic steps: the cells of each micro-batch by itself; None where none are taken
    expert_labels       the partitions of experts in the rollout; None if routing is not compared
    correction          sums of `algorithm.rollout_correction` for its metrics, float64; None without a correction
    """

    rows: Sequence[Rows]
    old_log_probs: Sequence[Tensor]
    init_log_probs: Sequence[Tensor] | None
    weights: Sequence[Tensor]
    weighted_advantage: Sequence[Tensor]
    mask: Sequence[Tensor]
    cells: SharedCells
    microbatch_cells: Sequence[SharedCells] | None = None
    guessed: Sequence[PartCells] | None = None
    expert_labels: Sequence[Tensor] | None = None
    correction: Tensor | None = None

    def penalty_columns(self) -> list[dict[str, Tensor]]:
        """What `kl_penalty` reads, of every micro-batch."""
        assert self.init_log_probs is not None
        columns = zip(self.init_log_probs, self.weights, self.mask, strict=True)
        return [{"init_log_probs": init, "weights": weights, "mask": mask} for init, weights, mask in columns]


def build_minibatch(
    part: Mapping[str, Tensor],
    rows: Sequence[Rows],
    weights: Tensor,
    cells: SharedCells,
    microbatch_cells: Sequence[SharedCells] | None,
    guessed: Sequence[PartCells] | None = None,
    expert_labels: str | None = None,
    correction: Corrected | None = None,
) -> Minibatch:
    """The columns of a minibatch, [b, s - 1], in the rows of its micro-batches; `weights` and the weights of the
    `correction` are flat, in rows already.

    expert_labels   the column of the partitions of experts, if they are to be compared
    """
    shapes = [entry.tokens.shape for entry in rows]

    def as_rows(values: Tensor) -> list[Tensor]:
        pieces = values.split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    weight = as_rows(weights)
    of_advantage = weight if correction is None else as_rows(weights * correction.weight)
    advantage = part["advantage"][:, None].expand(part["mask"].shape)
    init = part.get("init_logprobs")
    return Minibatch(
        rows=rows,
        old_log_probs=[entry.take(part["logprobs"]) for entry in rows],
        init_log_probs=None if init is None else [entry.take(init) for entry in rows],
        weights=weight,
        weighted_advantage=[w * entry.take(advantage) for w, entry in zip(of_advantage, rows, strict=True)],
        mask=[entry.take(part["mask"], False) for entry in rows],
        cells=cells,
        microbatch_cells=microbatch_cells,
        guessed=guessed,
        expert_labels=None if expert_labels is None else [entry.take(part[expert_labels]) for entry in rows],
        correction=None if correction is None else correction.sums,
    )


def stacked_shape(rows: Sequence[Rows]) -> tuple[int, int]:
    """The shape of all rows stacked."""
    return sum(entry.tokens.shape[0] for entry in rows), rows[0].tokens.shape[1]


def flatten_column(column: Tensor, rows: Sequence[Rows]) -> Tensor:
    """[b, s - 1, ...] -> the flat tokens of all rows, [T, ...]; 0 at padding."""
    return torch.cat([entry.take(column).flatten(0, 1) for entry in rows])


def flatten_labels(label: Tensor, mask: Tensor, rows: Sequence[Rows]) -> Tensor:
    """Labels of samples, [b], or of tokens, [b, s - 1, ...] -> labels of the flat tokens of all rows."""
    label = label.to(mask.device)
    return flatten_column(label[:, None].expand(mask.shape) if label.dim() == 1 else label, rows)
