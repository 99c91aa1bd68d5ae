"""Sequences as trainers hold them, padded to [B, S], and every ratio-gating map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import F64, make_hierarchy

HIERARCHY = make_hierarchy(3)  # domain, prompt_group, trajectory


@dataclass
class Batch:
    """Sequences [B, S] with one advantage each; groups of 4 sequences, domains of 8."""

    log_ratio: Tensor
    advantage: Tensor
    mask: Tensor

    @property
    def labels(self) -> dict[str, Tensor]:
        row = torch.arange(len(self.mask)).repeat_interleave(self.mask.shape[1])
        return {"domain": row // 8, "prompt_group": row // 4, "trajectory": row}

    @property
    def cells(self) -> fpo.Cells:
        return HIERARCHY.cells(self.labels, self.mask.view(-1), shape=tuple(self.mask.shape))

    @property
    def old_log_probs(self) -> Tensor:
        """[B, S] of the old policy, such that no probability of the current one is above 1."""
        place = torch.arange(self.mask.numel()).view(self.mask.shape)
        return -0.3 * (place % 7).double() - self.log_ratio.clamp_min(0.0)

    def surrogate(self, gating, weights: str) -> fpo.Surrogate:
        cells = self.cells
        weighted = fpo.token_weights(cells, weights) * self.advantage.repeat_interleave(self.mask.shape[1])
        old = self.old_log_probs.view(-1)
        return fpo.surrogate(self.log_ratio.view(-1), weighted, cells, HIERARCHY, gating=gating, old_log_probs=old)


def make_batch(seed: int, scale: float, rows: int = 16, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask &= torch.rand(rows, length, generator=generator) > 0.1
    mask[:, 0] = True
    log_ratio = scale * torch.randn(rows, length, generator=generator, dtype=F64)
    log_ratio += scale * torch.randn(rows, 1, generator=generator, dtype=F64)
    log_ratio[::5, 0] = 0.0
    return Batch(log_ratio, torch.randn(rows, generator=generator, dtype=F64), mask)


GATINGS = [
    fpo.PpoClip(0.2, 0.28),
    fpo.PpoClip(0.2, 0.28, use_min=False),
    fpo.Gspo(0.03, 0.04),
    fpo.TrulyPpo(0.2, 0.3),
    fpo.TrulyPpo(0.2, 0.3, use_min=False),
    fpo.Apc(0.15),
    fpo.Apc(0.15, space="log"),
    fpo.Apc(0.15, stratum="domain"),
    fpo.Cispo(0.5, 0.28),
    fpo.Sapo(1.0, 1.05),
    fpo.Gmpo(0.2, 0.3),
    fpo.Gmpo(0.2, 0.3, use_min=False),
]
