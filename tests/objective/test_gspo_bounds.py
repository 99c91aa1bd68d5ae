"""Claim 3.5 and Remark 3.6: what the clip of GSPO bounds."""

from __future__ import annotations

import math

import pytest
import torch

import nemo_fiberpo as fpo
from tests.objective.sampled_states import F64, generator


@pytest.mark.parametrize("eps", (0.002, 0.02))
def test_claim_3_5_the_clip_of_gspo_bounds_kl_and_tv(eps: float):
    # A trajectory that visits each state as often as the old policy takes each action: its sample is the expectation
    rng = generator(0)
    gating = fpo.Gspo(1 - math.exp(-eps), math.exp(eps) - 1, use_min=False)
    cells_of = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(1, 1)),), 1.0)
    kept = 0
    for trial in range(140):
        kl, tv, log_ratio = [], [], []
        for _ in range(3):
            count = torch.randint(1, 6, (4,), generator=rng)
            old = count.double() / count.sum()
            scale = 0.5 * math.sqrt(eps) * (1 + trial % 7)
            new = (old.log() + scale * torch.randn(4, generator=rng, dtype=F64)).softmax(0)
            log_ratio.append((new / old).log().repeat_interleave(count))
            kl.append(((old * (old / new).log()).sum(), count.sum()))  # (35)
            tv.append(((old - new).abs().sum() / 2, count.sum()))  # (34)
        ell = torch.cat(log_ratio)
        cells = cells_of.cells({"trajectory": torch.zeros(len(ell), dtype=torch.int64)})
        result = fpo.surrogate(ell, torch.ones(len(ell), dtype=F64), cells, cells_of, gating=gating)
        tokens = sum(n for _, n in kl)
        mean_kl, mean_tv = (float(sum(d * n for d, n in pairs) / tokens) for pairs in (kl, tv))
        assert -float(ell.mean()) == pytest.approx(mean_kl, abs=1e-12), "(49)"
        assert result.report.clipped == float(mean_kl > eps)
        if result.report.clipped == 0:
            assert mean_kl <= eps and mean_tv <= math.sqrt(eps / 2)
            kept += 1
    assert 20 < kept < 120


def test_claim_3_5_is_about_expectations():
    # on a sample, log-ratios that cancel are nothing to GSPO, whatever TV they show; FiberPO's channels see both
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)),), 0.2)
    cells = hierarchy.cells({"trajectory": torch.zeros(2, dtype=torch.int64)})
    ell, weight = torch.tensor([1.0, -1.0], dtype=F64), torch.ones(2, dtype=F64)
    result = fpo.surrogate(ell, weight, cells, hierarchy, gating=fpo.Gspo(3e-4, 4e-4))
    assert result.value == 2.0 and result.report.clipped == 0 and result.report.tv == 0.5
    metrics = result.report.metrics()
    assert metrics["trajectory/pos/zeroed"] == metrics["trajectory/neg/zeroed"] == 1.0


@pytest.mark.parametrize(("eps", "tv"), [(3e-4, 0.0122), (4e-4, 0.0141)])
def test_remark_3_6_the_tv_that_the_clip_ranges_of_gspo_allow(eps: float, tv: float):
    # sqrt(eps / 2), and a fair coin that is shifted by TV comes that far: its KL is 2 TV^2 to leading order
    assert math.sqrt(eps / 2) == pytest.approx(tv, abs=1e-4)
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(1, 1)),), 1.0)
    cells = hierarchy.cells({"trajectory": torch.zeros(2, dtype=torch.int64)})
    gating = fpo.Gspo(eps, eps, use_min=False)
    clipped = []
    for shift in (tv, tv + 1e-4):
        ell = torch.tensor([1 + 2 * shift, 1 - 2 * shift], dtype=F64).log()
        result = fpo.surrogate(ell, torch.ones(2, dtype=F64), cells, hierarchy, gating=gating)
        clipped.append(result.report.clipped)
    assert clipped == [0.0, 1.0]
