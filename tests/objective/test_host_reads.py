"""What the host reads from the device: twice per evaluation with a report, whatever the strata and their named cells.

Everything here is on a CPU, where nothing waits. What would wait on a GPU is counted: operations whose result the host
needs, by themselves (`item`) or to know the size of what they return (`nonzero`, an index by bools), and copies to the
host. What was copied is the host's; reading it again costs nothing.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import SharedCells
from tests.objective.cases import Case, branched_case, expert_case, make_case

MOST = 3
READS = {"_local_scalar_dense", "item", "equal", "nonzero", "nonzero_static", "masked_select", "bincount", "is_nonzero"}
"""`bincount` reads the smallest and the largest entry."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostReads:
    """The reads within a `with`, each as the function of the package that made it."""

    def __init__(self, cells: SharedCells) -> None:
        self.found: list[str] = []
        # by id, kept alive so that ids stay theirs: what the host has; of the cells these are the tallies
        self.host = {id(tally): tally for level in cells.levels for tally in level.tally}
        self._modes = (_Methods(self), _Operations(self))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def read(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "nemo_fiberpo/objective" in frame.filename]
        where = f"{Path(frames[-1].filename).name}::{frames[-1].name}" if frames else "elsewhere"
        self.found.append(f"{where}: {what}")

    def on_device(self, values: Any) -> bool:
        return any(isinstance(value, Tensor) and id(value) not in self.host for value in tree_leaves(values))

    def keep(self, values: Any) -> None:
        self.host |= {id(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}


class _Methods(TorchFunctionMode):
    """Sees methods of tensors that read without an operation."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy", "cpu") and self.reads.on_device(args[0]):
            self.reads.read(name)
            self.reads.keep(copied := args[0].clone())
            return copied if name == "cpu" else function(copied)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Sees operations, also those within others."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = function.overloadpacket.__name__
        if self.reads.on_device(given):
            by_bools = name in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
            repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
            to_host = name == "_to_copy" and str(kwargs.get("device")) == "cpu"
            if name in READS or "unique" in name or by_bools or repeats or to_host:
                self.reads.read(name)
        out = function(*args, **kwargs)
        if given and not self.reads.on_device(given):
            self.reads.keep(out)
        return out


def reads_of(case: Case, **kwargs: Any) -> list[str]:
    cells = case.cells.shared
    with HostReads(cells) as reads:
        fpo.surrogate(case.log_ratio, case.weight, cells, case.hierarchy, **kwargs)
    return reads.found


def many_names(strata: int) -> Case:
    """Strata with dozens of named cells, with budgets and token clips of their own."""
    case = make_case(strata, 1, num=400)
    case.labels = {name: label - label.min() for name, label in case.labels.items()}
    names = {name: [f"cell_{at}" for at in range(60)] for name in case.labels}
    chain = tuple(replace(s, budgets={"cell_1": fpo.Budget(0.1, 0.1)}) for s in case.hierarchy.strata)
    return replace(case, names=names, hierarchy=fpo.Hierarchy(chain, 0.04, token_clips={"cell_0": 0.1}))


CASES = {
    "one stratum": lambda: make_case(1, 1),
    "four strata": lambda: make_case(4, 1),
    "one stratum of named cells": lambda: many_names(1),
    "four strata of named cells": lambda: many_names(4),
    "branches": lambda: branched_case("in two places", 1),
    "named parts of joins, floors": lambda: expert_case("P2", 1, floor=4),
    "shares": lambda: expert_case("P1", 1, soft=True),
}


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_with_its_report_is_read_at_most_three_times(name: str):
    found = reads_of(CASES[name]())
    assert len(found) <= MOST, "\n".join(found)
    assert sum(read.endswith(": cpu") for read in found) == 1, "value and report come in one copy"


@pytest.mark.parametrize("name", CASES)
def test_the_minimum_and_other_gates_read_no_more(name: str):
    case = CASES[name]()
    chain = tuple(replace(stratum, gate="soft") for stratum in case.hierarchy.strata)
    other = replace(case, hierarchy=replace(case.hierarchy, strata=chain))
    assert reads_of(other, use_min=True) == reads_of(case)


@pytest.mark.parametrize("gating", [fpo.PpoClip(0.2, 0.2), fpo.Gspo(0.03, 0.04), fpo.Apc(0.1)], ids=str)
def test_another_map_reads_no_more(gating: fpo.RatioGating):
    assert len(reads_of(many_names(4), gating=gating)) <= MOST


def test_coefficients_alone_are_read_once():
    case = many_names(3)
    cells = case.cells.shared
    with HostReads(cells) as reads:
        fpo.token_coefficients(case.log_ratio, case.weight, cells, case.hierarchy)
    assert reads.found == ["inputs.py::check_sums: tolist"]
    with HostReads(cells) as reads:
        leaf = case.log_ratio.clone().requires_grad_()
        fpo.gated_log_ratio(leaf, cells, case.hierarchy).sum().backward()
    assert reads.found == ["inputs.py::check_sums: tolist"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x if x.sum() > 0 else -x,
    ],
)
def test_a_read_is_counted(read):
    cells = make_case(1, 1).cells.shared
    with HostReads(cells) as reads:
        read(torch.tensor([1.0, 2.0]))
    assert len(reads.found) >= 1


def test_what_the_host_has_is_not_counted():
    with HostReads(make_case(1, 1).cells.shared) as reads:
        here = torch.tensor([1.0, 2.0]).cpu()
        assert here.tolist() == [1.0, 2.0] and float((here * 2).sum()) == 6.0 and bool((here[1:] > 1).all())
        here.nonzero()
    assert reads.found == ["elsewhere: cpu"]
