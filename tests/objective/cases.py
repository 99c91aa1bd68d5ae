"""Random batches with nested cells, and the same hierarchy for the package and for the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective import reference

NAMES = ("domain", "prompt_group", "trajectory", "segment")


@dataclass
class Case:
    """One batch: labels per stratum (coarsest first), mask, log-ratios, weighted advantages, and its hierarchy."""

    labels: dict[str, Tensor]
    mask: Tensor
    log_ratio: Tensor
    weight: Tensor
    hierarchy: fpo.Hierarchy

    @property
    def cells(self) -> fpo.Cells:
        return self.hierarchy.cells(self.labels, self.mask)

    def reference(self) -> tuple[float, Tensor, Tensor]:
        """(J, coefficients, gated log-ratios) by the slow loops; default and fixed slopes, caps, no overrides."""
        levels = []
        for stratum in self.hierarchy.active:
            pair = (stratum.budget.pos, stratum.budget.neg)
            levels.append(
                reference.Level(
                    self.labels[stratum.name].tolist(),
                    lambda cell, pair=pair: pair,
                    lambda cell, count, slope=stratum.slope: float(
                        count if slope is None else min(slope.cap, count) if isinstance(slope, fpo.SlopeCap) else slope
                    ),
                )
            )
        value, coefficients, gated = reference.objective(
            self.log_ratio.tolist(), self.weight.tolist(), self.mask.tolist(), levels, self.hierarchy.token_clip
        )
        return value, torch.tensor(coefficients, dtype=torch.float64), torch.tensor(gated, dtype=torch.float64)


def make_hierarchy(depth: int, budget: float = 0.05, clip: float = 0.04, **kwargs: object) -> fpo.Hierarchy:
    """`depth` strata with asymmetric budgets that grow towards the token."""
    strata = tuple(
        fpo.Stratum(name, fpo.Budget(budget * (1 + n), 0.6 * budget * (1 + n)), **kwargs)  # type: ignore[arg-type]
        for n, name in enumerate(NAMES[:depth])
    )
    return fpo.Hierarchy(strata, clip)


def make_case(
    depth: int, seed: int, scale: float = 0.1, num: int = 40, budget: float = 0.05, slope: object = None
) -> Case:
    """Tokens scattered over cells of a random tree, some masked, some exactly at 0, some cells of one token."""
    generator = torch.Generator().manual_seed(seed)
    finest = torch.randint(0, 12, (num,), generator=generator)
    finest[-1] = 12  # a cell of one token
    labels = {}
    for n, name in enumerate(NAMES[:depth]):
        labels[name] = 100 * n + finest // 2 ** (depth - 1 - n)
    mask = torch.rand(num, generator=generator) > 0.2
    mask[-1] = True
    ell = scale * torch.randn(num, generator=generator, dtype=torch.float64)
    # cells drift as a whole too, each on its own scale, so that every regime occurs
    ell += scale * torch.randn(13, generator=generator, dtype=torch.float64)[finest]
    ell[::9] = 0.0
    weight = torch.randn(num, generator=generator, dtype=torch.float64)
    return Case(labels, mask, ell, weight, make_hierarchy(depth, budget=budget, slope=slope))
