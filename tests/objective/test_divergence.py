"""Estimators of A.3 by hand, and the identities between them: (36)-(38), (42), (50)-(52)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nemo_fiberpo.diagnostics.divergence import (
    KINDS,
    cell_divergence,
    kl_divergence,
    kl_estimate,
    max_divergence,
    mean_divergence,
    token_divergence,
    total_variation,
    trajectory_divergence,
    tv_estimate,
)

F = {"tv": lambda r: abs(r - 1.0) / 2.0, "kl": lambda r: -math.log(r)}


def policies(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """An old and a new policy over the last axis."""
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.rand(2, *shape, generator=generator, dtype=torch.float64) + 0.05
    return old / old.sum(-1, keepdim=True), new / new.sum(-1, keepdim=True)


def test_equations_34_and_35_by_hand():
    old = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    new = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    assert total_variation(old, new).tolist() == [0.25]
    assert kl_divergence(old, new).tolist() == pytest.approx([0.5 * math.log(2.0)], abs=1e-16)


@pytest.mark.parametrize("seed", range(5))
def test_36_pinsker_and_the_ratio_forms_37_and_38(seed: int):
    old, new = policies(seed, 4, 6)
    log_ratio = (new / old).log()
    for kind, exact in (("tv", total_variation(old, new)), ("kl", kl_divergence(old, new))):
        by_ratio = (old * token_divergence(log_ratio, kind)).sum(-1)
        torch.testing.assert_close(by_ratio, exact, rtol=0, atol=1e-15)
    assert (total_variation(old, new) <= (kl_divergence(old, new) / 2.0).sqrt()).all()


def test_estimates_39_40_42_44_51_by_hand():
    # ratios 2 and 1/2 in state 7 and trajectory 0, ratio 4 in state 3 and trajectory 1, and a masked token
    ell = torch.tensor([2.0, 0.5, 4.0, 9.0], dtype=torch.float64).log()
    state = torch.tensor([7, 7, 3, 3])
    trajectory = torch.tensor([0, 0, 1, 1])
    mask = torch.tensor([True, True, True, False])
    tv = cell_divergence(ell, state, "tv", mask)
    assert tv.label_C.tolist() == [3, 7] and tv.count_C.tolist() == [1, 2]
    assert tv.value_C.tolist() == pytest.approx([1.5, 0.375], abs=1e-15)
    assert max_divergence(ell, state, "tv", mask).item() == pytest.approx(1.5, abs=1e-15)
    assert mean_divergence(ell, "tv", mask).item() == pytest.approx(0.75, abs=1e-15)
    assert trajectory_divergence(ell, trajectory, "tv", mask).item() == pytest.approx(0.9375, abs=1e-15)
    log_2 = math.log(2.0)
    assert cell_divergence(ell, state, "kl", mask).value_C.tolist() == pytest.approx([-2.0 * log_2, 0.0], abs=1e-15)
    assert max_divergence(ell, state, "kl", mask).item() == pytest.approx(0.0, abs=1e-15)
    assert mean_divergence(ell, "kl", mask).item() == pytest.approx(-2.0 * log_2 / 3.0, abs=1e-15)
    assert trajectory_divergence(ell, trajectory, "kl", mask).item() == pytest.approx(-log_2, abs=1e-15)


def sample(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, states and trajectories of 30 tokens; trajectories of different lengths, states they share."""
    generator = torch.Generator().manual_seed(seed)
    ell = 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    state = torch.randint(0, 6, (30,), generator=generator)
    trajectory = torch.randint(0, 4, (30,), generator=generator)
    return ell, state, trajectory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_42_is_the_states_estimates_weighed_by_their_tokens(kind: str, seed: int):
    ell, state, _ = sample(seed)
    cells = cell_divergence(ell, state, kind)
    by_state = (cells.count_C * cells.value_C).sum() / 30.0
    torch.testing.assert_close(mean_divergence(ell, kind), by_state, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_52_is_the_trajectories_estimates_weighed_by_their_lengths(kind: str, seed: int):
    ell, _, trajectory = sample(seed)
    cells = cell_divergence(ell, trajectory, kind)
    by_length = (cells.count_C * cells.value_C).sum() / 30.0
    torch.testing.assert_close(mean_divergence(ell, kind), by_length, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_51_weighs_every_token_by_one_over_trajectories_and_length(kind: str, seed: int):
    ell, _, trajectory = sample(seed)
    length = torch.bincount(trajectory)
    expected = sum(
        F[kind](math.exp(x)) / int(length[t]) for x, t in zip(ell.tolist(), trajectory.tolist(), strict=True)
    )
    got = trajectory_divergence(ell, trajectory, kind).item()
    assert got == pytest.approx(expected / int((length > 0).sum()), abs=1e-15)


def both_sides_of_50(kind: str, stops_early: bool) -> tuple[float, float]:
    """E_tau[D_tau] and E_{d^T}[D(s)], over all trajectories of the old policy, d^T(s) = E[(1/T) sum_t 1(s_t = s)].

    Two prompts, two actions: a tree of 3 steps (states 0; 1, 2; 3 to 6) and one of 2 steps (states 7; 8, 9). With
    `stops_early`, action 1 in state 0 ends the trajectory after the next step.
    """
    old, new = policies(3, 10, 2)
    exact = {"tv": total_variation, "kl": kl_divergence}[kind](old, new)
    trajectories = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        length = 2 if stops_early and a == 1 else 3
        if length == 3 or c == 0:
            trajectories.append([(0, a), (1 + a, b), (3 + 2 * a + b, c)][:length])
        if c == 0:
            trajectories.append([(7, a), (8 + a, b)])
    mean, occupancy = 0.0, torch.zeros(10, dtype=torch.float64)
    for steps in trajectories:
        chance = 0.5 * math.prod(old[at].item() for at in steps)
        ell = torch.stack([(new[at] / old[at]).log() for at in steps])
        mean += chance * trajectory_divergence(ell, torch.zeros(len(steps), dtype=torch.int64), kind).item()
        for state, _ in steps:
            occupancy[state] += chance / len(steps)
    assert occupancy.sum().item() == pytest.approx(1.0, abs=1e-15)
    return mean, (occupancy * exact).sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_50_the_trajectories_mean_is_that_of_the_state_distribution_45_46(kind: str):
    """Where the length of a trajectory depends on its prompt alone."""
    by_trajectory, by_state = both_sides_of_50(kind, stops_early=False)
    assert by_trajectory == pytest.approx(by_state, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_50_does_not_hold_where_actions_decide_the_length(kind: str):
    """1 / T then depends on the action, so that the weighted actions of a state are no longer those of the policy."""
    by_trajectory, by_state = both_sides_of_50(kind, stops_early=True)
    assert abs(by_trajectory - by_state) > 0.005


@pytest.mark.parametrize("seed", range(3))
def test_49_and_48_are_read_from_the_channel_means(seed: int):
    """KL_tau = log s^- - log s^+ exactly; TV_tau = (log s^+ + log s^-) / 2 up to the square of the log-ratio."""
    ell, _, trajectory = sample(seed)
    ell = 1e-3 * ell
    kl, tv = cell_divergence(ell, trajectory, "kl"), cell_divergence(ell, trajectory, "tv")
    for at, label in enumerate(kl.label_C.tolist()):
        own = ell[trajectory == label]
        mean = torch.stack([own.clamp_min(0.0).mean(), own.clamp_max(0.0).mean()])
        assert kl.value_C[at].item() == pytest.approx(kl_estimate(mean).item(), abs=1e-18)
        assert tv.value_C[at].item() == pytest.approx(tv_estimate(mean).item(), abs=own.square().max().item())


def test_nothing_sampled_is_zero():
    none, label, mask = torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    for kind in KINDS:
        assert mean_divergence(none, kind, mask).item() == 0.0
        assert max_divergence(none, label, kind, mask).item() == 0.0
        assert trajectory_divergence(none, label, kind, mask).item() == 0.0


def test_refusals_name_the_argument():
    ell, label = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="kind: unknown divergence 'lk'; did you mean 'kl'"):
        token_divergence(ell, "lk")
    with pytest.raises(ValueError, match=r"label: must be torch.int64 .* \[3\], got torch.int64 \[2\]"):
        cell_divergence(ell, label[:2], "kl")
    with pytest.raises(ValueError, match="mask: must be torch.bool"):
        mean_divergence(ell, "kl", label)
