"""What the exact step refuses, by field, and before any process is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_fiberpo.megatron.groups import Axis, TokenAxes
from nemo_fiberpo.megatron.schedule import loss_scale, refuse_inexact
from nemo_fiberpo.megatron.step import StepTokens, linear_loss
from nemo_fiberpo.objective import build_cells


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_dropout", 0.1),
        ("attention_dropout", 0.1),
        ("moe_input_jitter_eps", 0.01),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_router_force_load_balancing", True),
        ("calculate_per_token_loss", True),
        ("moe_router_load_balancing_type", "sinkhorn"),
    ],
)
def test_what_would_make_the_passes_differ_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {value}"):
        refuse_inexact(SimpleNamespace(**{field: value}))


def test_a_deterministic_config_is_accepted() -> None:
    refuse_inexact(
        SimpleNamespace(
            hidden_dropout=0.0, attention_dropout=0, moe_input_jitter_eps=None, moe_expert_capacity_factor=None,
            moe_router_force_load_balancing=False, calculate_per_token_loss=False,
        )
    )  # fmt: skip
    refuse_inexact(SimpleNamespace())


def test_step_tokens_must_fit_each_other_and_the_cells() -> None:
    cells = build_cells(["trajectory"], {"trajectory": torch.zeros(6, dtype=torch.int64)})
    a, b = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    StepTokens([a], [a], [b], cells)
    with pytest.raises(ValueError, match="^mask: shapes"):
        StepTokens([a], [a], [b[:1]], cells)
    with pytest.raises(ValueError, match="^cells: made for 6 tokens, but the micro-batches have 12"):
        StepTokens([a, a], [a, a], [b, b], cells)


def test_the_scale_cancels_micro_batches_and_data_parallel_average() -> None:
    """3 micro-batches, 2 x TP, 2 x PP, 5 x DP: l * 15 / 3 / 5 = l, whatever TP and PP are."""
    axes = TokenAxes(
        (
            Axis("tp", 2, 1, False),
            Axis("pp", 2, 0, False, 1),
            Axis("cp", 1, 0, True, averaged=True),
            Axis("dp", 5, 2, True, averaged=True),
        )
    )
    assert loss_scale(3, axes) == 15
    assert not axes.represents and axes.shard == (0, 2)


def test_linear_loss_is_exact_and_deaf_to_what_has_no_coefficient() -> None:
    """-(2 * -1 - 3 * -2) = -4; the third token's NaN meets c = 0."""
    log_probs = torch.tensor([-1.0, -2.0, torch.nan], requires_grad=True)
    loss = linear_loss(log_probs, torch.tensor([2.0, -3.0, 0.0]))
    loss.backward()
    assert loss.item() == -4.0
    assert log_probs.grad.tolist() == [-2.0, 3.0, 0.0]
