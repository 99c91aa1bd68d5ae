"""Partitions of the tiny model's experts: read on a layout's ranks, and worked out again on one process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.routing import RoutingCapture, hard_labels, soft_membership
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import Rows
from nemo_fiberpo.megatron.step import current_log_probs
from nemo_fiberpo.objective import ExpertPartitions

PARTITIONS = {"cold": (0, 3, 5), "warm": (1, 6), "hot": (2, 4, 7)}
"""Not the blocks of any expert-parallel layout, so that every layout has the same."""
MEMBERSHIP = "membership"
"""The column of a batch, uint8 [b, s - 1, P], beside the labels where they are soft."""


@contextlib.contextmanager
def router_inputs(model: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(hidden states [s, b, h], weight [experts, h]) of every router in the order they run, on one process."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    routers = [module for module in model.modules() if type(module).__name__ == "TopKRouter"]
    assert routers, "a model without routers"
    hooks = [
        router.register_forward_hook(lambda module, given, _: seen.append((given[0].detach(), module.weight.detach())))
        for router in routers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def slow_masses(seen: Sequence[tuple[torch.Tensor, torch.Tensor]], score: str = "softmax") -> torch.Tensor:
    """[b, s, partitions] from router inputs by the definition: probabilities of all experts, averaged over layers."""
    layers = []
    for hidden, weight in seen:
        logits = torch.einsum("sbh,eh->bse", hidden.double(), weight.double())
        raised = logits.exp() if score == "softmax" else 1 / (1 + (-logits).exp())
        probability = raised / raised.sum(-1, keepdim=True)
        layers.append(torch.stack([probability[..., list(own)].sum(-1) for own in PARTITIONS.values()], -1))
    return torch.stack(layers).mean(0)


def slow_labels(masses: torch.Tensor) -> torch.Tensor:
    return masses.max(-1).indices


def slow_membership(masses: torch.Tensor) -> torch.Tensor:
    """Units of 1/255, uint8, token by token: each rounded down, one more for the largest remainders."""
    rows = []
    for mass in masses.flatten(0, -2).tolist():
        exact = [255 * value / sum(mass) for value in mass]
        units = [math.floor(value) for value in exact]
        for index in sorted(range(len(exact)), key=lambda i: units[i] - exact[i])[: 255 - sum(units)]:
            units[index] += 1
        rows.append(units)
    return torch.tensor(rows, dtype=torch.uint8).view(masses.shape)


def make_capture(policy: Policy, layers: Any = "all") -> RoutingCapture:
    experts = sum(len(own) for own in PARTITIONS.values())
    table, _ = ExpertPartitions(PARTITIONS).table(experts)
    return RoutingCapture(policy.chunks, table, layers)


def read_masses(policy: Policy, microbatches: Sequence[Mapping[str, Any]], layers: Any = "all") -> list[torch.Tensor]:
    """Masses in rows, from a forward pass over the micro-batches as the old policy's log-probs are taken."""
    capture = make_capture(policy, layers)
    with capture.watch(policy, microbatches) as watched:
        current_log_probs(watched, microbatches)
    return capture.masses()


def in_samples(values: Sequence[torch.Tensor], rows: Sequence[Rows], sizes: Sequence[int], width: int) -> torch.Tensor:
    """Values of every micro-batch in rows, [r, t, ...], as one column [b, s - 1, ...] of this rank's samples, with what
    all context-parallel ranks have; 0 where nobody has any. Micro-batch i has `sizes[i]` samples."""
    from megatron.core import parallel_state as mpu

    columns = []
    for value, entry, size in zip(values, rows, sizes, strict=True):
        columns.append(value.new_zeros(size, width, *value.shape[2:]))
        entry.put(value, columns[-1])
    column = torch.cat(columns)
    dist.all_reduce(column, group=mpu.get_context_parallel_group())
    return column


def label_batch(
    policy: Policy, rows: Sequence[Rows], batch: dict[str, torch.Tensor], axes: TokenAxes
) -> tuple[dict[str, torch.Tensor], float, bool]:
    """The global batch with this rank's labels as the capture reads them; the largest error of its masses against the
    batch's own, over all tokens of its samples; and whether all its labels are the batch's."""
    masses = read_masses(policy, [{"rows": entry} for entry in rows])
    number, width = batch["mask"].shape
    sizes = [number // axes.axis("dp").size // len(rows)] * len(rows)
    found = in_samples(masses, rows, sizes, width)
    labels = {"expert_partition": in_samples([hard_labels(mass).long() for mass in masses], rows, sizes, width)}
    if MEMBERSHIP in batch:
        labels[MEMBERSHIP] = in_samples([soft_membership(mass) for mass in masses], rows, sizes, width)
    own = slice(axes.axis("dp").rank * len(found), (axes.axis("dp").rank + 1) * len(found))
    real = torch.arange(width) < (batch["lengths"][own] - 1)[:, None]
    error = float((found - batch["masses"][own]).abs().amax(-1)[real].max())
    same = all(bool((label == batch[name][own])[real].all()) for name, label in labels.items())
    given = dict(batch)
    for name, label in labels.items():
        given[name] = torch.zeros_like(batch[name])  # the samples of others are not this rank's to read
        given[name][own] = label
    return given, error, same
