"""Advantages by prompt group, against loops and against numbers worked by hand."""

import statistics

import pytest
import torch

from nemo_fiberpo.aligner.rollout.advantages import ESTIMATORS, given, group_normalized, rloo


def test_group_normalized_by_hand():
    # group 7 has rewards 1, 0, 0, 1: mean 1/2, std 1/2; group 3 has 1, 4: mean 5/2, std 3/2
    rewards = torch.tensor([1.0, 1.0, 0.0, 4.0, 0.0, 1.0])
    group = torch.tensor([7, 3, 7, 3, 7, 7])
    valid = torch.ones(6, dtype=torch.bool)
    assert group_normalized(rewards, group, valid).tolist() == [1.0, -1.0, -1.0, 1.0, -1.0, 1.0]


def test_rloo_by_hand():
    # rewards 1, 0, 0: the others' means are 0, 1/2, 1/2
    rewards = torch.tensor([1.0, 0.0, 0.0])
    assert rloo(rewards, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)).tolist() == [
        1.0,
        -0.5,
        -0.5,
    ]


def by_loop(name, rewards, group, valid):
    out = []
    for i in range(len(rewards)):
        peers = [rewards[j] for j in range(len(rewards)) if group[j] == group[i] and valid[j]]
        others = [rewards[j] for j in range(len(rewards)) if group[j] == group[i] and valid[j] and j != i]
        if not valid[i]:
            out.append(0.0)
        elif name == "given":
            out.append(rewards[i])
        elif name == "rloo":
            out.append(rewards[i] - statistics.fmean(others) if others else 0.0)
        else:
            std = statistics.pstdev(peers)
            out.append((rewards[i] - statistics.fmean(peers)) / std if std > 1e-6 else 0.0)
    return out


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("seed", range(5))
def test_estimators_equal_a_loop(name, seed):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 6, (40,), generator=generator) * 1000
    rewards = torch.rand(40, generator=generator, dtype=torch.float64)
    valid = torch.rand(40, generator=generator) > 0.2
    wanted = torch.tensor(by_loop(name, rewards.tolist(), group.tolist(), valid.tolist()), dtype=torch.float64)
    torch.testing.assert_close(ESTIMATORS[name](rewards, group, valid), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_sample_without_a_reward_changes_no_other(name):
    group, valid = torch.tensor([1, 1, 1, 2]), torch.tensor([True, True, False, True])
    results = [
        ESTIMATORS[name](torch.tensor([0.0, 1.0, value, 1.0]), group, valid) for value in (0.0, 1e30, float("nan"))
    ]
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0][2] == 0.0


def test_equal_rewards_and_lone_samples_give_nothing():
    rewards, group = torch.tensor([0.7, 0.7, 0.3]), torch.tensor([0, 0, 1])
    valid = torch.ones(3, dtype=torch.bool)
    assert group_normalized(rewards, group, valid).tolist() == [0.0, 0.0, 0.0]
    assert rloo(rewards, group, valid)[2] == 0.0
    assert given(rewards, group, valid)[2].item() == pytest.approx(0.3)
