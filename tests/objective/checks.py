"""What holds for every case: the slow loops, the identity on-policy, any split over ranks, masked tokens ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from tests.objective.cases import F64, Case
from tests.objective.ranks import on_ranks


def equals_the_slow_loops(case: Case, use_min: bool = False) -> fpo.Surrogate:
    """Value, coefficients, gated log-ratios, and the derivative that autograd takes of these."""
    value, coefficients, gated = case.reference(use_min)
    cells = case.cells
    result = fpo.surrogate(case.log_ratio, case.weight, cells, case.hierarchy, use_min=use_min)
    assert result.value == pytest.approx(value, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(result.coefficients, coefficients, rtol=1e-12, atol=1e-12)
    leaf = case.log_ratio.clone().requires_grad_()
    out = fpo.gated_log_ratio(leaf, cells, case.hierarchy)
    torch.testing.assert_close(out.detach(), gated, rtol=0, atol=1e-13)
    if not use_min:
        torch.where(case.mask, case.weight * out.exp(), 0.0).sum().backward()
        torch.testing.assert_close(leaf.grad, coefficients, rtol=1e-12, atol=1e-12)
    return result


def is_the_identity_on_policy(case: Case) -> None:
    """To the bit, coefficients and Jacobian."""
    cells, ell = case.cells, torch.zeros_like(case.log_ratio)
    expected = fpo.on_policy_coefficients(case.weight, cells)
    for use_min in (False, True):
        got = fpo.token_coefficients(ell, case.weight, cells, case.hierarchy, use_min=use_min)
        assert torch.equal(got, expected)
    jacobian = torch.autograd.functional.jacobian(lambda x: fpo.gated_log_ratio(x, cells, case.hierarchy), ell)
    assert torch.equal(jacobian, torch.diag(case.mask.to(F64)))


def is_one_process_on_ranks(case: Case, rank_T: Tensor, world_size: int, **kwargs: Any) -> list[list[int]]:
    """Coefficients, value and report of `surrogate`, gated log-ratios and their gradient, however tokens are split.

    Returns the length of every buffer that `surrogate` had reduced, by rank.
    """
    one, expected = case.surrogate(**kwargs), fpo.gated_log_ratio(case.log_ratio, case.cells, case.hierarchy)
    tokens, cells = case.split(rank_T, world_size)
    parts = [case.part(at) for at in tokens]

    def evaluated(rank: int, reduce: Any) -> fpo.Surrogate:
        part = parts[rank]
        return fpo.surrogate(part.log_ratio, part.weight, cells[rank], case.hierarchy, reduce, **kwargs)

    results, meeting = on_ranks(world_size, evaluated)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.coefficients, one.coefficients[tokens[rank]], rtol=1e-12, atol=1e-13)
        assert result.value == results[0].value == pytest.approx(one.value, abs=1e-12)
        assert result.report == results[0].report
        assert result.report.metrics() == pytest.approx(one.report.metrics(), abs=1e-12)
        assert result.report.histograms() == one.report.histograms()
    assert [len(sizes) for sizes in meeting.sizes] == [case.hierarchy.num_reductions] * world_size

    def differentiated(rank: int, reduce: Any) -> tuple[Tensor, Tensor]:
        leaf = parts[rank].log_ratio.clone().requires_grad_()
        out = fpo.gated_log_ratio(leaf, cells[rank], case.hierarchy, reduce)
        torch.where(parts[rank].mask, parts[rank].weight * out.exp(), 0.0).sum().backward()
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    through, _ = on_ranks(world_size, differentiated)
    gradient = case.surrogate().coefficients
    for at, (out, grad) in zip(tokens, through, strict=True):
        torch.testing.assert_close(out, expected[at], rtol=0, atol=1e-13)
        torch.testing.assert_close(grad, gradient[at], rtol=1e-12, atol=1e-13)
    return meeting.sizes


def ignores_masked_tokens(case: Case, bad: float, shape: tuple[int, int] | None = None, **kwargs: Any) -> None:
    """Whatever they hold changes no bit, and their coefficients are 0."""
    labels = {
        name: torch.where(case.mask, label, -(2**62)) if label.ndim == 1 else torch.where(case.mask[:, None], label, 7)
        for name, label in case.labels.items()
    }
    ell, weight = (torch.where(case.mask, value, bad) for value in (case.log_ratio, case.weight))
    dirty = replace(case, labels=labels, log_ratio=ell, weight=weight)
    cells = [each.hierarchy.cells(each.labels, each.mask, each.names, shape) for each in (case, dirty)]
    expected, result = (
        fpo.surrogate(each.log_ratio, each.weight, own, each.hierarchy, **kwargs)
        for each, own in zip((case, dirty), cells, strict=True)
    )
    assert torch.equal(result.coefficients, expected.coefficients)
    assert result.value == expected.value and result.report == expected.report
    assert (result.coefficients[~case.mask] == 0).all()
    leaves = [each.log_ratio.clone().requires_grad_() for each in (case, dirty)]
    outs = [fpo.gated_log_ratio(leaf, own, case.hierarchy) for leaf, own in zip(leaves, cells, strict=True)]
    assert torch.equal(outs[0], outs[1])
    outs[0].backward(torch.ones_like(ell))
    outs[1].backward(torch.where(case.mask, 1.0, bad).to(F64))
    assert torch.equal(leaves[0].grad, leaves[1].grad)
