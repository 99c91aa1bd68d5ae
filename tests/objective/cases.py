"""Random batches of every kind, and the same batches for the slow loops of `reference`.

make_case       a chain of nested cells
tree_case       a chain whose levels are missing in parts of the tree
branched_case   a chain with branches, see `FORMS`
expert_case     partitions of experts, hard or by shares, in the places of `PLACEMENTS`
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import SharedCells
from tests.objective import reference

F64 = torch.float64


@dataclass
class Case:
    """One batch: labels by column, int64 [T] or shares uint8 [T, Q]; mask, log-ratios, weighted advantages [T]."""

    labels: dict[str, Tensor]
    mask: Tensor
    log_ratio: Tensor
    weight: Tensor
    hierarchy: fpo.Hierarchy
    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def cells(self) -> fpo.Cells:
        return self.hierarchy.cells(self.labels, self.mask, self.names)

    def part(self, at: Tensor) -> Case:
        """Some of the tokens, by index or mask."""
        labels = {name: label[at] for name, label in self.labels.items()}
        return replace(self, labels=labels, mask=self.mask[at], log_ratio=self.log_ratio[at], weight=self.weight[at])

    def split(self, rank_T: Tensor, world_size: int) -> tuple[list[Tensor], list[SharedCells]]:
        """Token indices and shared cells of every rank; `rank_T` says which one holds a token."""
        tokens = [(rank_T == rank).nonzero().squeeze(1) for rank in range(world_size)]
        cells = [self.part(at).cells for at in tokens]
        censuses = [held.census() for held in cells]
        return tokens, [held.share(censuses, rank) for rank, held in enumerate(cells)]

    def surrogate(self, **kwargs: Any) -> fpo.Surrogate:
        return fpo.surrogate(self.log_ratio, self.weight, self.cells, self.hierarchy, **kwargs)

    def reference(self, use_min: bool = False) -> tuple[float, Tensor, Tensor]:
        """J, coefficients and gated log-ratios by the slow loops."""
        labels = {name: label.tolist() for name, label in self.labels.items()}
        tokens = (value.tolist() for value in (self.log_ratio, self.weight, self.mask))
        out = reference.evaluate(self.hierarchy, labels, *tokens, self.names, use_min)
        return out.value, torch.tensor(out.coefficients, dtype=F64), torch.tensor(out.gated, dtype=F64)


def stratum(name: str, pos: float = 0.05, *parts: str, **kwargs: Any) -> fpo.Stratum:
    """With budgets C+ = pos and C- = 0.7 pos; a join of `parts`."""
    return fpo.Stratum(name, fpo.Budget(pos, 0.7 * pos), join=parts, **kwargs)


def with_gates(hierarchy: fpo.Hierarchy, *gates: Any) -> fpo.Hierarchy:
    """The hierarchy with these gates in turn."""
    entries = [*hierarchy.strata, *hierarchy.branches]
    gated = tuple(replace(entry, gate=gates[at % len(gates)]) for at, entry in enumerate(entries))
    num = len(hierarchy.strata)
    return replace(hierarchy, strata=gated[:num], branches=gated[num:])


def with_floor(hierarchy: fpo.Hierarchy, floor: int | None) -> fpo.Hierarchy:
    """The hierarchy with a floor in every stratum of the chain but the coarsest."""
    first, *finer = hierarchy.strata
    return replace(hierarchy, strata=(first, *(replace(entry, min_tokens=floor) for entry in finer)))


# Chains

CHAIN = ("domain", "prompt_group", "trajectory", "segment")


def make_hierarchy(depth: int, budget: float = 0.05, clip: float = 0.04, **kwargs: Any) -> fpo.Hierarchy:
    """`depth` strata with asymmetric budgets that grow towards the token."""
    budgets = (fpo.Budget(budget * (1 + n), 0.6 * budget * (1 + n)) for n in range(depth))
    strata = (fpo.Stratum(name, pair, **kwargs) for name, pair in zip(CHAIN, budgets, strict=False))
    return fpo.Hierarchy(tuple(strata), clip)


def make_case(
    depth: int, seed: int, scale: float = 0.1, num: int = 40, budget: float = 0.05, slope: Any = None
) -> Case:
    """Tokens scattered over cells of a random tree, some masked, some exactly at 0, some cells of one token."""
    generator = torch.Generator().manual_seed(seed)
    finest = torch.randint(0, 12, (num,), generator=generator)
    finest[-1] = 12  # a cell of one token
    labels = {}
    for n, name in enumerate(CHAIN[:depth]):
        labels[name] = 100 * n + finest // 2 ** (depth - 1 - n)
    mask = torch.rand(num, generator=generator) > 0.2
    mask[-1] = True
    ell = scale * torch.randn(num, generator=generator, dtype=F64)
    # cells drift as a whole too, each on its own scale, so that every regime occurs
    ell += scale * torch.randn(13, generator=generator, dtype=F64)[finest]
    ell[::9] = 0.0
    weight = torch.randn(num, generator=generator, dtype=F64)
    return Case(labels, mask, ell, weight, make_hierarchy(depth, budget=budget, slope=slope))


# Trees

TREE_NAMES = {"domain": ["code", "math", "prose"], "modality": ["image", "text"]}


def tree_labels(num: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trajectory = torch.randint(0, 12, (num,), generator=generator)
    group = trajectory // 2
    return {
        "domain": group // 2,
        "modality": torch.tensor([0, 1, 1, 1, 0, 1])[group],
        "topic": torch.tensor([4, 5, 6, 6, -1, -1])[group],
        "prompt_group": group,
        "trajectory": trajectory,
    }


def tree_case(seed: int, scale: float = 0.06, num: int = 60) -> Case:
    """Topics in code and math alone, groups in prose alone, trajectories in math and prose alone."""
    hierarchy = fpo.Hierarchy(
        (
            stratum("domain", 0.02, slope=0.5),
            stratum("topic", 0.03, slope=0.5, only={"domain": ["code", "math"]}),
            stratum("prompt_group", 0.03, slope=0.5, only={"domain": ["prose"]}),
            stratum("trajectory", 0.04, slope=0.5, only={"domain": ["prose", "math"]}),
        ),
        0.04,
    )
    labels, generator = tree_labels(num, seed), torch.Generator().manual_seed(seed)
    ell = scale * torch.randn(num, generator=generator, dtype=F64)
    ell += scale * torch.randn(12, generator=generator, dtype=F64)[labels["trajectory"]]
    weight, mask = torch.randn(num, generator=generator, dtype=F64), torch.rand(num, generator=generator) > 0.2
    return Case(labels, mask, ell, weight, hierarchy, TREE_NAMES)


# Branches

DOMAIN, GROUP, TRAJECTORY = stratum("domain", 0.03), stratum("prompt_group", 0.05), stratum("trajectory", 0.08)
# an expert per token, and a modality per prompt: the one is no function of the trajectory, the other is
EXPERT, MODALITY = stratum("expert", 0.02, slope=2.5), stratum("modality", 0.02)
BESIDE_DOMAIN = replace(MODALITY, beside="domain")
FORMS = {
    "after": ((DOMAIN, GROUP, TRAJECTORY), (EXPERT,), 1),
    "after, swept three times": ((DOMAIN, TRAJECTORY), (EXPERT,), 3),
    "two after": ((DOMAIN, TRAJECTORY), (EXPERT, stratum("parity", 0.03)), 2),
    "beside the coarsest": ((DOMAIN, GROUP, TRAJECTORY), (BESIDE_DOMAIN,), 1),
    "beside the coarsest, swept": ((DOMAIN, GROUP, TRAJECTORY), (BESIDE_DOMAIN,), 3),
    "in two places": ((DOMAIN, GROUP, TRAJECTORY), (EXPERT, BESIDE_DOMAIN), 2),
    "two classifications alone": ((DOMAIN,), (MODALITY,), 2),
    "a chain with a join": ((DOMAIN, stratum("both", 0.04, "domain", "modality"), TRAJECTORY), (EXPERT,), 1),
}


def branched_case(form: str, seed: int, scale: float = 0.05, slope: float | None = 0.5) -> Case:
    """Scattered tokens, some masked, some at 0; trajectories, modalities and experts drift as wholes too."""
    num, generator = 40, torch.Generator().manual_seed(seed)
    trajectory = torch.randint(0, 8, (num,), generator=generator)
    group = trajectory // 2
    labels = {
        "domain": group // 2,
        "prompt_group": group,
        "trajectory": trajectory,
        "modality": torch.tensor([0, 1, 1, 2])[group],
        "expert": torch.randint(0, 3, (num,), generator=generator),
        "parity": torch.arange(num) % 2,
    }
    ell = scale * torch.randn(num, generator=generator, dtype=F64)
    for name in ("trajectory", "modality", "expert"):
        ell += scale * torch.randn(8, generator=generator, dtype=F64)[labels[name]]
    ell[::9] = 0.0
    mask = torch.rand(num, generator=generator) > 0.2
    weight = torch.randn(num, generator=generator, dtype=F64)
    chain, branches, sweeps = FORMS[form]
    chain = tuple(replace(entry, slope=entry.slope or slope) for entry in chain)
    return Case(labels, mask, ell, weight, fpo.Hierarchy(chain, 0.04, branches, sweeps))


# Partitions of experts

EXPERT_NAMES = {"domain": ["code", "math"], "expert_partition": ["low", "mid", "high"]}
PARTITION = stratum("expert_partition", 0.02)
DOMAIN_PARTITION = stratum("domain_expert", 0.025, "domain", "expert_partition")
GROUP_PARTITION = stratum("group_expert", 0.03, "prompt_group", "expert_partition")
TRAJECTORY_PARTITION = stratum("trajectory_expert", 0.05, "trajectory", "expert_partition")
PLAIN = (stratum("domain", 0.02), stratum("prompt_group", 0.03), stratum("trajectory", 0.04))
PLACEMENTS: dict[str, tuple[tuple[fpo.Stratum, ...], tuple[fpo.Stratum, ...]]] = {
    "P0": ((TRAJECTORY_PARTITION,), ()),
    "P1": ((*PLAIN, TRAJECTORY_PARTITION), ()),
    "P2": ((PARTITION, DOMAIN_PARTITION, GROUP_PARTITION, TRAJECTORY_PARTITION), ()),
    "P3": ((PLAIN[0], DOMAIN_PARTITION, GROUP_PARTITION, TRAJECTORY_PARTITION), ()),
    "P3'": ((*PLAIN[:2], GROUP_PARTITION, TRAJECTORY_PARTITION), ()),
    "P4": (PLAIN, (PARTITION,)),
}


def one_hot(label: Tensor, parts: int) -> Tensor:
    """Labels as shares."""
    return (reference.UNITS * torch.nn.functional.one_hot(label, parts)).to(torch.uint8)


def expert_case(
    placement: str,
    seed: int,
    scale: float = 0.05,
    soft: bool = False,
    slope: float | None = 0.5,
    floor: int | None = None,
    parts: int = 3,
) -> Case:
    """Partitions, trajectories and trajectories' partitions drift as wholes; `floor` is for every stratum but the
    coarsest. Where it is soft, some tokens are in one partition alone, some in two, some in all."""
    num, generator = 48, torch.Generator().manual_seed(seed)
    trajectory = torch.randint(0, 8, (num,), generator=generator)
    group = trajectory // 2
    expert = torch.randint(0, parts, (num,), generator=generator)
    column = one_hot(expert, parts) if soft else expert
    if soft and parts == 3:
        rows = [torch.tensor([[100, 0, 155], [17, 211, 27], [0, 255, 0]][i % 3]).roll(i // 3) for i in range(num)]
        column = torch.stack(rows).to(torch.uint8)
    ell = scale * torch.randn(num, generator=generator, dtype=F64)
    ell += scale * torch.randn(8, generator=generator, dtype=F64)[trajectory]
    ell += scale * torch.randn(parts, generator=generator, dtype=F64)[expert]
    ell += scale * torch.randn(8, parts, generator=generator, dtype=F64)[trajectory, expert]
    ell[::9] = 0.0
    mask = torch.rand(num, generator=generator) > 0.2
    weight = torch.randn(num, generator=generator, dtype=F64)
    labels = {"domain": group // 2, "prompt_group": group, "trajectory": trajectory, "expert_partition": column}
    chain, branches = (tuple(replace(entry, slope=slope) for entry in listed) for listed in PLACEMENTS[placement])
    hierarchy = fpo.Hierarchy(chain, 0.04, branches)
    names = EXPERT_NAMES if parts == 3 else {**EXPERT_NAMES, "expert_partition": ["all"]}
    return Case(labels, mask, ell, weight, with_floor(hierarchy, floor) if floor else hierarchy, names)
