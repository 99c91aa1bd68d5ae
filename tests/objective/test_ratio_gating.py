"""PPO, GRPO, GSPO, Truly-PPO and APC-Obj against independent implementations, and the invariants of every objective.

The references are written on padded [B, S] batches, as trainers hold them, with autograd for the gradient; none of them
uses code of the package.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import OBJECTIVES, prefix_state_labels
from tests.objective.cases import make_hierarchy
from tests.objective.ranks import on_ranks

F64 = torch.float64
ROOT = Path(__file__).parents[2]
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

    def surrogate(self, gating, weights: str) -> fpo.Surrogate:
        cells = self.cells
        weighted = fpo.token_weights(cells, weights) * self.advantage.repeat_interleave(self.mask.shape[1])
        return fpo.surrogate(self.log_ratio.view(-1), weighted, cells, HIERARCHY, gating=gating)


def make_batch(seed: int, scale: float, rows: int = 16, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask &= torch.rand(rows, length, generator=generator) > 0.1
    mask[:, 0] = True
    log_ratio = scale * torch.randn(rows, length, generator=generator, dtype=F64)
    log_ratio += scale * torch.randn(rows, 1, generator=generator, dtype=F64)
    log_ratio[::5, 0] = 0.0
    return Batch(log_ratio, torch.randn(rows, generator=generator, dtype=F64), mask)


# Independent implementations: (log_ratio [B, S], advantage [B], mask [B, S]) -> J


def trl_grpo(low: float, high: float, sequence: bool = False, use_min: bool = True, token_mean: bool = False):
    """TRL's GRPOTrainer._compute_loss without the KL term; `sequence` is importance_sampling_level="sequence"."""

    def loss(log_ratio, advantage, mask):
        mask = mask.double()
        log_weight = log_ratio
        if sequence:
            log_weight = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        coef_1 = torch.exp(log_weight)
        coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
        loss1, loss2 = coef_1 * advantage.unsqueeze(1), coef_2 * advantage.unsqueeze(1)
        per_token = -torch.min(loss1, loss2) if use_min else -loss2
        if sequence:
            per_token = per_token.expand(mask.shape)
        if token_mean:  # loss_type "bnpo", and "dapo" on one rank
            return -((per_token * mask).sum() / mask.sum().clamp(min=1.0))
        return -(((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean())

    return loss


def verl_ppo(low: float, high: float):
    """verl's compute_policy_loss_vanilla with loss_agg_mode="token-mean", without its dual clip."""

    def loss(log_ratio, advantage, mask):
        ratio = torch.exp(torch.clamp(log_ratio, min=-20.0, max=20.0))
        pg_losses1 = -advantage[:, None] * ratio
        pg_losses2 = -advantage[:, None] * torch.clamp(ratio, 1 - low, 1 + high)
        pg_losses = torch.maximum(pg_losses1, pg_losses2)
        return -(torch.where(mask, pg_losses, 0.0).sum() / mask.sum())

    return loss


def verl_gspo(low: float, high: float):
    """verl's compute_policy_loss_gspo: the gradient flows through each token's own log-prob."""

    def loss(log_ratio, advantage, mask):
        lengths = mask.sum(-1).clamp(min=1)
        mean = (log_ratio * mask).sum(-1) / lengths
        log_seq = log_ratio - log_ratio.detach() + mean.detach().unsqueeze(-1)
        ratio = torch.exp(torch.clamp(log_seq, max=10.0))
        pg_losses1 = -advantage[:, None] * ratio
        pg_losses2 = -advantage[:, None] * torch.clamp(ratio, 1 - low, 1 + high)
        pg_losses = torch.maximum(pg_losses1, pg_losses2)
        return -((torch.where(mask, pg_losses, 0.0).sum(-1) / lengths).mean())

    return loss


def truly_ppo(eps: float, alpha: float, use_min: bool = True):
    """The rollback function written out, and min(r A, F(r) A)."""

    def loss(log_ratio, advantage, mask):
        r, a = torch.exp(log_ratio), advantage[:, None]
        above, below = -alpha * r + (1 + alpha) * (1 + eps), -alpha * r + (1 + alpha) * (1 - eps)
        rolled = torch.where(r >= 1 + eps, above, torch.where(r <= 1 - eps, below, r))
        value = torch.minimum(r * a, rolled * a) if use_min else rolled * a
        return torch.where(mask, value, 0.0).sum() / mask.sum()

    return loss


def apc(delta: float, space: str, same: Callable[[Tensor], Tensor], token_mean: bool):
    """(58) with the pairs of tokens of a cell in a matrix; `same` makes it from the mask."""

    def loss(log_ratio, advantage, mask):
        live = mask.view(-1)
        x, a = log_ratio.reshape(-1)[live], advantage[:, None].expand(mask.shape).reshape(-1)[live]
        pairs = same(mask)
        deviation = torch.exp(x) - 1 if space == "ratio" else x
        others = (pairs - torch.eye(len(x), dtype=F64)) @ deviation.abs()
        bound = torch.relu(2 * pairs.sum(1) * delta - others)
        # (63): constant where the others use the budget up; at a deviation of 0 minimum and maximum would not say so
        clipped = torch.where(bound > 0, torch.maximum(torch.minimum(deviation, bound), -bound), 0.0)
        gated = 1 + clipped if space == "ratio" else torch.exp(clipped)
        if token_mean:
            return (a * gated).sum() / mask.sum()
        weight = (1.0 / (len(mask) * mask.sum(-1, keepdim=True).double())).expand(mask.shape).reshape(-1)[live]
        return (weight * a * gated).sum()

    return loss


def of_trajectory(mask: Tensor) -> Tensor:
    row = torch.arange(len(mask))[:, None].expand(mask.shape).reshape(-1)[mask.view(-1)]
    return (row[:, None] == row[None, :]).double()


T, G = "token_mean", "trajectory_mean"
REFERENCES = [
    ("ppo", fpo.PpoClip(0.2, 0.2), T, verl_ppo(0.2, 0.2)),
    ("ppo, no min", fpo.PpoClip(0.2, 0.2, use_min=False), T, trl_grpo(0.2, 0.2, use_min=False, token_mean=True)),
    ("grpo", fpo.PpoClip(0.2, 0.2), G, trl_grpo(0.2, 0.2)),
    ("grpo, no min", fpo.PpoClip(0.2, 0.2, use_min=False), G, trl_grpo(0.2, 0.2, use_min=False)),
    ("grpo, clip-higher", fpo.PpoClip(0.2, 0.28), G, trl_grpo(0.2, 0.28)),
    ("dapo", fpo.PpoClip(0.2, 0.28), T, trl_grpo(0.2, 0.28, token_mean=True)),
    ("gspo of trl", fpo.Gspo(3e-2, 4e-2), G, trl_grpo(3e-2, 4e-2, sequence=True)),
    ("gspo of verl", fpo.Gspo(3e-2, 4e-2), G, verl_gspo(3e-2, 4e-2)),
    ("gspo, no min", fpo.Gspo(3e-2, 4e-2, use_min=False), G, trl_grpo(3e-2, 4e-2, sequence=True, use_min=False)),
    ("truly_ppo", fpo.TrulyPpo(0.2, 0.3), T, truly_ppo(0.2, 0.3)),
    ("truly_ppo, no min", fpo.TrulyPpo(0.2, 0.3, use_min=False), T, truly_ppo(0.2, 0.3, use_min=False)),
    ("apc", fpo.Apc(0.15), G, apc(0.15, "ratio", of_trajectory, False)),
    ("apc, token mean", fpo.Apc(0.15), T, apc(0.15, "ratio", of_trajectory, True)),
    ("apc, log", fpo.Apc(0.15, space="log"), G, apc(0.15, "log", of_trajectory, False)),
]
GATINGS = [
    fpo.PpoClip(0.2, 0.28),
    fpo.PpoClip(0.2, 0.28, use_min=False),
    fpo.Gspo(0.03, 0.04),
    fpo.TrulyPpo(0.2, 0.3),
    fpo.TrulyPpo(0.2, 0.3, use_min=False),
    fpo.Apc(0.15),
    fpo.Apc(0.15, space="log"),
    fpo.Apc(0.15, stratum="domain"),
]


@pytest.mark.parametrize(
    ("gating", "weights", "reference"), [pytest.param(*entry[1:], id=entry[0]) for entry in REFERENCES]
)
@pytest.mark.parametrize("scale", (1e-3, 0.05, 0.2, 1.0))
def test_value_and_coefficients_of_an_independent_implementation(gating, weights, reference, scale: float):
    clipped = 0.0
    for seed in range(4):
        batch = make_batch(seed, scale)
        leaf = batch.log_ratio.clone().requires_grad_()
        value = reference(leaf, batch.advantage, batch.mask)
        value.backward()
        result = batch.surrogate(gating, weights)
        assert result.value == pytest.approx(value.item(), abs=1e-12)
        torch.testing.assert_close(result.coefficients, leaf.grad.view(-1), rtol=1e-12, atol=1e-12)
        clipped += result.report.clipped
    assert clipped > 0 or scale < 0.2, "the case must reach what the objective is about"


def test_ppo_by_hand():
    # low = 0.25, high = 0.5, r = (2, 2, 1/2, 1/2), w A = (1, -1, 1, -1)
    # G = min(2, 1.5), max(2, 0.75), min(.5, 1.5), max(.5, .75) = 1.5, 2, .5, .75; J = 1.5 - 2 + .5 - .75
    hierarchy = make_hierarchy(1)
    cells = hierarchy.cells({"domain": torch.zeros(4, dtype=torch.int64)})
    ell = torch.tensor([2.0, 2.0, 0.5, 0.5], dtype=F64).log()
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)
    result = fpo.surrogate(ell, weight, cells, hierarchy, gating=fpo.PpoClip(0.25, 0.5))
    assert result.value == pytest.approx(-0.75, abs=1e-15)
    assert result.coefficients.tolist() == pytest.approx([0.0, -2.0, 0.5, 0.0], abs=1e-15)
    assert result.report.clipped == 0.5
    gated = fpo.gated_ratio(ell, weight, cells, fpo.PpoClip(0.25, 0.5))
    assert gated.tolist() == pytest.approx([1.5, 2.0, 0.5, 0.75], abs=1e-15)


def test_apc_by_hand():
    # one state seen by 3 tokens, delta = 0.2: B = 1.2.  r - 1 = (1, 0.5, -0.25): the others leave 0.45, -0.05, -0.3,
    # so (62) rollback for the first, (63) zeroed for the others.  G = 1.45, 1, 1
    # dG_0 / d ell_1 = -r_1 = -1.5, dG_0 / d ell_2 = +r_2 = 0.75, and 0 for its own
    hierarchy = make_hierarchy(1)
    cells = hierarchy.cells({"domain": torch.zeros(3, dtype=torch.int64)})
    ell = torch.tensor([2.0, 1.5, 0.75], dtype=F64).log()
    weight = torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    gating = fpo.Apc(0.2, stratum="domain")
    assert fpo.gated_ratio(ell, weight, cells, gating).tolist() == pytest.approx([1.45, 1.0, 1.0], abs=1e-15)
    result = fpo.surrogate(ell, weight, cells, hierarchy, gating=gating)
    assert result.value == pytest.approx(111.45, abs=1e-13)
    assert result.coefficients.tolist() == pytest.approx([0.0, -1.5, 0.75], abs=1e-15)


def test_apc_of_a_state_seen_once_is_a_token_clip():
    batch = make_batch(3, 0.5)
    hierarchy = fpo.Hierarchy((fpo.Stratum("state", fpo.Budget(1, 1)),), 1.0)
    cells = hierarchy.cells({"state": torch.arange(batch.mask.numel())}, batch.mask.view(-1))
    gated = fpo.gated_ratio(batch.log_ratio.view(-1), batch.log_ratio.view(-1), cells, fpo.Apc(0.1, stratum="state"))
    expected = batch.log_ratio.exp().clamp(0.8, 1.2).masked_fill(~batch.mask, 1.0).view(-1)
    torch.testing.assert_close(gated, expected, rtol=0, atol=1e-15)


def test_states_of_prefixes():
    # rows 0 and 1 sample from one prompt and part at the third token; row 2 has their tokens in another group
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 8]])
    labels = prefix_state_labels(tokens, torch.tensor([0, 0, 1]))
    assert labels.shape == (3, 3) and (labels >= 0).all()
    assert labels[0, :2].tolist() == labels[1, :2].tolist()
    assert len(set(labels.flatten().tolist())) == 9 - 2
    many = prefix_state_labels(torch.randint(0, 3, (64, 400)), torch.arange(64))
    assert many.unique().numel() == many.numel()
    hierarchy = fpo.Hierarchy(tuple(fpo.Stratum(name, fpo.Budget(1, 1)) for name in ("prompt_group", "state")), 1.0)
    cells = hierarchy.cells(
        {"prompt_group": torch.tensor([0, 0, 1]).repeat_interleave(3), "state": labels.view(-1)}, shape=(3, 3)
    )
    assert sorted(cells.level("state").count_C.tolist()) == [1, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("world_size", (1, 2, 4))
def test_any_split_of_tokens_over_ranks_gives_the_single_process_result(gating, world_size: int):
    batch = make_batch(5, 0.15)
    mask, ell = batch.mask.view(-1), batch.log_ratio.view(-1)
    weight = batch.advantage.repeat_interleave(batch.mask.shape[1]) / 50
    one = fpo.surrogate(ell, weight, batch.cells, HIERARCHY, gating=gating)
    part = torch.randint(0, world_size, (len(ell),), generator=torch.Generator().manual_seed(world_size))
    part[part == 3] = 1  # of four ranks the last has no token
    tokens = [(part == rank).nonzero().squeeze(1) for rank in range(world_size)]
    cells = [HIERARCHY.cells({name: label[at] for name, label in batch.labels.items()}, mask[at]) for at in tokens]
    censuses = [held.census() for held in cells]
    shared = [held.share(censuses, rank) for rank, held in enumerate(cells)]

    def work(rank, reduce):
        at = tokens[rank]
        result = fpo.surrogate(ell[at], weight[at], shared[rank], HIERARCHY, reduce, gating)
        return result, fpo.gated_ratio(ell[at], weight[at], shared[rank], gating, reduce)

    results, meeting = on_ranks(world_size, work)
    gated = fpo.gated_ratio(ell, weight, batch.cells, gating)
    for rank, (result, ratio) in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ratio, gated[tokens[rank]], rtol=1e-13, atol=0)
        assert result.value == results[0][0].value == pytest.approx(one.value, abs=1e-13)
        assert result.report == results[0][0].report
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)
    assert all(len(sizes) == 3 for sizes in meeting.sizes), "two for the objective, one for the ratios"


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_tokens_change_no_bit(gating, bad: float):
    batch = make_batch(6, 0.3)
    expected = batch.surrogate(gating, "trajectory_mean")
    dirty = Batch(batch.log_ratio.masked_fill(~batch.mask, bad), batch.advantage, batch.mask)
    result = dirty.surrogate(gating, "trajectory_mean")
    assert torch.equal(result.coefficients, expected.coefficients)
    assert result.value == expected.value and result.report == expected.report
    assert (result.coefficients[~batch.mask.view(-1)] == 0).all()


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("field", ["log_ratio", "weighted_advantage"])
def test_non_finite_live_tokens_are_refused_on_every_rank(gating, field: str):
    cells = [
        HIERARCHY.cells(dict.fromkeys(("domain", "prompt_group", "trajectory"), torch.zeros(3, dtype=torch.int64)))
    ]
    censuses = [cells[0].census(), cells[0].census()]

    def work(rank, reduce):
        ell, weight = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
        if rank:
            (ell if field == "log_ratio" else weight)[2] = math.nan
        return fpo.surrogate(ell, weight, cells[0].share(censuses, rank), HIERARCHY, reduce, gating)

    results, meeting = on_ranks(2, work)
    assert f"{field}: nan on a live token, token 2" in str(results[1])
    assert f"{field}: 1 live tokens on another rank" in str(results[0])
    assert [len(sizes) for sizes in meeting.sizes] == [1, 1]


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("nats", [200.0, -200.0, 3e4, -3e4, 3e38])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_huge_log_ratios_give_finite_results(gating, nats: float, dtype: torch.dtype):
    batch = make_batch(7, 0.1)
    ell = batch.log_ratio.clone()
    ell[::3, 0] = nats
    batch = Batch(ell.to(dtype), batch.advantage, batch.mask)
    result = batch.surrogate(gating, "trajectory_mean")
    assert math.isfinite(result.value) and torch.isfinite(result.coefficients).all()
    assert result.coefficients.dtype == dtype
    if isinstance(gating, fpo.Apc):
        assert result.coefficients.abs().max() < 1e3
    if nats == 200.0 and gating == fpo.PpoClip(0.2, 0.28) and dtype == F64:
        expected = verl_like(batch)
        torch.testing.assert_close(result.coefficients, expected, rtol=1e-12, atol=0)


def verl_like(batch: Batch) -> Tensor:
    """PPO's coefficients of GRPO's weights without a clamp on the log-ratio: unbounded where A < 0."""
    ratio, a = batch.log_ratio.exp(), batch.advantage[:, None]
    active = torch.where(a >= 0, ratio <= 1.28, ratio >= 0.8) & batch.mask
    weight = 1.0 / (len(batch.mask) * batch.mask.sum(-1, keepdim=True).double())
    return torch.where(active, weight * a * ratio, 0.0).view(-1)


def test_apc_with_one_token_of_200_nats_keeps_the_budget_of_the_others():
    # the others of the cell drift by 0.3 in all; what is left of B for the wild token must not be lost to rounding
    hierarchy = make_hierarchy(1)
    cells = hierarchy.cells({"domain": torch.zeros(4, dtype=torch.int64)})
    ell = torch.tensor([1.1, 1.1, 0.9, 1.0], dtype=F64).log()
    ell[3] = 200.0
    gating = fpo.Apc(0.1, stratum="domain")  # B = 0.8
    gated = fpo.gated_ratio(ell, torch.ones(4, dtype=F64), cells, gating)
    assert gated.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.5], abs=1e-15)
    coefficients = fpo.surrogate(ell, torch.ones(4, dtype=F64), cells, hierarchy, gating=gating).coefficients
    assert coefficients.tolist() == pytest.approx([-1.1, -1.1, 0.9, 0.0], abs=1e-15)


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_on_policy_the_coefficients_are_the_weighted_advantages(gating):
    batch = make_batch(8, 0.0)
    cells = batch.cells
    weighted = fpo.token_weights(cells) * batch.advantage.repeat_interleave(batch.mask.shape[1])
    result = fpo.surrogate(torch.zeros_like(weighted), weighted, cells, HIERARCHY, gating=gating)
    torch.testing.assert_close(result.coefficients, fpo.on_policy_coefficients(weighted, cells), rtol=1e-15, atol=0)
    assert result.value == pytest.approx(weighted.sum().item(), abs=1e-15)


def test_the_report_is_that_of_the_hierarchys_own_gates():
    batch = make_batch(9, 0.2)
    fiberpo = batch.surrogate(None, "trajectory_mean").report.metrics()
    grpo = batch.surrogate(fpo.PpoClip(0.2, 0.2), "trajectory_mean").report.metrics()
    assert fiberpo.pop("token/clipped") != grpo.pop("token/clipped")
    assert grpo == fiberpo


def test_all_tokens_masked_and_no_tokens_at_all():
    for num in (0, 3):
        labels = dict.fromkeys(("domain", "prompt_group", "trajectory"), torch.zeros(num, dtype=torch.int64))
        cells = HIERARCHY.cells(labels, torch.zeros(num, dtype=torch.bool))
        for gating in GATINGS:
            result = fpo.surrogate(torch.full((num,), math.nan), torch.zeros(num), cells, HIERARCHY, gating=gating)
            assert torch.equal(result.coefficients, torch.zeros(num)) and result.value == 0.0
            assert all(math.isfinite(value) for value in result.report.metrics().values())


@pytest.mark.parametrize("gating", [fpo.Gspo(0.1, 0.1), fpo.Apc(0.1), fpo.Apc(0.1, stratum="state")], ids=str)
def test_a_map_that_couples_tokens_needs_its_stratum(gating):
    hierarchy = make_hierarchy(2)
    cells = hierarchy.cells({name: torch.zeros(2, dtype=torch.int64) for name in ("domain", "prompt_group")})
    args = torch.zeros(2), torch.zeros(2), cells
    with pytest.raises(ValueError, match=rf"gating.stratum: \w+ acts on the cells of '{gating.stratum}', but .*domain"):
        fpo.surrogate(*args, hierarchy, gating=gating)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fpo.PpoClip(0.0, 0.2), "low: must be finite and greater than 0"),
        (lambda: fpo.PpoClip(0.2, math.inf), "high: must be finite"),
        (lambda: fpo.PpoClip(20, 0.2), "low: must be at most 1"),
        (lambda: fpo.PpoClip(0.2, 0.2, use_min=1), "use_min: must be true or false"),
        (lambda: fpo.Gspo(0.2, -1), "high: must be finite and greater than 0"),
        (lambda: fpo.Gspo(0.2, 0.2, stratum=""), "stratum: must be the name of a stratum"),
        (lambda: fpo.TrulyPpo(0.2, 0), "alpha: must be finite and greater than 0"),
        (lambda: fpo.Apc(0), "delta: must be finite and greater than 0"),
        (lambda: fpo.Apc(0.1, space="logs"), "space: must be one of ratio, log"),
    ],
)
def test_fields_are_refused_by_name(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


# One line of YAML

SHIPPED = {
    "fiberpo": ("fiberpo", "trajectory_mean", None),
    "ppo": ("ppo", "token_mean", fpo.PpoClip(0.2, 0.2)),
    "grpo": ("grpo", "trajectory_mean", fpo.PpoClip(0.2, 0.2)),
    "dapo": ("grpo", "token_mean", fpo.PpoClip(0.2, 0.28)),
    "gspo": ("gspo", "trajectory_mean", fpo.Gspo(3e-4, 4e-4)),
    "truly_ppo": ("truly_ppo", "token_mean", fpo.TrulyPpo(0.2, 0.3)),
    "apc": ("apc", "trajectory_mean", fpo.Apc(0.05)),
    "apc_state": ("apc", "token_mean", fpo.Apc(0.05, stratum="state")),
}


def composed(*overrides: str):
    hydra = pytest.importorskip("hydra")
    launch = pytest.importorskip("nemo_fiberpo.aligner.launch")
    settings = pytest.importorskip("nemo_fiberpo.aligner.settings")
    launch.register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = hydra.compose("quickstart", ["run_dir=/nowhere", *launch.overrides(overrides)])
    return settings.algorithm_settings(cfg), launch.check_sections(cfg)[0]


def test_every_algorithm_file_is_listed():
    assert {path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml")} == set(SHIPPED)
    assert {entry[0] for entry in SHIPPED.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_objective_is_one_word_of_the_command_line(name: str):
    settings, hierarchy = composed(f"algorithm={name}", *(["hierarchy=state"] if name == "apc_state" else []))
    assert (settings.objective, settings.weights, settings.gating) == SHIPPED[name]
    assert settings.prompts_per_rollout == 96, "the other keys of the run stay"
    fpo.objective.check_gating(settings.gating, hierarchy)


def test_the_training_script_checks_an_objective(tmp_path: Path):
    pytest.importorskip("hydra")
    script = [sys.executable, str(ROOT / "examples" / "train_gpt_fiberpo.py"), "--check", "--config-name", "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for argument, said in (
        ("algorithm.gating.stratum=trajectory", ""),
        ("algorithm.gating.lo=1", "did you mean 'low'"),
    ):
        command = [*script, "algorithm=gspo", argument, f"run_dir={tmp_path}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True)
        assert (done.returncode == 0) == (not said) and said in done.stderr, done.stderr


def test_fields_of_an_objective_can_be_overridden():
    settings, _ = composed("algorithm=gspo", "algorithm.gating.high=0.01", "algorithm.weights=token_mean")
    assert settings.gating == fpo.Gspo(3e-4, 0.01) and settings.weights == "token_mean"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.objective=gsop"], ["algorithm.objective", "did you mean 'gspo'"]),
        (["algorithm.objective=grpo"], ["algorithm.gating.low: is required"]),
        (["algorithm.gating.low=0.2"], ["algorithm.gating.low", "fiberpo", "hierarchy"]),
        (["algorithm=grpo", "algorithm.gating.lo=0.2"], ["algorithm.gating.lo", "did you mean 'low'"]),
        (["algorithm=grpo", "algorithm.objective=truly_ppo"], ["algorithm.gating.low: unknown key"]),
        (["algorithm=grpo", "algorithm.gating.high=-1"], ["algorithm.gating.high", "greater than 0"]),
        (["algorithm=grpo", "algorithm.gating=3"], ["algorithm.gating: must be a mapping"]),
        (["algorithm=apc", "algorithm.gating.delta=0"], ["algorithm.gating.delta", "greater than 0"]),
    ],
)
def test_refusals_of_the_algorithm_section(overrides: list[str], words: list[str]):
    with pytest.raises(ValueError) as error:
        composed(*overrides)
    for word in words:
        assert word in str(error.value)


def test_maps_that_couple_tokens_refuse_a_stratum_whose_cells_share_tokens():
    experts = fpo.Stratum("experts", fpo.Budget(0.1, 0.1), join=("trajectory", "expert_partition"))
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)), experts), 0.1)
    fpo.objective.check_gating(fpo.Gspo(0.1, 0.1, stratum="experts"), hierarchy)
    fpo.objective.check_gating(fpo.Gspo(0.1, 0.1), hierarchy, soft=("expert_partition",))
    with pytest.raises(ValueError, match=r"gating.stratum: 'experts' spreads a token.*membership: hard"):
        fpo.objective.check_gating(fpo.Gspo(0.1, 0.1, stratum="experts"), hierarchy, soft=("expert_partition",))
