"""A global batch of samples as a layout lays it out: micro-batches, rows, cells, and the policy that reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.gpt import gpt_policy
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.one_pass import one_pass_cells
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import (
    Rows,
    gather_rows,
    length_multiple,
    packed_rows,
    packed_spans,
    padded_rows,
    round_up,
)
from nemo_fiberpo.megatron.step import StepTokens
from nemo_fiberpo.objective import Hierarchy, SharedCells, build_cells, token_weights
from nemo_fiberpo.objective.optimistic import PartCells, part_cells
from nemo_fiberpo.verification.model import Layout

Batch = dict[str, Tensor]
"""Columns of the samples: tokens [b, s], lengths [b], mask, advantage and log_ratio [b, s - 1], and labels."""


def share_of(batch: Batch, rank: int, ranks: int) -> Batch:
    return {name: value.chunk(ranks)[rank] for name, value in batch.items()}


def split(batch: Batch, number: int) -> list[Batch]:
    return [share_of(batch, index, number) for index in range(number)]


@dataclasses.dataclass(frozen=True)
class Laid:
    """The samples of a micro-batch as rows: those this rank's model reads, and those whose columns it is given, which
    are those of all cp ranks where log-probs are gathered."""

    rows: Rows
    columns: list[Rows]

    def take(self, column: Tensor, fill: Any = 0) -> Tensor:
        return torch.cat([rows.take(column, fill) for rows in self.columns], dim=1)


def lay_out(layout: Layout, parts: Sequence[Batch], width: int, cp_rank: int) -> list[Laid]:
    multiple = length_multiple(layout.tp, layout.cp, layout.splits_sequence)

    def rows_of(part: Batch, rank: int) -> Rows:
        options: dict[str, Any] = {"cp_size": layout.cp, "cp_rank": rank, "multiple": multiple, "seq_length": width}
        if layout.packed:
            return packed_rows(part["tokens"], part["lengths"], **options)
        return padded_rows(part["tokens"], lengths=part["lengths"], **options)

    laid = []
    for part in parts:
        every = {rank: rows_of(part, rank) for rank in (range(layout.cp) if layout.gathered else [cp_rank])}
        laid.append(Laid(every[cp_rank], list(every.values())))
    return laid


def row_width(layout: Layout, batch: Batch, data_ranks: int) -> int:
    """The width of rows that all micro-batches of all ranks fit in: expert-parallel ranks exchange equal shapes."""
    multiple = length_multiple(layout.tp, layout.cp, layout.splits_sequence)
    if not layout.packed:
        return round_up(batch["tokens"].shape[1], multiple)
    parts = split(batch, data_ranks * layout.microbatches)
    return max(sum(packed_spans(part["lengths"].tolist(), multiple)) for part in parts)


def own_parts(layout: Layout, batch: Batch, axes: TokenAxes) -> tuple[list[Batch], list[Laid]]:
    """This rank's micro-batches of the global batch, and their rows."""
    data = axes.axis("dp")
    parts = split(share_of(batch, data.rank, data.size), layout.microbatches)
    return parts, lay_out(layout, parts, row_width(layout, batch, data.size), axes.axis("cp").rank)


def rows_of(layout: Layout, batch: Batch, axes: TokenAxes) -> list[Rows]:
    return [laid.rows for laid in own_parts(layout, batch, axes)[1]]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rank's step is called with; `parts` are the cells of `one_pass_step`, `guessed` of `optimistic_step`."""

    microbatches: list[dict[str, Any]]
    tokens: StepTokens
    parts: list[SharedCells] | None
    guessed: list[PartCells]

    @property
    def rows(self) -> list[Rows]:
        return [batch["rows"] for batch in self.microbatches]


def make_step(
    layout: Layout,
    batch: Batch,
    hierarchy: Hierarchy,
    labels_of: Callable[[Batch, str], Tensor],
    names: Mapping[str, Sequence[str]],
    axes: TokenAxes,
) -> Step:
    """This rank's share of the global batch, which has old log-probs, as the layout lays it out.

    labels_of   (part of the batch, column) -> a label per token, [b, s - 1]
    names       of the labels of columns with budgets by name

    SPMD: every rank calls it, with the same batch. Exchanges cells once, twice with `layout.one_pass`.
    """
    parts, laid = own_parts(layout, batch, axes)
    pairs = list(zip(laid, parts, strict=True))
    mask = [entry.take(part["mask"], False) for entry, part in pairs]
    old = [entry.take(part["old"], 0.0) for entry, part in pairs]
    needed = sorted({*hierarchy.columns, "trajectory"})
    labels = [{name: entry.take(labels_of(part, name)).flatten(0, 1) for name in needed} for entry, part in pairs]
    every = {name: torch.cat([one[name] for one in labels]) for name in needed}
    live = torch.cat([one.reshape(-1) for one in mask])
    shape = (sum(len(one) for one in mask), mask[0].shape[-1])
    local = [hierarchy.cells(every, live, names=names, shape=shape), build_cells(["trajectory"], every, live)]
    cells, trajectories = exchange(local, axes, {"micro-batches per step": layout.microbatches})
    weights = token_weights(trajectories).split([one.numel() for one in mask])
    weighted = [w.view_as(m) * e.take(p["advantage"], 0.0) for w, m, (e, p) in zip(weights, mask, pairs, strict=True)]
    by_themselves = [hierarchy.cells(one, m.reshape(-1), names=names) for one, m in zip(labels, mask, strict=True)]
    of_parts = one_pass_cells(by_themselves, axes) if layout.one_pass else None
    microbatches = [{"rows": e.rows, "mask": m, "old": o} for e, m, o in zip(laid, mask, old, strict=True)]
    return Step(microbatches, StepTokens(old, weighted, mask, cells), of_parts, part_cells(by_themselves, cells))


class GatherAndSum(torch.autograd.Function):
    """A gather over cp whose backward pass adds up the gradients of all ranks before it takes its own part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.width = group, values.shape[-1]
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.width
        return grad[..., start : start + ctx.width], None


def make_policy(layout: Layout, model: Any, rows: Sequence[Rows]) -> Policy:
    from megatron.core import parallel_state as mpu

    policy = gpt_policy(model, rows, mpu.get_tensor_model_parallel_group(), logprobs=layout.logprobs)
    if not layout.gathered:
        return policy
    group = mpu.get_context_parallel_group()
    gather = {"slice": gather_rows, "sum": GatherAndSum.apply}[layout.gathered]
    return dataclasses.replace(policy, log_probs=lambda output, batch: gather(policy.log_probs(output, batch), group))
