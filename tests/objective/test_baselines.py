"""CISPO, SAPO, DPPO-TV and GMPO against independent implementations, and by hand.

The references are written on padded [B, S] batches with log-probs of both policies, as trainers hold them, and with
autograd; none of them uses code of the package. What all maps have in common is in test_ratio_gating_invariants.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import F64, make_hierarchy
from tests.objective.padded_batches import HIERARCHY, Batch, make_batch
from tests.objective.ranks import on_ranks

# (log-probs, old log-probs, advantage [B, 1], mask), the first three [B, S] -> J per token before any weight


def with_log_prob(weight: Tensor, log_prob: Tensor) -> Tensor:
    """A weight without gradient times log pi, of which the value counts as 1."""
    return weight.detach() * (1 + log_prob - log_prob.detach())


def cispo(low: float, high: float):
    def per_token(log_prob, old, advantage, mask):
        ratio = torch.exp(log_prob - old)
        return advantage * with_log_prob(torch.clamp(ratio, 1 - low, 1 + high), log_prob)

    return per_token


def sapo(tau_pos: float, tau_neg: float):
    def per_token(log_prob, old, advantage, mask):
        tau = (advantage > 0).double() * tau_pos + (advantage <= 0).double() * tau_neg
        gate = 4 / tau / (1 + torch.exp(-tau * (torch.exp(log_prob - old) - 1)))
        return advantage * (gate - 2 / tau + 1)

    return per_token


def dppo_tv(delta: float, cap: float):
    def per_token(log_prob, old, advantage, mask):
        kept = torch.sign(advantage) * (torch.exp(log_prob) - torch.exp(old)) <= delta
        return advantage * with_log_prob(kept * torch.clamp(torch.exp(log_prob - old), max=cap), log_prob)

    return per_token


def gmpo(low: float, high: float, use_min: bool = True):
    def per_token(log_prob, old, advantage, mask):
        x, sign = log_prob - old, torch.sign(advantage)
        clipped = torch.clamp(x, -low, high)
        kept = sign * torch.minimum(sign * x, sign * clipped) if use_min else clipped
        mean = torch.where(mask, kept, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return (advantage * torch.exp(mean)).expand(mask.shape)

    return per_token


def objective(per_token: Tensor, mask: Tensor, weights: str) -> Tensor:
    live = torch.where(mask, per_token, 0.0)
    return live.sum() / mask.sum() if weights == "token_mean" else (live.sum(1) / mask.sum(1)).mean()


REFERENCES = [
    ("cispo", fpo.Cispo(0.3, 0.28), "token_mean", cispo(0.3, 0.28)),
    ("cispo, no lower clip", fpo.Cispo(1.0, 0.1), "token_mean", cispo(1.0, 0.1)),
    ("sapo", fpo.Sapo(1.0, 1.05), "trajectory_mean", sapo(1.0, 1.05)),
    ("sapo, steep", fpo.Sapo(3.0, 5.0), "trajectory_mean", sapo(3.0, 5.0)),
    ("dppo_tv", fpo.DppoTv(0.05, 1.3), "token_mean", dppo_tv(0.05, 1.3)),
    ("dppo_tv, narrow", fpo.DppoTv(0.01, 20.0), "trajectory_mean", dppo_tv(0.01, 20.0)),
    ("gmpo", fpo.Gmpo(0.2, 0.3), "trajectory_mean", gmpo(0.2, 0.3)),
    ("gmpo, no min", fpo.Gmpo(0.2, 0.3, use_min=False), "trajectory_mean", gmpo(0.2, 0.3, use_min=False)),
]


@pytest.mark.parametrize(
    ("gating", "weights", "reference"), [pytest.param(*entry[1:], id=entry[0]) for entry in REFERENCES]
)
@pytest.mark.parametrize("scale", (1e-3, 0.05, 0.2, 1.0))
def test_value_and_coefficients_of_an_independent_implementation(gating, weights, reference, scale: float):
    clipped = 0.0
    for seed in range(4):
        batch = make_batch(seed, scale)
        leaf = (batch.old_log_probs + batch.log_ratio).requires_grad_()
        per_token = reference(leaf, batch.old_log_probs, batch.advantage[:, None], batch.mask)
        value = objective(per_token, batch.mask, weights)
        value.backward()
        result = batch.surrogate(gating, weights)
        assert result.value == pytest.approx(value.item(), abs=1e-12)
        torch.testing.assert_close(result.coefficients, leaf.grad.view(-1), rtol=1e-11, atol=1e-13)
        clipped += result.report.clipped
    assert (clipped > 0) == (not isinstance(gating, fpo.Sapo)) or scale < 0.2, "the case must reach the clip"


def evaluate(ratio: list[float], weight: list[float], gating, old: list[float]) -> tuple[fpo.Surrogate, list[float]]:
    """Tokens of one cell, `domain`; old are probabilities."""
    hierarchy = make_hierarchy(1)
    cells = hierarchy.cells({"domain": torch.zeros(len(ratio), dtype=torch.int64)})
    ell, weighted, before = (torch.tensor(values, dtype=F64) for values in (ratio, weight, old))
    given = {"gating": gating, "old_log_probs": before.log()}
    gated = fpo.gated_ratio(ell.log(), weighted, cells, **given)
    return fpo.surrogate(ell.log(), weighted, cells, hierarchy, **given), gated.tolist()


def test_dppo_tv_by_hand():
    # pi - pi_old = 0.1, 0.1, 0.4, -0.2, -0.4, 0.3 with delta = 0.25 and cap = 1.5: the third rises too far with A > 0,
    # the fifth falls too far with A < 0; the sixth rises with A < 0, which is never dropped, and is cut at 1.5
    result, gated = evaluate(
        ratio=[2.0, 2.0, 3.0, 0.5, 0.2, 4.0],
        weight=[1.0, -1.0, 1.0, -1.0, -1.0, -1.0],
        gating=fpo.DppoTv(0.25, 1.5),
        old=[0.1, 0.1, 0.2, 0.4, 0.5, 0.1],
    )
    assert gated == pytest.approx([1.5, 1.5, 0.0, 0.5, 0.0, 1.5], abs=1e-15)
    assert result.coefficients.tolist() == pytest.approx([1.5, -1.5, 0.0, -0.5, 0.0, -1.5], abs=1e-15)
    assert result.value == pytest.approx(1.5 - 1.5 - 0.5 - 1.5, abs=1e-15)
    assert result.report.clipped == 5 / 6


def test_gmpo_by_hand():
    # w A = 1: ell = log 4 is cut at log 2, log 1/2 is not. G = exp((log 2 + log 1/2 + log 1) / 3) = 1, so dG / d ell is
    # 1/3 for the two that are not cut, and three tokens have G
    gating = fpo.Gmpo(math.log(4), math.log(2), stratum="domain")
    result, gated = evaluate([4.0, 0.5, 1.0], [1.0, 1.0, 1.0], gating, [0.1, 0.1, 0.1])
    assert gated == pytest.approx([1.0] * 3, abs=1e-15)
    assert result.coefficients.tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-15)
    assert result.report.clipped == pytest.approx(1 / 3)


def test_cispo_keeps_a_gradient_where_ppo_has_none():
    result, gated = evaluate([2.0, 0.25], [1.0, -1.0], fpo.Cispo(0.5, 0.5), [0.1, 0.1])
    assert gated == [1.5, 0.5] and result.coefficients.tolist() == [1.5, -0.5]
    ppo, _ = evaluate([2.0, 0.25], [1.0, -1.0], fpo.PpoClip(0.5, 0.5), [0.1, 0.1])
    assert ppo.coefficients.tolist() == [0.0, 0.0]


def test_sapo_is_half_as_steep_at_its_half_width():
    # 4 s (1 - s) = 1/2 at the sigmoid s = (2 + sqrt 2) / 4, that is at tau (r - 1) = log((2 + sqrt 2) / (2 - sqrt 2))
    width = math.log((2 + math.sqrt(2)) / (2 - math.sqrt(2)))
    ratio = 1 + width / 4.0
    result, _ = evaluate([ratio, ratio], [1.0, -1.0], fpo.Sapo(4.0, 8.0), [0.1, 0.1])
    assert result.coefficients[0] == pytest.approx(ratio / 2, rel=1e-14)
    assert -result.coefficients[1] < ratio / 2, "with a larger tau it falls off faster"


def test_dppo_tv_needs_the_old_log_probs_of_every_token():
    batch = make_batch(1, 0.1)
    ell, cells = batch.log_ratio.view(-1), batch.cells
    for call in (lambda **given: fpo.surrogate(ell, ell, cells, HIERARCHY, gating=fpo.DppoTv(0.1, 5.0), **given),
                 lambda **given: fpo.gated_ratio(ell, ell, cells, fpo.DppoTv(0.1, 5.0), **given)):  # fmt: skip
        with pytest.raises(ValueError, match="old_log_probs: DppoTv compares probabilities"):
            call()
        with pytest.raises(ValueError, match=r"old_log_probs: must have shape \[144\]"):
            call(old_log_probs=ell[1:])


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e30])
def test_dppo_tv_masked_tokens_change_no_bit(bad: float):
    batch, gating = make_batch(6, 0.3), fpo.DppoTv(0.02, 1.2)
    ell, old = batch.log_ratio.view(-1), batch.old_log_probs.view(-1)
    weighted = fpo.token_weights(batch.cells) * batch.advantage.repeat_interleave(batch.mask.shape[1])
    dead = ~batch.mask.view(-1)
    clean, dirty = (
        fpo.surrogate(a, weighted, batch.cells, HIERARCHY, gating=gating, old_log_probs=b)
        for a, b in ((ell, old), (ell.masked_fill(dead, bad), old.masked_fill(dead, bad)))
    )
    assert torch.equal(clean.coefficients, dirty.coefficients) and clean.value == dirty.value
    assert clean.report == dirty.report and 0 < clean.report.clipped < 1


def test_dppo_tv_any_split_of_tokens_over_ranks():
    batch, gating = make_batch(5, 0.15), fpo.DppoTv(0.02, 1.2)
    mask, ell, old = batch.mask.view(-1), batch.log_ratio.view(-1), batch.old_log_probs.view(-1)
    weight = batch.advantage.repeat_interleave(batch.mask.shape[1]) / 50
    one = fpo.surrogate(ell, weight, batch.cells, HIERARCHY, gating=gating, old_log_probs=old)
    tokens = [torch.arange(rank, len(ell), 2) for rank in range(2)]
    cells = [HIERARCHY.cells({name: label[at] for name, label in batch.labels.items()}, mask[at]) for at in tokens]
    censuses = [held.census() for held in cells]

    def work(rank, reduce):
        at, shared = tokens[rank], cells[rank].share(censuses, rank)
        return fpo.surrogate(ell[at], weight[at], shared, HIERARCHY, reduce, gating, old_log_probs=old[at])

    for rank, result in enumerate(on_ranks(2, work)[0]):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-13, atol=0)
        assert result.value == pytest.approx(one.value, abs=1e-13)
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)


def test_dppo_tv_on_policy_is_the_policy_gradient():
    batch = make_batch(8, 0.0)
    expected = fpo.token_weights(batch.cells) * batch.advantage.repeat_interleave(batch.mask.shape[1])
    result = batch.surrogate(fpo.DppoTv(0.1, 1.0), "trajectory_mean")
    assert torch.equal(result.coefficients, fpo.on_policy_coefficients(expected, batch.cells))
    assert result.report.clipped == 0.0


@pytest.mark.parametrize("nats", [200.0, 3e4, -3e4])
def test_dppo_tv_is_bounded(nats: float):
    batch = make_batch(7, 0.1)
    ell = batch.log_ratio.clone()
    ell[::3, 0] = nats
    result = Batch(ell, batch.advantage, batch.mask).surrogate(fpo.DppoTv(0.1, 5.0), "trajectory_mean")
    assert math.isfinite(result.value) and result.coefficients.abs().max() <= 5.0 * batch.advantage.abs().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fpo.Cispo(0.0, 0.2), "low: must be finite and greater than 0"),
        (lambda: fpo.Cispo(2, 0.2), "low: must be at most 1"),
        (lambda: fpo.Cispo(1, math.inf), "high: must be finite"),
        (lambda: fpo.Sapo(0, 1), "tau_pos: must be finite and greater than 0"),
        (lambda: fpo.Sapo(1, -1), "tau_neg: must be finite and greater than 0"),
        (lambda: fpo.DppoTv(0, 5), "delta: must be finite and greater than 0"),
        (lambda: fpo.DppoTv(0.1, 0.5), "cap: must be finite and at least 1"),
        (lambda: fpo.Gmpo(0.4, 0), "high: must be finite and greater than 0"),
        (lambda: fpo.Gmpo(0.4, 0.4, use_min=1), "use_min: must be true or false"),
        (lambda: fpo.Gmpo(0.4, 0.4, stratum=""), "stratum: must be the name of a stratum"),
    ],
)
def test_fields_are_refused_by_name(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
