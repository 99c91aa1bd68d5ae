"""The objective on the device against the CPU: values, gradients and reports, the same bits twice, waits of the host.

Without a GPU the device is the CPU, and these are checks of the compiled passes and of the tests themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from nemo_fiberpo import token_coefficients
from nemo_fiberpo.objective import kernels
from tests.gpu import device
from tests.gpu.cases import Case, difference, hierarchies, make_case
from tests.gpu.device import CPU, DEVICE, ON_GPU
from tests.gpu.traffic import on_device, watched
from tests.megatron.slow import same_metrics

FLOAT64 = 1e-12
"""Bound on differences between devices, orders of summation and compilers, relative to the largest entry."""
ROUNDINGS = 8
"""How many times the rounding error of eager float32 on the CPU, which is measured, float32 may have."""
MOST_WAITS = 3
"""Of the host in a surrogate with its report: refusals, report, and one for who calls it (`Riders`)."""

COMPILED = ("chain", "missing strata and floors", "soft membership", "use_min")
"""Every structure of arguments that the passes are compiled for. It takes seconds, so that of these a CPU has two."""
COMPILED_HERE = [("use_min", torch.float32), ("soft membership", torch.float64)]
RUNS = [
    pytest.param(name, dtype, mode, id=f"{name}, {str(dtype)[6:]}, {mode}")
    for name in hierarchies()
    for dtype in (torch.float64, torch.float32)
    for mode in ("eager", "compiled")
    if mode == "eager" or (name in COMPILED if ON_GPU else (name, dtype) in COMPILED_HERE)
]


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Eager passes, or compiled ones; these are refused if the compiler failed, or was not called at all."""
    if request.param == "eager":
        with device.passes("eager"):
            yield request.param
        return
    if reason := device.no_compiler():
        pytest.skip(reason)
    with device.passes("compiled"):
        yield request.param
        assert not kernels.run.failed
    assert kernels.run.compiled.cache_info().currsize >= 3


Results = dict[str, Tensor]


def evaluate(case: Case) -> tuple[Results, dict[str, float]]:
    """All that the objective gives: tensors by name, and the metrics of the report."""
    found = case.surrogate()
    gated, gradient = case.gated()
    tensors = {
        "coefficients": found.coefficients,
        "token_coefficients": token_coefficients(
            case.log_ratio, case.weighted_advantage, case.cells(), case.hierarchy, use_min=case.use_min
        ),
        "gated log-ratio": gated,
        "its gradient": gradient,
        "J": torch.tensor([found.value], dtype=torch.float64),
    }
    return tensors, found.report.metrics()


@cache
def on_cpu(name: str, dtype: torch.dtype, size: tuple[int, int] = (24, 40)) -> tuple[Results, dict[str, float]]:
    with device.passes("eager"):
        return evaluate(make_case(name, *size).to(CPU, dtype))


def errors(one: Results, other: Results) -> dict[str, float]:
    return {name: difference(one[name], other[name]) for name in one}


@pytest.mark.filterwarnings("error:torch.compile failed on nemo_fiberpo")
@pytest.mark.parametrize(("name", "dtype", "mode"), RUNS, indirect=["mode"])
def test_the_device_computes_what_the_cpu_does(name: str, dtype: torch.dtype, mode: str):
    expected, metrics = on_cpu(name, torch.float64)
    found, found_metrics = evaluate(make_case(name).to(DEVICE, dtype))
    assert found["coefficients"].device == DEVICE and found["coefficients"].dtype == dtype
    error = errors(found, expected)
    print(f"{name}, {dtype}, {mode}: {error}")
    if dtype == torch.float64:
        assert max(error.values()) <= FLOAT64, error
        assert same_metrics(found_metrics, metrics, rel=FLOAT64)
        return
    rounding = errors(on_cpu(name, torch.float32)[0], expected)
    assert max(rounding.values()) < 1e-5, f"a token at the edge of a gate: {rounding}"
    assert all(value <= ROUNDINGS * rounding[key] + 1e-7 for key, value in error.items()), (error, rounding)
    assert same_metrics(found_metrics, metrics, rel=1e-5)


@pytest.mark.parametrize("name", ["chain", "missing strata and floors", "soft membership"])
def test_many_long_rows(name: str):
    # Sums over a row are then split between the blocks of a GPU.
    size = (96, 20_000) if ON_GPU else (16, 3000)
    expected, metrics = on_cpu(name, torch.float64, size)
    with device.passes("eager"):
        found, found_metrics = evaluate(make_case(name, *size).to(DEVICE, torch.float64))
    error = errors(found, expected)
    assert max(error.values()) <= FLOAT64, error
    assert same_metrics(found_metrics, metrics, rel=FLOAT64)


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = {torch.float64: torch.int64, torch.float32: torch.int32}[one.dtype]
    return torch.equal(one.view(bits), other.view(bits))


@pytest.mark.filterwarnings("error:torch.compile failed on nemo_fiberpo")
@pytest.mark.parametrize(("name", "dtype", "mode"), RUNS, indirect=["mode"])
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype, mode: str):
    runs = [evaluate(make_case(name, 16, 1500).to(DEVICE, dtype)) for _ in range(2)]
    (one, metrics), (other, other_metrics) = runs
    assert all(same_bits(one[key], other[key]) for key in one)
    assert same_metrics(metrics, other_metrics, rel=0.0)


@pytest.mark.parametrize("name", hierarchies())
def test_rows_and_any_order_are_the_same(name: str):
    case = make_case(name).to(DEVICE, torch.float64)
    order = torch.randperm(len(case.log_ratio), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with device.passes("eager"):
        (rows, metrics), (mixed, mixed_metrics) = evaluate(case), evaluate(case.ordered(order))
    expected = {key: value if key == "J" else value[order] for key, value in rows.items()}
    error = errors(mixed, expected)
    assert max(error.values()) <= FLOAT64, error
    assert same_metrics(mixed_metrics, metrics, rel=FLOAT64)


def test_masked_tokens_hold_nan_and_get_nothing():
    case = make_case("chain").to(DEVICE, torch.float32)
    assert case.mask is not None and case.log_ratio[~case.mask].isnan().all()
    with device.passes("eager"):
        found, _ = evaluate(case)
    assert all((found[key][~case.mask] == 0).all() for key in ("coefficients", "gated log-ratio", "its gradient"))


def test_a_live_value_that_is_not_finite_is_refused_by_its_place():
    case = make_case("chain").to(DEVICE, torch.float32)
    assert case.mask is not None
    bad = case.log_ratio.clone()
    bad[1] = float("inf")  # every row has a live first token; token 1 is made live here
    live = case.mask.clone()
    live[1] = True
    with device.passes("eager"), pytest.raises(ValueError, match="sample 0, token position 1"):
        replace(case, log_ratio=bad, mask=live).surrogate()


def waits(name: str, call: str, eager: bool) -> list[str]:
    """Where the host waits in a call on cells that were built before, and warmed up on a GPU."""
    case = make_case(name).to(CPU, torch.float32)
    with watched(DEVICE):
        moved = [on_device(part, DEVICE) for part in (case.labels, case.mask, case.log_ratio, case.weighted_advantage)]
        labels, mask, log_ratio, weighted = moved
        case = replace(case, labels=labels, mask=mask, log_ratio=log_ratio, weighted_advantage=weighted)
        cells = case.cells().shared
        calls: dict[str, Callable[[], object]] = {
            "surrogate": lambda: case.surrogate(cells),  # type: ignore[arg-type]
            "token_coefficients": partial(token_coefficients, log_ratio, weighted, cells, case.hierarchy),
        }
        with device.passes("eager" if eager else "compiled"):
            calls[call]()
            with watched(DEVICE) as places:
                calls[call]()
    return places


@pytest.mark.parametrize("name", hierarchies())
@pytest.mark.parametrize(("call", "most"), [("surrogate", MOST_WAITS), ("token_coefficients", MOST_WAITS - 1)])
def test_the_host_seldom_waits(name: str, call: str, most: int):
    places = waits(name, call, eager=True)
    assert places, "the refusal of bad input alone is one"
    assert len(places) <= most, places


@pytest.mark.skipif(not ON_GPU, reason="no GPU, whose compiled passes this is about")
def test_the_host_waits_no_more_for_compiled_passes():
    if reason := device.no_compiler():
        pytest.skip(reason)
    assert len(waits("chain", "surrogate", eager=False)) <= MOST_WAITS


def test_a_wait_is_seen():
    with watched(DEVICE) as places:
        value = on_device(torch.arange(4.0), DEVICE)
    before = len(places)
    with watched(DEVICE) as places:
        value.sum().tolist()
        value[value > 1]
        float(value.amax())
        torch.tensor([1.0], device=value.device)
    assert len(places) == 4 and before <= 1


def test_mixing_host_and_device_is_refused():
    with watched(DEVICE):
        value = on_device(torch.arange(4.0), DEVICE)
        with pytest.raises(RuntimeError, match="device"):
            value + torch.arange(4.0)
