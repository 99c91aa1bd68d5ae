"""The passes over tokens: compiled as uncompiled, in blocks as at once, the same bits twice, a failing compiler."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective import kernels
from nemo_fiberpo.objective.kernels import Passes, compile_passes
from tests.objective.cases import Case, branched_case, expert_case, make_case


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """A fresh runner in place of the package's, without a word from the environment."""
    monkeypatch.delenv("NEMO_FIBERPO_COMPILE", raising=False)
    monkeypatch.setattr(kernels, "run", Passes())
    return kernels.run


def in_rows(case: Case, length: int) -> tuple[Case, tuple[int, int]]:
    row = torch.arange(len(case.mask)) // length
    labels = {"domain": row // 4, "prompt_group": row // 2, "trajectory": row}
    return replace(case, labels=labels), (len(case.mask) // length, length)


def evaluated(
    case: Case, dtype: torch.dtype, shape: tuple[int, int] | None, use_min: bool, gated: bool = True
) -> dict[str, Tensor]:
    """What each of the passes has a part in; `gated` log-ratios and their derivative as well."""
    cells = case.hierarchy.cells(case.labels, case.mask, case.names, shape)
    ell, weight = case.log_ratio.to(dtype), case.weight.to(dtype)
    result = fpo.surrogate(ell, weight, cells, case.hierarchy, use_min=use_min)
    metrics = torch.tensor(list(result.report.metrics().values()), dtype=torch.float64)
    out = {"J": torch.tensor(result.value, dtype=torch.float64), "c": result.coefficients, "metrics": metrics}
    if gated:
        leaf = ell.clone().requires_grad_()
        log_rhat = fpo.gated_log_ratio(leaf, cells, case.hierarchy)
        log_rhat.backward(weight)
        out |= {"L": log_rhat.detach(), "grad": leaf.grad}
    return out


COMPILED = {
    "rows, float32": (lambda: in_rows(make_case(3, 1, num=80), 20), torch.float32, True),
    "any order, float64": (lambda: (branched_case("in two places", 1), None), torch.float64, False),
    "soft, float32": (lambda: (expert_case("P2", 1, soft=True), None), torch.float32, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_passes_give_what_uncompiled_ones_give(name: str, run: Passes, monkeypatch: pytest.MonkeyPatch):
    make, dtype, use_min = COMPILED[name]
    case, shape = make()
    # a weight that would give itself away where it is masked
    case.weight = torch.where(case.mask, case.weight, float("nan"))
    case.log_ratio = torch.where(case.mask, case.log_ratio, float("nan"))
    gated = name.startswith("any order")
    expected = evaluated(case, dtype, shape, use_min, gated)
    compiled: list[str] = []
    compile_ = torch.compile

    def counted(function, **kwargs):
        compiled.append(function.__name__)
        return compile_(function, **kwargs)

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "1")
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._inductor.config.patch(compile_threads=1):  # no pool of processes
        warnings.filterwarnings("error", message="torch.compile failed")
        got = evaluated(case, dtype, shape, use_min, gated)
    assert compiled == ["measure", "weigh", "pull", *(["gate"] if gated else [])]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        torch.testing.assert_close(
            got[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert all((got[key][~case.mask] == 0).all() for key in ("c", "L") if key in got)


@pytest.mark.parametrize("fails", ["at once", "when it is called"])
def test_a_failing_compiler_gives_one_warning_and_the_uncompiled_result(
    fails: str, run: Passes, monkeypatch: pytest.MonkeyPatch
):
    case = make_case(3, 2)
    expected = evaluated(case, torch.float64, None, False)
    tried = []

    def failing(function, **kwargs):
        tried.append(function.__name__)

        def call(*arguments):
            raise RuntimeError("no compiler here\nand a long tail")

        return call if fails == "when it is called" else call()

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = evaluated(case, torch.float64, None, False)
        evaluated(case, torch.float64, None, False)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    (warning,) = caught
    assert str(warning.message) == (
        "torch.compile failed on nemo_fiberpo's measure, which now runs uncompiled: RuntimeError: no compiler here. "
        "NEMO_FIBERPO_COMPILE=0 does not try"
    )
    assert tried == ["measure"], "it is not tried again"


def test_running_out_of_memory_is_not_taken_for_a_failing_compiler(run: Passes, monkeypatch: pytest.MonkeyPatch):
    def call(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: call)
    compile_passes("1")
    with pytest.raises(torch.OutOfMemoryError):
        make_case(2, 1).surrogate()


def test_who_decides_whether_passes_are_compiled(run: Passes, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def spied(function, **kwargs):
        def call(*arguments):
            calls.append(function.__name__)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", spied)
    case = make_case(2, 1)

    def compiles() -> bool:
        calls.clear()
        case.surrogate()
        assert calls in ([], ["measure", "weigh", "pull"])
        return bool(calls)

    assert not compiles(), "auto does not on a CPU"
    compile_passes("1")
    assert compiles()
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "0")
    assert not compiles(), "the environment comes first"
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "1")
    compile_passes("0")
    assert compiles()
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "auto")
    assert not compiles()
    monkeypatch.setenv("NEMO_FIBERPO_COMPILE", "yes")
    with pytest.raises(ValueError, match="^NEMO_FIBERPO_COMPILE: must be one of auto, 0, 1, got 'yes'"):
        case.surrogate()
    with pytest.raises(ValueError, match="^compile: must be one of auto, 0, 1, got 'true'"):
        compile_passes("true")


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("use_min", [False, True])
def test_blocks_change_no_bit(rows: bool, use_min: bool, monkeypatch: pytest.MonkeyPatch):
    case, shape = in_rows(make_case(3, 3, num=80), 10) if rows else (make_case(3, 3, num=200), None)
    expected = evaluated(case, torch.float64, shape, use_min)
    sizes = []
    measure = kernels.measure
    monkeypatch.setattr(kernels, "BLOCK", 40)
    monkeypatch.setattr(kernels, "measure", lambda *given: sizes.append(given[0].numel()) or measure(*given))
    got = evaluated(case, torch.float64, shape, use_min)
    assert len(sizes) > 2 and max(sizes) <= 40, "there are several blocks"
    assert all(torch.equal(got[key], value) for key, value in expected.items())


KINDS = {
    "chain": lambda: make_case(4, 4, num=3000),
    "branches": lambda: branched_case("two after", 4),
    "soft": lambda: expert_case("P4", 4, soft=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(kind: str, dtype: torch.dtype):
    one, other = (evaluated(KINDS[kind](), dtype, None, True) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_number_of_threads_changes_no_bit():
    case = make_case(3, 5, num=20000)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            results.append(evaluated(case, torch.float32, None, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
