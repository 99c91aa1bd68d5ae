"""`exact_step` with megatron-core in bf16 on the device against float64 on the CPU, with every layer spec there is."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import gpt
from tests.gpu.cases import difference
from tests.gpu.gpt import Step

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.distributed

GRADIENT = 0.06
"""Bound on |g - g'| / |g'| of any parameter: some rounding errors of bf16 (2^-8 each) through two layers."""
LOG_PROBS = 0.1
"""Bound on differences of log-probs, in nats, for the same reason."""
GIVEN = 1e-4
"""Bound on what follows from the log-ratios, which are given: they are differences of float32 log-probs."""

Steps = dict[tuple[int, bool, bool], Step]


def _in_process(call: str, folder: Path, **environment: str) -> Any:
    """What a function of `gpt` wrote, in a process of its own: process groups and a GPU are used once in a process."""
    out = folder / "steps"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from tests.gpu import gpt; gpt.{call.format(path=repr(str(out)))}"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return pickle.loads(out.read_bytes())


@pytest.fixture(scope="module", params=gpt.SPECS)
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    if reason := gpt.missing(request.param):
        pytest.skip(reason)
    return _in_process(f"write_device_steps({request.param!r}, {{path}})", tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Step]:
    return _in_process("write_reference({path})", tmp_path_factory.mktemp("reference"), CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_gradients_are_those_of_float64(steps: Steps, reference: dict[bool, Step], microbatches: int, on_policy: bool):
    found, expected = steps[microbatches, on_policy, False], reference[on_policy]
    assert found.grads.keys() == expected.grads.keys()
    errors = {name: float((found.grads[name] - g).norm() / g.norm()) for name, g in expected.grads.items()}
    worst = max(errors, key=lambda name: errors[name])
    drift = float((found.log_probs - expected.log_probs).abs().max())
    print(
        f"gradient error {errors[worst]:.1e} ({worst}), log-probs {drift:.1e}, between D and A", found.recompute_error
    )
    assert errors[worst] <= GRADIENT, errors
    assert drift <= LOG_PROBS
    assert difference(found.coefficients, expected.coefficients) <= GIVEN
    assert found.recompute_error <= 1e-5


def test_loss_is_that_of_float64(steps: Steps, reference: dict[bool, Step]):
    expected = reference[False].loss
    assert expected is not None and reference[True].loss is None
    for microbatches in (1, 4):
        assert steps[microbatches, False, False].loss == pytest.approx(expected, rel=GIVEN)
        assert steps[microbatches, True, False].loss is None


def test_the_data_reach_beyond_the_budgets(reference: dict[bool, Step]):
    # Else a step without gates would pass.
    assert difference(reference[False].coefficients, reference[True].coefficients) > 0.1
    assert all(g.norm() > 0 for g in reference[False].grads.values())


def own_reads(step: Step) -> Counter[str]:
    """Reads of the host that are not Megatron's or its layers' own."""
    others = ("megatron/core/", "transformer_engine/", "apex/")
    return Counter(place for place in step.reads if not any(other in place for other in others))


def test_the_host_reads_nothing_per_micro_batch(steps: Steps):
    for on_policy in (False, True):
        one, four = (own_reads(steps[microbatches, on_policy, False]) for microbatches in (1, 4))
        assert one == four, (on_policy, four - one)
        every = len(steps[4, on_policy, False].reads)
        print(f"{'on' if on_policy else 'off'}-policy: {four.total()} reads of the host per step, of {every} in all")
    # And a policy that reads is noticed.
    assert (own_reads(steps[4, True, True]) - own_reads(steps[4, True, False])).total() == 8
