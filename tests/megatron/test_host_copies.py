"""What autograd graphs save, in host memory."""

from __future__ import annotations

import pytest
import torch

from nemo_fiberpo.megatron import host_copies


@pytest.mark.parametrize(("least", "copied"), [(0, True), (1 << 20, False)])
def test_saved_tensors_are_copies_and_parameters_are_not(monkeypatch, least: int, copied: bool) -> None:
    monkeypatch.setattr(host_copies, "LEAST_BYTES", least)
    module = torch.nn.Linear(3, 3, bias=False)
    x = torch.full((3, 3), 2.0, requires_grad=True)
    with host_copies.saved_on_host([module]):
        y = x * module.weight
    x.data.zero_()  # a graph that holds x itself sees this
    module.weight.data.fill_(5.0)  # and this is seen in any case
    y.sum().backward()
    assert module.weight.grad is not None and torch.all(module.weight.grad == (2.0 if copied else 0.0))
    assert x.grad is not None and torch.all(x.grad == 5.0)
