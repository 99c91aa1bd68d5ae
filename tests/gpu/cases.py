"""Batches and hierarchies of every kind, the same numbers for every device and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo import Budget, Cells, Hierarchy, SlopeCap, Stratum, Surrogate, gated_log_ratio, surrogate
from nemo_fiberpo.objective.hierarchy import build_cells
from nemo_fiberpo.objective.surrogate import token_weights

DOMAINS, STATES, SKILLS = ("math", "code", "chat"), ("open", "closed"), ("recall", "reason", "write", "plan")
NAMES = {"domain": DOMAINS, "state": STATES, "expert": SKILLS, "skill": SKILLS}


@dataclass(frozen=True)
class Case:
    """A hierarchy with a batch for it; `shape` where the tokens are rows of it, else they are in any order."""

    name: str
    hierarchy: Hierarchy
    labels: Mapping[str, Tensor]
    mask: Tensor | None
    shape: tuple[int, int] | None
    log_ratio: Tensor
    weighted_advantage: Tensor
    upstream: Tensor
    use_min: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        """On a device, with log-ratios and weights in `dtype`."""
        moved = {name: label.to(device) for name, label in self.labels.items()}
        mask = None if self.mask is None else self.mask.to(device)
        values = (self.log_ratio, self.weighted_advantage, self.upstream)
        log_ratio, weighted, upstream = (value.to(device, dtype) for value in values)
        return replace(
            self, labels=moved, mask=mask, log_ratio=log_ratio, weighted_advantage=weighted, upstream=upstream
        )

    def ordered(self, order: Tensor) -> Case:
        """The same tokens in another order, no longer rows."""
        labels = {name: label[order] for name, label in self.labels.items()}
        mask = None if self.mask is None else self.mask[order]
        values = (self.log_ratio[order], self.weighted_advantage[order], self.upstream[order])
        log_ratio, weighted, upstream = values
        return replace(
            self, labels=labels, mask=mask, shape=None, log_ratio=log_ratio, weighted_advantage=weighted,
            upstream=upstream,
        )  # fmt: skip

    def cells(self) -> Cells:
        names = {name: NAMES[name] for name in self.hierarchy.columns if name in NAMES}
        return self.hierarchy.cells(self.labels, self.mask, names, self.shape)

    def surrogate(self, cells: Cells | None = None) -> Surrogate:
        cells = self.cells() if cells is None else cells
        return surrogate(self.log_ratio, self.weighted_advantage, cells, self.hierarchy, use_min=self.use_min)

    def gated(self) -> tuple[Tensor, Tensor]:
        """Gated log-ratios, and what their backward pass makes of `upstream`."""
        leaf = self.log_ratio.clone().requires_grad_()
        gated = gated_log_ratio(leaf, self.cells(), self.hierarchy)
        gated.backward(self.upstream)
        assert leaf.grad is not None
        return gated.detach(), leaf.grad


def hierarchies() -> dict[str, Hierarchy]:
    domain = Stratum("domain", Budget(0.02, 0.015), {"code": Budget(0.05, 0.02)}, slope=0.8)
    group = Stratum("prompt_group", Budget(0.03, 0.025), slope=SlopeCap(4))
    trajectory = Stratum("trajectory", Budget(0.05, 0.04), slope=SlopeCap(8))
    only = {"domain": ("math", "chat")}
    some = Stratum("state", Budget(0.01, 0.02), slope=2.0)
    joined = Stratum("trajectory_state", Budget(0.02, 0.03), join=("trajectory", "state"), only=only, min_tokens=5)
    skills = Stratum("skill", Budget(0.008, 0.01), slope=1.5, beside="domain")
    expert = Stratum("domain_expert", Budget(0.01, 0.012), join=("domain", "expert"), slope=1.5)
    clip, soft = replace(group, gate="clip"), replace(trajectory, gate="soft")
    clips = {"math": 0.02, "code": 0.06}
    return {
        "chain": Hierarchy((domain, group, trajectory), 0.04),
        "chain by token count": Hierarchy((domain, replace(trajectory, slope=None)), 0.04),
        "missing strata and floors": Hierarchy((domain, replace(group, only=only), trajectory, joined), 0.04),
        "branches and sweeps": Hierarchy((domain, group, trajectory), 0.04, (skills, some), sweeps=2),
        "soft membership": Hierarchy((domain, expert), 0.04),
        "gates and token clips": Hierarchy((domain, clip, soft), 0.04, token_clips=clips),
        "use_min": Hierarchy((domain, group, trajectory), 0.04),
        "no active stratum": Hierarchy((replace(domain, enabled=False),), 0.04),
    }


def make_case(name: str, rows: int = 24, length: int = 40) -> Case:
    """Rows are trajectories, 4 to a prompt, whose last tokens are masked; log-ratios drift with every class."""
    torch.manual_seed(20)
    num = rows * length
    row = torch.arange(rows).repeat_interleave(length)
    skill = torch.randint(0, len(SKILLS), (num,))
    labels = {
        "domain": (row // 4) % len(DOMAINS),
        "prompt_group": row // 4 + 50,
        "trajectory": row * 1_000_003 + 7,
        "state": torch.randint(0, len(STATES), (num,)),
        "skill": skill,
        "expert": _shares(num),
    }
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).view(-1)
    drift = sum(torch.randn(int(label.max()) + 1)[label] for label in (labels["domain"], row // 4, row, skill))
    # In float32 already, so that every dtype is given the same numbers.
    log_ratio = (drift * 0.02 + torch.randn(num) * 0.04).float()
    log_ratio[~mask] = float("nan")
    weights = token_weights(build_cells(["trajectory"], labels, mask))
    weighted = (weights * torch.randn(rows)[row]).float()
    hierarchy = hierarchies()[name]
    in_rows = all(column in ("domain", "prompt_group", "trajectory") for column in hierarchy.columns)
    upstream = torch.randn(num)
    return Case(
        name, hierarchy, labels, mask, (rows, length) if in_rows else None, log_ratio, weighted, upstream,
        use_min=name == "use_min",
    )  # fmt: skip


def _shares(num: int) -> Tensor:
    """Memberships of tokens in units of 1/255, some of them in one cell alone: uint8 [num, cells]."""
    cuts = torch.randint(0, 256, (num, len(SKILLS) - 1)).sort(1).values
    cuts[::3] = 255
    ends = torch.cat([torch.zeros(num, 1, dtype=torch.int64), cuts, torch.full((num, 1), 255)], 1)
    return ends.diff(dim=1).to(torch.uint8)


def difference(one: Any, other: Any) -> float:
    """Largest difference of two tensors, relative to the largest entry of the second."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).abs().max() / other.abs().max())
