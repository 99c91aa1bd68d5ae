"""The partition of the experts that every token of a rollout was routed to, as columns of the rollout.

They are read with the old policy's log-probs and never change afterwards. During training, the routing of the first
pass over a minibatch is compared with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from omegaconf import DictConfig
from torch import Tensor

from nemo_fiberpo.aligner.config.model_checks import partition_table
from nemo_fiberpo.aligner.rollout.minibatch import Minibatch
from nemo_fiberpo.labelling.expert_partitions import COLUMN, ExpertPartitions
from nemo_fiberpo.megatron.routing import RoutingCapture, hard_labels, soft_membership
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import Rows

MEMBERSHIP = "expert_membership"


class ExpertLabels:
    """Reads the routers of an actor's model.

    SPMD: one per rank; samples are sharded over dp (and cp), replicated over tp and pp.
    """

    def __init__(self, partitions: ExpertPartitions, model: DictConfig, chunks: Sequence[torch.nn.Module]):
        table, self.names = partition_table(partitions, model)
        self.partitions = partitions
        self.capture = RoutingCapture(chunks, table, partitions.layers)

    def columns(self, rows: Sequence[Rows], samples: int, width: int) -> dict[str, Tensor]:
        """Columns of the captured pass: `expert_partition`, uint8 or int16 [b, s - 1], and for soft membership
        `expert_membership`, uint8 [b, s - 1, partitions]. Entry t belongs to the token at position t + 1, routed at
        position t, as its log-prob.

        SPMD: collective over tp, pp and cp; the result is the same on all of them.
        """
        masses = self.capture.masses()
        self.capture.release()
        found = {COLUMN: [hard_labels(mass) for mass in masses]}
        if self.partitions.membership == "soft":
            found[MEMBERSHIP] = [soft_membership(mass) for mass in masses]
        return {name: _in_samples(values, rows, samples, width) for name, values in found.items()}

    def changed(self, minibatch: Minibatch) -> Tensor:
        """Live tokens of this rank by their partition in the rollout, and how many of them the captured pass routes to
        another one: float64 [2, partitions]. SPMD: collective over tp and pp."""
        assert minibatch.expert_labels is not None
        counts = torch.zeros(2, len(self.names), dtype=torch.float64)
        for mass, old, mask in zip(self.capture.masses(), minibatch.expert_labels, minibatch.mask, strict=True):
            old, new = old[mask].long().cpu(), hard_labels(mass).to(mask.device)[mask].long().cpu()
            counts[0] += torch.bincount(old, minlength=len(self.names))
            counts[1] += torch.bincount(old[old != new], minlength=len(self.names))
        self.capture.release()
        return counts


def _in_samples(values: Sequence[Tensor], rows: Sequence[Rows], samples: int, width: int) -> Tensor:
    """Values of rows, [r, t, ...], as a column of samples, [b, s - 1, ...], summed over context-parallel ranks."""
    some = values[0]
    out = torch.zeros(samples, width, *some.shape[2:], dtype=torch.int32, device=torch.cuda.current_device())
    for entry, value in zip(rows, values, strict=True):
        entry.put(value, out)
    dist.all_reduce(out, group=mpu.get_context_parallel_group())  # in int32: NCCL has no int16
    return out.to(some.dtype)


def watched(
    experts: ExpertLabels | None, policy: Policy, microbatches: Sequence[Any]
) -> contextlib.AbstractContextManager[Policy]:
    """The same policy; its first pass over each micro-batch within the block is captured for `experts`, if given."""
    return contextlib.nullcontext(policy) if experts is None else experts.capture.watch(policy, microbatches)


def routing_metrics(counts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Metrics from `ExpertLabels.changed`, summed over the ranks: the share of tokens that changed their partition,
    overall and by partition, and each partition's share of the tokens."""
    live, changed = counts.tolist()
    out = {"routing/changed": sum(changed) / max(sum(live), 1.0)}
    for name, tokens, moved in zip(names, live, changed, strict=True):
        out[f"routing/share/{name}"] = tokens / max(sum(live), 1.0)
        if tokens:
            out[f"routing/changed/{name}"] = moved / tokens
    return out


def labels_of(part: Mapping[str, Tensor]) -> Tensor:
    """The hierarchy's labels for `expert_partition`: memberships if the rollout has them, else hard labels."""
    return part[MEMBERSHIP] if MEMBERSHIP in part else part[COLUMN].long()
