"""One batch of data for the tiny model, laid out as a layout wants it, and the slow reference of its objective."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.objective import Budget, Hierarchy, Stratum
from nemo_fiberpo.verification import laying_out
from nemo_fiberpo.verification.laying_out import Batch, Step, lay_out, make_policy, rows_of, share_of, split
from tests.megatron import segments
from tests.megatron.partitions import MEMBERSHIP, PARTITIONS
from tests.megatron.segments import SEGMENT, SEGMENTS
from tests.megatron.tiny import VOCAB, Layout

__all__ = ["Batch", "Step", "lay_out", "make_policy", "rows_of", "share_of", "split"]

LENGTH, SAMPLES = 12, 16
STRATA = ("domain", "prompt_group", "trajectory")
NAMES = {"domain": ["math", "code"], COLUMN: list(PARTITIONS), SEGMENT: list(SEGMENTS)}


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


def make_step(layout: Layout, batch: Batch, strata: Sequence[str], axes: TokenAxes) -> Step:
    """This rank's share of the global batch, see `laying_out.make_step`."""
    return laying_out.make_step(layout, batch, hierarchy(strata), labels_of, names(strata), axes)


def shares_of(batch: Batch, place: tuple[int, int]) -> dict[int, Fraction]:
    """A token's expert partitions and its share in each: one, or with soft membership those that have any."""
    if MEMBERSHIP in batch:
        units = batch[MEMBERSHIP][place].tolist()
        return {expert: Fraction(unit, 255) for expert, unit in enumerate(units) if unit}
    return {int(batch[COLUMN][place]) if COLUMN in batch else 0: Fraction(1)}
