"""Compiled passes stay compiled: in a run whose shapes vary, and under what keeps torch from compiling elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import kernels
from nemo_fiberpo.objective.kernels import Passes
from tests.objective.cases import make_hierarchy

Evaluate = Callable[..., Tensor]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluate]:
    """Coefficients by passes that torch traces but has no compiler for; a failure is an error."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_(function, backend="eager", **given))
    monkeypatch.setattr(kernels, "run", Passes())
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "1")
    torch._dynamo.reset()
    counters.clear()

    def of_rows(rows: int, length: int, masked: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(rows * length)
        row = torch.arange(rows).repeat_interleave(length)
        mask = torch.rand(rows * length, generator=generator) < 0.8 if masked else None
        hierarchy = make_hierarchy(2)
        labels = {"domain": row // 2, "prompt_group": row}
        cells = hierarchy.cells(labels, mask, shape=(rows, length))
        ell, weight = 0.1 * torch.randn(2, rows * length, generator=generator, dtype=torch.float64)
        return fpo.surrogate(ell, weight, cells, hierarchy).coefficients

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        yield of_rows
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_a_run_whose_lengths_vary_needs_one_graph_a_pass(evaluate: Evaluate):
    for rows, length in ((4, 9), (4, 600), (7, 7), (16, 5)):
        evaluate(rows, length)
        assert graphs() == 3


def test_more_kinds_of_batches_than_torch_allows_are_compiled(evaluate: Evaluate):
    with torch._dynamo.config.patch(cache_size_limit=2):
        evaluate(4, 9)
        evaluate(1, 9)
        evaluate(4, 9, masked=False)
        assert graphs() == 9


class Nothing(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", [lambda: torch.compiler.set_stance("force_eager"), Nothing], ids=["stance", "mode"])
def test_what_keeps_torch_from_compiling_elsewhere_does_not_here(around: Callable[[], Any], evaluate: Evaluate):
    expected = evaluate(4, 9)
    torch._dynamo.reset()
    counters.clear()
    with around():
        assert torch.equal(evaluate(4, 9), expected)
    assert graphs() == 3, "the three passes"


def test_too_many_kinds_are_told_once(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MOST_GRAPHS", 1)
    evaluate(4, 9)
    with pytest.warns(UserWarning, match="^torch.compile failed on nemo_fiberpo's measure, which now runs uncompiled"):
        one_row = evaluate(1, 9)
    assert torch.equal(evaluate(1, 9), one_row) and graphs() == 3
