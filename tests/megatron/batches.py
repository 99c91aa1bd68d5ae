"""One batch of data for the tiny model, laid out as a layout wants it, and the slow reference of its objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist

from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.megatron.exchange import exchange
from nemo_fiberpo.megatron.gpt import gpt_policy
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.one_pass import one_pass_cells
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import Rows, gather_rows, length_multiple, packed_rows, packed_spans, padded_rows
from nemo_fiberpo.megatron.step import StepTokens
from nemo_fiberpo.objective import Budget, Hierarchy, SharedCells, Stratum, build_cells, token_weights
from nemo_fiberpo.objective.optimistic import PartCells, part_cells
from tests.megatron import segments
from tests.megatron.partitions import MEMBERSHIP, PARTITIONS
from tests.megatron.segments import SEGMENT, SEGMENTS
from tests.megatron.tiny import VOCAB, Layout

LENGTH, SAMPLES = 12, 16
STRATA = ("domain", "prompt_group", "trajectory")
NAMES = {"domain": ["math", "code"], COLUMN: list(PARTITIONS), SEGMENT: list(SEGMENTS)}
Batch = dict[str, torch.Tensor]


def hierarchy(strata: Sequence[str] = STRATA) -> Hierarchy:
    """Budgets so tight, and slopes so flat, that every regime occurs."""
    every = (
        Stratum(COLUMN, Budget(0.03, 0.02), {"warm": Budget(0.01, 0.04)}, slope=0.6),
        Stratum(SEGMENT, Budget(0.03, 0.02), {"code": Budget(0.01, 0.04)}, slope=0.6),
        Stratum("domain", Budget(0.02, 0.03), {"code": Budget(0.05, 0.09)}, slope=0.5),
        Stratum("domain_expert", Budget(0.02, 0.03), {"math/hot": Budget(0.05, 0.01)}, join=("domain", COLUMN)),
        Stratum("domain_segment", Budget(0.02, 0.03), {"math/think": Budget(0.05, 0.01)}, join=("domain", SEGMENT)),
        Stratum("prompt_group", Budget(0.05, 0.04), slope=0.7),
        Stratum("group_expert", Budget(0.04, 0.05), slope=0.9, join=("prompt_group", COLUMN)),
        Stratum("trajectory", Budget(0.06, 0.05)),
        Stratum("trajectory_expert", Budget(0.04, 0.05), join=("trajectory", COLUMN)),
        Stratum("trajectory_segment", Budget(0.04, 0.05), slope=0.8, join=("trajectory", SEGMENT), min_tokens=2),
        Stratum("floored_expert", Budget(0.04, 0.05), join=("trajectory", COLUMN), min_tokens=3),
    )
    return Hierarchy(tuple(stratum for stratum in every if stratum.name in strata), token_clip=0.08)


def kl_penalty(log_probs: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """A loss beside the objective, sum of k3 over live tokens with a denominator of its own."""
    difference = torch.where(batch["mask"], batch["old"] - log_probs, 0.0)
    return (difference.exp() - difference - 1).sum() / 37.0


def make_batch(case: str = "uneven") -> Batch:
    """SAMPLES trajectories of at most LENGTH tokens, four per prompt, two prompts per domain, scattered.

    uneven         response lengths from 0 (a trajectory without response tokens) over 1 to 10
    masked_half    the second half of the samples has no live token at all
    on_policy      as uneven, with log-ratios of exactly 0
    groups_in_two  as uneven, the samples of a prompt two and two together
    segments       as uneven, with segments of the responses, some of them masked
    """
    generator = torch.Generator().manual_seed(7)
    order = torch.tensor([0, 9, 5, 14, 1, 7, 12, 4, 11, 2, 15, 8, 3, 10, 6, 13])
    prompt_group = order // 4 + 50
    domain = order // 8
    lengths = torch.tensor([9, 4, 1, 6, 0, 10, 3, 2, 7, 1, 5, 8, 2, 9, 4, 3])
    if case == "masked_half":
        lengths = torch.where(torch.arange(SAMPLES) < SAMPLES // 2, lengths, 0)
    if case == "groups_in_two":
        prompt_group = torch.arange(SAMPLES) // 2 + 50
        domain = prompt_group % 2
    start = torch.tensor([1, 3, 2, 4, 2, 0, 5, 1, 4, 7, 0, 2, 6, 1, 3, 8])
    position = torch.arange(LENGTH - 1)
    mask = (position >= start[:, None]) & (position < (start + lengths)[:, None])
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=generator)
    drift = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64) * 0.08
    noise = torch.randn(SAMPLES, LENGTH - 1, generator=generator, dtype=torch.float64) * 0.12
    log_ratio = torch.zeros_like(noise) if case == "on_policy" else drift + noise
    advantage = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64).expand(-1, LENGTH - 1)
    made = {
        "tokens": tokens, "lengths": start + lengths + 1, "mask": mask, "advantage": advantage,
        "log_ratio": log_ratio, "domain": domain, "prompt_group": prompt_group, "trajectory": order + 100,
    }  # fmt: skip
    if case == "segments":
        segments.add_to(made)
    return made


def share_of(batch: Batch, rank: int, ranks: int) -> Batch:
    return {name: value.chunk(ranks)[rank] for name, value in batch.items()}


def split(batch: Batch, number: int) -> list[Batch]:
    return [share_of(batch, index, number) for index in range(number)]


def labels_of(batch: Batch, name: str) -> torch.Tensor:
    """A label per token, [b, s - 1], from one per sample or one per token; of expert partitions the memberships,
    [b, s - 1, P], where the batch has them."""
    if name == COLUMN and MEMBERSHIP in batch:
        return batch[MEMBERSHIP]
    return batch[name] if batch[name].dim() == 2 else batch[name][:, None].expand_as(batch["mask"])


def columns(strata: Sequence[str]) -> list[str]:
    """What a hierarchy with these strata, and the weights, need labels of."""
    return sorted({*hierarchy(strata).columns, "trajectory"})


def names(strata: Sequence[str]) -> dict[str, list[str]]:
    return {name: value for name, value in NAMES.items() if name in hierarchy(strata).columns}


@dataclasses.dataclass(frozen=True)
class Laid:
    """The samples of a micro-batch as rows: those this rank's model reads, and those whose columns it is given, which
    are those of all cp ranks where log-probs are gathered."""

    rows: Rows
    columns: list[Rows]

    def take(self, column: torch.Tensor, fill: Any = 0) -> torch.Tensor:
        return torch.cat([rows.take(column, fill) for rows in self.columns], dim=1)


def lay_out(layout: Layout, parts: Sequence[Batch], width: int, cp_rank: int) -> list[Laid]:
    multiple = length_multiple(layout.tp, layout.cp, layout.splits_sequence)

    def rows_of(part: Batch, rank: int) -> Rows:
        options = {"cp_size": layout.cp, "cp_rank": rank, "multiple": multiple, "seq_length": width}
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
        return -(-LENGTH // multiple) * multiple
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


def make_step(layout: Layout, batch: Batch, strata: Sequence[str], axes: TokenAxes) -> Step:
    """This rank's share of the global batch, which has old log-probs, as the layout lays it out.

    SPMD: every rank calls it, with the same batch. Exchanges cells once, twice with `layout.one_pass`.
    """
    parts, laid = own_parts(layout, batch, axes)
    pairs = list(zip(laid, parts, strict=True))
    mask = [entry.take(part["mask"], False) for entry, part in pairs]
    old = [entry.take(part["old"], 0.0) for entry, part in pairs]
    needed, named = columns(strata), names(strata)
    labels = [{name: entry.take(labels_of(part, name)).flatten(0, 1) for name in needed} for entry, part in pairs]
    every = {name: torch.cat([one[name] for one in labels]) for name in needed}
    live = torch.cat([one.reshape(-1) for one in mask])
    shape = (sum(len(one) for one in mask), mask[0].shape[-1])
    chain = hierarchy(strata)
    local = [chain.cells(every, live, names=named, shape=shape), build_cells(["trajectory"], every, live)]
    cells, trajectories = exchange(local, axes, {"micro-batches per step": layout.microbatches})
    weights = token_weights(trajectories).split([one.numel() for one in mask])
    weighted = [w.view_as(m) * e.take(p["advantage"], 0.0) for w, m, (e, p) in zip(weights, mask, pairs, strict=True)]
    of_parts = None
    by_themselves = [chain.cells(one, m.reshape(-1), names=named) for one, m in zip(labels, mask, strict=True)]
    if layout.one_pass:
        of_parts = one_pass_cells(by_themselves, axes)
    microbatches = [{"rows": e.rows, "mask": m, "old": o} for e, m, o in zip(laid, mask, old, strict=True)]
    return Step(microbatches, StepTokens(old, weighted, mask, cells), of_parts, part_cells(by_themselves, cells))


class GatherAndSum(torch.autograd.Function):
    """A gather over cp whose backward pass adds up the gradients of all ranks before it takes its own part."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, ctx.width = group, values.shape[-1]
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
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


def shares_of(batch: Batch, place: tuple[int, int]) -> dict[int, Fraction]:
    """A token's expert partitions and its share in each: one, or with soft membership those that have any."""
    if MEMBERSHIP in batch:
        units = batch[MEMBERSHIP][place].tolist()
        return {expert: Fraction(unit, 255) for expert, unit in enumerate(units) if unit}
    return {int(batch[COLUMN][place]) if COLUMN in batch else 0: Fraction(1)}
