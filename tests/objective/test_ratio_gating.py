"""PPO, GRPO, GSPO, Truly-PPO and APC-Obj against independent implementations, and by hand.

The references are written on padded [B, S] batches, as trainers hold them, with autograd for the gradient; none of them
uses code of the package.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import prefix_state_labels
from tests.objective.cases import F64, make_hierarchy
from tests.objective.padded_batches import make_batch

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
