"""Weights of (2), the report of the gates, and the divergence estimates."""

from __future__ import annotations

import pytest
import torch

import nemo_fiberpo as fpo
from nemo_fiberpo.diagnostics.divergence import kl_estimate, tv_estimate
from nemo_fiberpo.objective import build_cells

TRAJECTORY = torch.tensor([0, 0, 0, 1, 1, 2])
MASK = torch.tensor([True, True, False, True, True, False])


def test_weights_by_hand():
    # two trajectories with live tokens, two tokens each; the third has none and does not count
    cells = build_cells(["trajectory"], {"trajectory": TRAJECTORY}, MASK)
    assert fpo.token_weights(cells).tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0]
    assert fpo.token_weights(cells, "token_mean").tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0]
    assert fpo.token_weights(cells, "fixed_length_mean", length=8).tolist() == [1 / 16, 1 / 16, 0, 1 / 16, 1 / 16, 0]
    uneven = build_cells(["trajectory"], {"trajectory": TRAJECTORY})
    expected = [1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6, 1 / 3]
    assert fpo.token_weights(uneven).tolist() == pytest.approx(expected, abs=1e-16)
    assert fpo.token_weights(uneven, dtype=torch.float32).dtype == torch.float32


def test_weights_are_read_through_finer_strata():
    labels = {"trajectory": TRAJECTORY, "segment": torch.arange(6)}
    cells = build_cells(["trajectory", "segment"], labels)
    assert torch.equal(fpo.token_weights(cells), fpo.token_weights(build_cells(["trajectory"], labels)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"kind": "token_meen"}, "kind: unknown weighting 'token_meen'; did you mean 'token_mean'"),
        ({"kind": "fixed_length_mean"}, "length: is for fixed_length_mean and required there"),
        ({"kind": "token_mean", "length": 3}, "length: is for fixed_length_mean"),
        ({"kind": "fixed_length_mean", "length": 0}, "length: must be finite and greater than 0"),
        ({"stratum": "domain"}, r"cells: no active stratum is called 'domain'; there are \['trajectory'\]"),
    ],
)
def test_weights_refuse_by_name(args: dict, message: str):
    cells = build_cells(["trajectory"], {"trajectory": TRAJECTORY})
    with pytest.raises(ValueError, match=message):
        fpo.token_weights(cells, **args)


def test_report_by_hand():
    # C+ = C- = 0.1, k = 2 (token counts). Cell 0: M+ = 0.11, rollback; M- = 0, pass.  Cell 1: M+ = 0.05, pass;
    # M- = -0.2 beyond C* = 0.15, zeroed.  eps = 0.12: residuals 0.01, -0.01; 0.05, -0.2: one of four tokens clipped
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1)),), 0.12)
    cells = hierarchy.cells({"trajectory": torch.tensor([0, 0, 1, 1])}, names={"trajectory": ["left", "right", "none"]})
    ell = torch.tensor([0.12, 0.10, 0.10, -0.40], dtype=torch.float64)
    metrics = fpo.surrogate(ell, torch.ones(4, dtype=torch.float64), cells, hierarchy).report.metrics()
    expected = {
        "trajectory/cells": 2,
        "trajectory/pos/pass_through": 0.5,
        "trajectory/pos/rollback": 0.5,
        "trajectory/pos/zeroed": 0,
        "trajectory/pos/drift_mean": 0.08,
        "trajectory/pos/drift_max": 0.11,
        "trajectory/pos/budget_used_mean": 0.8,
        "trajectory/pos/budget_used_max": 1.1,
        "trajectory/neg/pass_through": 0.5,
        "trajectory/neg/rollback": 0,
        "trajectory/neg/zeroed": 0.5,
        "trajectory/neg/drift_mean": 0.1,
        "trajectory/neg/drift_max": 0.2,
        "trajectory/neg/budget_used_mean": 1.0,
        "trajectory/neg/budget_used_max": 2.0,
        "trajectory.left/token_share": 0.5,
        "trajectory.right/token_share": 0.5,
        "trajectory.left/pos/regime": 1,
        "trajectory.left/neg/regime": 0,
        "trajectory.right/pos/regime": 0,
        "trajectory.right/neg/regime": 2,
        "trajectory.left/pos/drift": 0.11,
        "trajectory.left/pos/budget_used": 1.1,
        "trajectory.left/neg/drift": 0,
        "trajectory.left/neg/budget_used": 0,
        "trajectory.right/pos/drift": 0.05,
        "trajectory.right/pos/budget_used": 0.5,
        "trajectory.right/neg/drift": 0.2,
        "trajectory.right/neg/budget_used": 2.0,
        # cell 0: pos rolls back while neg passes, which has no name; cell 1: neg zeroed, pos passes
        "trajectory/regime/G-I": 0,
        "trajectory/regime/G-II,r": 0,
        "trajectory/regime/G-II": 0.5,
        "trajectory/regime/G-III,r": 0,
        "trajectory/regime/G-III": 0,
        "trajectory/regime/other": 0.5,
        # KL -0.11 and 0.2 - 0.05, TV 0.11 / 2 and (0.05 + 0.2) / 2
        "trajectory/kl_mean": 0.02,
        "trajectory/kl_max": 0.15,
        "trajectory/tv_mean": 0.09,
        "trajectory/tv_max": 0.125,
        "token/live": 4,
        "token/clipped": 0.25,
        "log_ratio/mean": -0.02,
        "log_ratio/abs_mean": 0.18,
        "log_ratio/max": 0.4,
        "log_ratio/kl": 0.02,
        "log_ratio/tv": 0.09,
    }
    assert metrics == pytest.approx(expected, abs=1e-15)


def test_parts_of_a_join_by_hand():
    # Trajectories 0 and 1 in halves a and b, C = 0.1. Trajectory 0 has M+ = 0.15, M- = -0.15; its half a M+ = 0.3 and
    # M- = 0, its half b the reverse, so that all |X| = 0.15. Trajectory 1 has M+ = 0.03, as its half a has; its half b,
    # one token, is merged into it
    trajectory = fpo.Stratum("trajectory", fpo.Budget(1, 1))
    join = fpo.Stratum("both", fpo.Budget(0.1, 0.1), join=("trajectory", "half"), min_tokens=2)
    hierarchy = fpo.Hierarchy((trajectory, join), 1.0)
    labels = {"trajectory": torch.tensor([0, 0, 0, 0, 1, 1, 1]), "half": torch.tensor([0, 0, 1, 1, 0, 0, 1])}
    ell = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.04, 0.02, 0.03], dtype=torch.float64)
    cells = hierarchy.cells(labels, names={"half": ["a", "b", "none"]})
    cells = cells.share([cells.census()], 0)
    metrics = fpo.surrogate(ell, torch.ones(7, dtype=torch.float64), cells, hierarchy).report.metrics()
    expected = {
        "a/token_share": 4 / 7,
        "a/pos/drift": 0.165,
        "a/pos/budget_used_mean": 0.75,
        "a/pos/beyond": 0.5,
        "a/neg/drift": 0,
        "a/neg/budget_used_mean": 0.75,
        "a/neg/beyond": 0.5,
        "b/token_share": 3 / 7,
        "b/pos/drift": 0.01,
        "b/pos/budget_used_mean": 1.5,
        "b/pos/beyond": 1,
        "b/neg/drift": 0.2,
        "b/neg/budget_used_mean": 1.5,
        "b/neg/beyond": 1,
    }
    found = {name.removeprefix("both.half."): value for name, value in metrics.items() if "both.half." in name}
    assert found == pytest.approx(expected, abs=1e-15)
    assert metrics["both/cells"] == 3 and metrics["both/merged_cells"] == 1
    assert metrics["both/merged_tokens"] == pytest.approx(1 / 7)


def test_divergence_estimates_by_hand():
    # log s+ = 0.3, log s- = 0.5: KL = 0.5 - 0.3 (49), TV = (0.3 + 0.5) / 2 to first order
    mean = torch.tensor([[0.3], [-0.5]], dtype=torch.float64)
    assert kl_estimate(mean).item() == pytest.approx(0.2, abs=1e-15)
    assert tv_estimate(mean).item() == pytest.approx(0.4, abs=1e-15)
