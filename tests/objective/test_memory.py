"""Peak memory of an evaluation beyond what it is given, in bytes per float32 token."""

from __future__ import annotations

import pytest
import torch

import nemo_fiberpo as fpo
from benchmarks.token_coefficients import HIERARCHY, peak_bytes
from nemo_fiberpo.objective import kernels

ROWS, LENGTH = 32, 4096
MOST = 18.0  # four copies of a token's number, and what goes by piece or by cell


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all live"])
@pytest.mark.parametrize("layout", ["rows", "any order"])
@pytest.mark.parametrize("function", [fpo.token_coefficients, fpo.surrogate])
def test_uncompiled_passes_hold_few_copies_of_the_tokens(
    function, layout: str, masked: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "BLOCK", LENGTH)  # in a real batch what a block holds counts for as little
    generator = torch.Generator().manual_seed(0)
    num = ROWS * LENGTH
    row = torch.arange(ROWS).repeat_interleave(LENGTH)
    if layout == "any order":
        row = row[torch.randperm(num, generator=generator)]
    mask = torch.rand(num, generator=generator) < 0.7 if masked else None
    labels = {"domain": row // 16, "prompt_group": row // 8, "trajectory": row}
    cells = HIERARCHY.cells(labels, mask, shape=(ROWS, LENGTH)).shared
    assert (cells.layout.entries.token is None) == (layout == "rows")
    log_ratio, weight = 0.05 * torch.randn(2, num, generator=generator)
    per_token = peak_bytes(lambda: function(log_ratio, weight, cells, HIERARCHY)) / num
    assert 4.0 < per_token <= MOST
