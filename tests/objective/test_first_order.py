"""First-order agreement: on-policy every map has the identity as its Jacobian; and which tokens a map couples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import make_case
from tests.objective.sampled_states import F64, generator

MAPS = {
    "fiberpo": (None, "domain"),
    "ppo": (fpo.PpoClip(0.2, 0.28), None),
    "ppo, no min": (fpo.PpoClip(0.2, 0.28, use_min=False), None),
    "gspo": (fpo.Gspo(0.03, 0.04), "trajectory"),
    "gspo, no min": (fpo.Gspo(0.03, 0.04, use_min=False), "trajectory"),
    "truly_ppo": (fpo.TrulyPpo(0.2, 0.3), None),
    "truly_ppo, no min": (fpo.TrulyPpo(0.2, 0.3, use_min=False), None),
    "apc": (fpo.Apc(0.05), "trajectory"),
    "apc, log": (fpo.Apc(0.05, space="log"), "trajectory"),
    "apc, groups": (fpo.Apc(0.05, stratum="prompt_group"), "prompt_group"),
}


def jacobian(gating, case, log_ratio: Tensor, sign: float) -> Tensor:
    """dG_i / d ell_j: the coefficients of the objective in which token i alone counts, with advantage `sign`."""
    cells = case.cells
    rows = []
    for unit in torch.eye(len(log_ratio), dtype=F64):
        result = fpo.surrogate(log_ratio, sign * unit, cells, case.hierarchy, gating=gating)
        rows.append(sign * result.coefficients)
    return torch.stack(rows)


@pytest.mark.parametrize("sign", (1.0, -1.0))
@pytest.mark.parametrize("name", MAPS)
def test_first_order_agreement_of_every_map(name: str, sign: float):
    case = make_case(3, 5, num=24)
    at_zero = jacobian(MAPS[name][0], case, torch.zeros_like(case.log_ratio), sign)
    live = case.mask.double()
    if not name.startswith("gspo"):
        assert torch.equal(at_zero, torch.diag(live))
        return
    # GSPO's is the mean over the trajectory: the identity on advantages that trajectories have as a whole
    row = case.labels["trajectory"]
    same = (row[:, None] == row[None, :]) * live[:, None] * live[None, :]
    torch.testing.assert_close(at_zero, same / same.sum(1, keepdim=True).clamp_min(1), rtol=1e-15, atol=0)
    advantage = torch.randn(3000, generator=generator(0), dtype=F64)[row]
    torch.testing.assert_close(advantage @ at_zero, advantage * live, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_the_jacobian_is_block_diagonal_over_the_cells_that_a_map_couples(name: str):
    case = make_case(3, 9, 0.15, num=24)
    gating, stratum = MAPS[name]
    full = jacobian(gating, case, case.log_ratio, 1.0)
    row = torch.arange(24) if stratum is None else case.labels[stratum]
    inside = row[:, None] == row[None, :]
    assert (full[~inside] == 0).all()
    off = inside & ~torch.eye(24, dtype=torch.bool)
    assert bool((full[off] != 0).any()) == (stratum is not None)
