"""Random batches whose tokens are in partitions of experts, hard or by shares, and the placements of section 8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective import expert_reference

F64 = torch.float64
NUM, PARTS, EPS = 48, 3, 0.04
NAMES = {"domain": ["code", "math"], "expert_partition": ["low", "mid", "high"]}


def stratum(name: str, pos: float, *parts: str, **kwargs: Any) -> fpo.Stratum:
    return fpo.Stratum(name, fpo.Budget(pos, 0.7 * pos), join=parts, **kwargs)


DOMAIN, GROUP, TRAJECTORY = stratum("domain", 0.02), stratum("prompt_group", 0.03), stratum("trajectory", 0.04)
EXPERT = stratum("expert_partition", 0.02)
DOMAIN_EXPERT = stratum("domain_expert", 0.025, "domain", "expert_partition")
GROUP_EXPERT = stratum("group_expert", 0.03, "prompt_group", "expert_partition")
TRAJECTORY_EXPERT = stratum("trajectory_expert", 0.05, "trajectory", "expert_partition")
PLACEMENTS: dict[str, tuple[tuple[fpo.Stratum, ...], tuple[fpo.Stratum, ...]]] = {
    "P0": ((TRAJECTORY_EXPERT,), ()),
    "P1": ((DOMAIN, GROUP, TRAJECTORY, TRAJECTORY_EXPERT), ()),
    "P2": ((EXPERT, DOMAIN_EXPERT, GROUP_EXPERT, TRAJECTORY_EXPERT), ()),
    "P3": ((DOMAIN, DOMAIN_EXPERT, GROUP_EXPERT, TRAJECTORY_EXPERT), ()),
    "P3'": ((DOMAIN, GROUP, GROUP_EXPERT, TRAJECTORY_EXPERT), ()),
    "P4": ((DOMAIN, GROUP, TRAJECTORY), (EXPERT,)),
}


@dataclass
class Case:
    """`share` are the shares of partitions, in units of 1/255; `soft` says whether they are given as such."""

    labels: dict[str, Tensor]
    share: Tensor
    mask: Tensor
    log_ratio: Tensor
    weight: Tensor
    hierarchy: fpo.Hierarchy
    soft: bool

    def given(self, at: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """The labels as the package takes them, of the tokens `at`."""
        column = self.share.to(torch.uint8) if self.soft else self.share.argmax(1)
        return {name: label[at] for name, label in {**self.labels, "expert_partition": column}.items()}

    @property
    def cells(self) -> fpo.Cells:
        cells = self.hierarchy.cells(self.given(), self.mask, NAMES)
        return cells.share([cells.census()], 0)

    def surrogate(self, **kwargs: Any) -> fpo.Surrogate:
        return fpo.surrogate(self.log_ratio, self.weight, self.cells, self.hierarchy, **kwargs)

    def reference(self) -> tuple[float, Tensor, Tensor]:
        """(J, coefficients, gated log-ratios) by the slow loops over the formulas of section 8."""

        def level(stratum: fpo.Stratum) -> expert_reference.Level:
            columns = [name for name in stratum.columns if name != "expert_partition"]
            table = [self.labels[name].tolist() for name in columns]

            def cell(i: int, e: int) -> tuple[int, ...]:
                own = (e,) if "expert_partition" in stratum.columns else ()
                return (*(column[i] for column in table), *own)

            assert stratum.slope is None or isinstance(stratum.slope, float)
            pair = (stratum.budget.pos, stratum.budget.neg)
            return expert_reference.Level(cell, pair, stratum.slope, stratum.min_tokens or 0)

        share = (self.share.double() / 255.0).tolist()
        chain = [level(stratum) for stratum in self.hierarchy.strata]
        branch = level(self.hierarchy.branches[0]) if self.hierarchy.branches else None
        value, coefficients, gated = expert_reference.objective(
            self.log_ratio.tolist(), self.weight.tolist(), self.mask.tolist(), share, chain, branch, EPS
        )
        return value, torch.tensor(coefficients, dtype=F64), torch.tensor(gated, dtype=F64)


def make_case(
    placement: str,
    seed: int,
    scale: float = 0.05,
    soft: bool = False,
    slope: float | None = 0.5,
    floor: int | None = None,
    parts: int = PARTS,
) -> Case:
    """Partitions, trajectories and trajectories' partitions drift as wholes; `floor` is for every stratum but the
    coarsest. Where it is soft, some tokens are in one partition alone, some in two, some in all."""
    generator = torch.Generator().manual_seed(seed)
    trajectory = torch.randint(0, 8, (NUM,), generator=generator)
    group = trajectory // 2
    expert = torch.randint(0, parts, (NUM,), generator=generator)
    share = 255 * torch.nn.functional.one_hot(expert, parts)
    if soft and parts == PARTS:
        for i in range(NUM):
            share[i] = torch.tensor([[100, 0, 155], [17, 211, 27], [0, 255, 0]][i % 3]).roll(i // 3)
    ell = scale * torch.randn(NUM, generator=generator, dtype=F64)
    ell += scale * torch.randn(8, generator=generator, dtype=F64)[trajectory]
    ell += scale * torch.randn(parts, generator=generator, dtype=F64)[expert]
    ell += scale * torch.randn(8, parts, generator=generator, dtype=F64)[trajectory, expert]
    ell[::9] = 0.0
    chain, branches = (tuple(replace(entry, slope=slope) for entry in strata) for strata in PLACEMENTS[placement])
    if floor:
        chain = (chain[0], *(replace(s, min_tokens=floor) for s in chain[1:]))
    return Case(
        labels={"domain": group // 2, "prompt_group": group, "trajectory": trajectory},
        share=share,
        mask=torch.rand(NUM, generator=generator) > 0.2,
        log_ratio=ell,
        weight=torch.randn(NUM, generator=generator, dtype=F64),
        hierarchy=fpo.Hierarchy(chain, EPS, branches),
        soft=soft,
    )
