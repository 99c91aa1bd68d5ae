"""Gates as functions: values by hand, oddness, the identity at 0, derivatives; a user's own; what is refused."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nemo_fiberpo as fpo
from nemo_fiberpo.objective.gates import GATES, Gate, aggregate_gate, check_gate, find_gate, log_clip
from tests.objective.cases import F64, Case, branched_case, expert_case, make_case, make_hierarchy, with_gates
from tests.objective.checks import equals_the_slow_loops, is_one_process_on_ranks, is_the_identity_on_policy


def at(gate: Gate, x: list[float], budget: float, slope: float) -> tuple[list[float], list[float]]:
    """Values and derivatives."""
    value, derivative = gate(torch.tensor(x, dtype=F64), *(torch.tensor(v, dtype=F64) for v in (budget, slope)))
    return value.tolist(), derivative.tolist()


def test_the_rollback_gate_by_hand():
    # C = 1/4, k = 2: C* = 3/8
    value, derivative = at(GATES["rollback"], [0.25, 0.3125, 0.375, 1.0, -0.3125], 0.25, 2.0)
    assert value == [0.25, 0.125, 0.0, 0.0, -0.125] and derivative == [1.0, -2.0, 0.0, 0.0, -2.0]


def test_the_clip_gate_by_hand():
    value, derivative = at(GATES["clip"], [0.0, 0.25, 0.26, 9.0, -0.26, -0.25], 0.25, 2.0)
    assert value == [0.0, 0.25, 0.25, 0.25, -0.25, -0.25] and derivative == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_soft_gate_by_hand():
    # g(C) = C / sqrt(e) with slope 0, g(2 C) = 2 C / e^2 with slope -3 / e^2; C sqrt(2 ln 2): half of x
    value, derivative = at(GATES["soft"], [0.0, 0.5, -1.0, 0.5 * math.sqrt(2 * math.log(2))], 0.5, 7.0)
    expected = [0.0, 0.5 / math.sqrt(math.e), -1.0 / math.e**2, 0.25 * math.sqrt(2 * math.log(2))]
    assert value == pytest.approx(expected, abs=1e-15)
    assert derivative == pytest.approx([1.0, 0.0, -3.0 / math.e**2, 0.5 * (1 - 2 * math.log(2))], abs=1e-15)
    assert max(value) == value[1], "its peak is at C"


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("budget", "slope"), [(0.03, 2.0), (0.15, 40.0)])
def test_gates_are_odd_bounded_and_the_identity_to_first_order(name: str, budget: float, slope: float):
    gate, c, k = GATES[name], torch.tensor(budget, dtype=F64), torch.tensor(slope, dtype=F64)
    x = torch.linspace(0.0, 6 * budget, 601, dtype=F64)
    value, derivative = gate(x, c, k)
    mirrored, same = gate(-x, c, k)
    assert torch.equal(mirrored, -value) and torch.equal(same, derivative)
    assert value[0] == 0 and derivative[0] == 1 and value.max() <= budget
    inside = x <= gate.passes * budget
    assert torch.equal(value[inside], x[inside]) and (derivative[inside] == 1).all()
    kinks = torch.stack(list(gate.kinks(c, k))) if name != "soft" else torch.empty(0, dtype=F64)
    smooth = (x[:, None] - kinks).abs().gt(1e-6).all(1)
    difference = (gate(x + 1e-7, c, k)[0] - gate(x - 1e-7, c, k)[0]) / 2e-7
    torch.testing.assert_close(derivative[smooth], difference[smooth], rtol=1e-6, atol=1e-7 * slope)
    for kink in kinks:  # where it says, the derivative does jump
        left, right = gate(kink * (1 - 1e-9), c, k)[1], gate(kink * (1 + 1e-9), c, k)[1]
        assert left != right
    check_gate(gate)


def test_the_token_clip_by_hand():
    eps = torch.tensor(0.1, dtype=F64)
    assert log_clip(torch.tensor([-9.0, -0.1, 0.05, 0.2], dtype=F64), eps).tolist() == [-0.1, -0.1, 0.05, 0.1]


# In hierarchies


def gated(case: Case, *gates: str) -> Case:
    return replace(case, hierarchy=with_gates(case.hierarchy, *gates))


@pytest.mark.parametrize("gates", [("soft",), ("clip",), ("clip", "soft", "rollback")], ids="-".join)
@pytest.mark.parametrize("scale", (0.02, 0.15))
def test_hierarchies_of_other_gates_equal_the_slow_loops(gates: tuple[str, ...], scale: float):
    cases = [make_case(3, 1, scale), expert_case("P2", 2, scale, soft=True), branched_case("in two places", 3, scale)]
    for case in cases:
        equals_the_slow_loops(gated(case, *gates))


def test_other_gates_on_policy_and_over_ranks():
    for case in (make_case(3, 4), branched_case("after, swept three times", 4)):
        mixed = gated(case, "soft", "clip")
        is_the_identity_on_policy(mixed)
        is_one_process_on_ranks(mixed, torch.arange(40) % 3, 3)


def test_the_gate_of_a_hierarchy_is_that_of_every_stratum_without_one():
    case = branched_case("in two places", 5, 0.15)
    of_strata = gated(case, "soft")
    of_hierarchy = replace(case, hierarchy=replace(case.hierarchy, gate="soft"))
    found, expected, without = (one.surrogate().coefficients for one in (of_hierarchy, of_strata, case))
    assert torch.equal(found, expected) and not torch.equal(found, without)
    mixed = replace(case, hierarchy=replace(with_gates(case.hierarchy, "soft", "clip"), gate="rollback"))
    equals_the_slow_loops(mixed)


def test_a_clip_gate_has_no_push_back_by_hand():
    # one trajectory of two tokens, M+ = 0.3 beyond C = 0.1: L = 0.1, and nothing of the common drift in the gradient
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.1, 0.1), gate="clip"),), 1.0)
    cells = hierarchy.cells({"trajectory": torch.zeros(2, dtype=torch.int64)})
    ell, weight = torch.full((2,), 0.3, dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    assert fpo.gated_log_ratio(ell, cells, hierarchy).tolist() == pytest.approx([0.1, 0.1], abs=1e-16)
    # c = y - mean(y), y = e^0.1 (1, 3)
    e = math.exp(0.1)
    assert fpo.token_coefficients(ell, weight, cells, hierarchy).tolist() == pytest.approx([-e, e], abs=1e-15)
    metrics = fpo.surrogate(ell, weight, cells, hierarchy).report.metrics()
    assert metrics["trajectory/pos/zeroed"] == 1.0, "beyond the budget with a derivative of 0"


def test_a_hierarchy_says_which_gates_it_has():
    hierarchy = make_hierarchy(1, gate="soft")
    assert "gate soft" in hierarchy.describe() and "gate soft" not in make_hierarchy(1).describe()
    assert hierarchy.strata[0].gate is GATES["soft"] and make_hierarchy(1).strata[0].gate is None
    assert hierarchy.gate is GATES["rollback"] and hierarchy.describe().splitlines()[-1].split() == ["gate", "rollback"]
    assert hierarchy != make_hierarchy(1) and hierarchy == make_hierarchy(1, gate=GATES["soft"])


# A user's own

MODULE = """
import torch
from nemo_fiberpo.objective import Gate


def tanh(x, budget, slope):
    y = torch.tanh(x / budget)
    return budget * y, 1.0 - y * y


def _flat(x, budget, slope):
    return x.clamp(-1, 1) * budget / budget.clamp_min(1.0), (x.abs() <= 1).double()


named = Gate("called otherwise", tanh)
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with gates, found on sys.path."""
    (tmp_path / "gates_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "gates_of_a_user"
    sys.modules.pop("gates_of_a_user", None)


def test_a_function_of_a_module_is_a_gate_by_its_name(module: str):
    for name in ("tanh", "named"):
        gate = find_gate(f"{module}:{name}")
        assert gate.name == f"{module}:{name}" and gate.passes == 0.0
        case = make_case(2, 5, 0.1)
        case.hierarchy = with_gates(case.hierarchy, f"{module}:{name}")
        assert f"gate {module}:{name}" in case.hierarchy.describe()
        value, cells = case.surrogate().value, case.cells
        leaf = case.log_ratio.clone().requires_grad_()
        out = fpo.gated_log_ratio(leaf, cells, case.hierarchy)
        torch.where(case.mask, case.weight * out.exp(), 0.0).sum().backward()
        torch.testing.assert_close(leaf.grad, case.surrogate().coefficients, rtol=1e-13, atol=1e-14)
        assert value != gated(case, "rollback").surrogate().value
        is_the_identity_on_policy(case)


def test_a_users_gate_by_hand(module: str):
    # one cell, u = v = 0: L = C tanh(M / C)
    hierarchy = fpo.Hierarchy((fpo.Stratum("trajectory", fpo.Budget(0.2, 0.1), gate=f"{module}:tanh"),), 1.0)
    cells = hierarchy.cells({"trajectory": torch.zeros(3, dtype=torch.int64)})
    for drift, budget in ((0.3, 0.2), (-0.3, 0.1)):
        out = fpo.gated_log_ratio(torch.full((3,), drift, dtype=F64), cells, hierarchy)
        assert out.tolist() == pytest.approx([budget * math.tanh(drift / budget)] * 3, abs=1e-15)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rolback", "gate: must be one of rollback, clip, soft, or package.module:function, got 'rolback'"),
        (None, "gate: must be one of .*, got None"),
        (3, "gate: must be one of .*, got 3"),
        (aggregate_gate, "gate: must be one of .*, got <function"),
        ("a:b:c", "gate: must be one of .*, got 'a:b:c'"),
        ("no_such_module:f", "gate: 'no_such_module:f' cannot be imported: No module named 'no_such_module'"),
        ("gates_of_a_user:f", "gate: 'gates_of_a_user:f' cannot be imported: .*no attribute 'f'"),
        (":f", "gate: ':f' cannot be imported: Empty module name"),
        (".gates:aggregate_gate", "gate: '.gates:aggregate_gate' cannot be imported"),
        ("gates_of_a_user:number", "gate: 'gates_of_a_user:number' is no function and no Gate, but 3"),
        ("gates_of_a_user:_flat", r"gate: 'gates_of_a_user:_flat' has a derivative .* finite differences \(x = "),
        ("math:sin", "gate: 'math:sin' fails on float64 tensors: TypeError"),
    ],
)
def test_what_is_no_gate_is_refused(given: object, message: str, module: str):
    def of_stratum(gate: object) -> fpo.Stratum:
        return fpo.Stratum("a", fpo.Budget(1, 1), gate=gate)

    def of_hierarchy(gate: object) -> fpo.Hierarchy:
        return fpo.Hierarchy((fpo.Stratum("a", fpo.Budget(1, 1)),), token_clip=1, gate=gate)

    # A stratum without a gate has that of its hierarchy.
    for use in (find_gate, of_hierarchy, *([of_stratum] if given is not None else [])):
        with pytest.raises(ValueError, match=f"^{message}"):
            use(given)


def soft(x: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    return GATES["soft"](x, budget, slope)


def changed(change) -> Gate:
    """The soft gate with something else for its value and derivative."""
    return Gate("mine", lambda x, c, k: change(x, c, *soft(x, c, k)))


BROKEN = {
    "is not finite": changed(lambda x, c, g, d: (torch.where(x.abs() > 3 * c, math.nan, g), d)),
    "is not 0 at x = 0": changed(lambda x, c, g, d: (g + 1e-9, d)),
    "has a derivative other than 1 at x = 0": changed(lambda x, c, g, d: (2.0 * g, 2.0 * d)),
    "is not odd": changed(lambda x, c, g, d: (torch.where(x < 0, 0.5 * g, g), d)),
    "does not pass exactly up to 1 C": Gate("mine", soft, passes=1.0),
    "has a derivative that differs from finite differences": changed(lambda x, c, g, d: (g, torch.ones_like(d))),
    "fails on float64 tensors": Gate("mine", lambda x, c, k: x * undefined),  # type: ignore[name-defined]  # noqa: F821
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_gate_that_breaks_a_promise_is_refused_with_where(problem: str):
    with pytest.raises(ValueError, match=rf"^gate: 'mine' {problem}") as error:
        check_gate(BROKEN[problem])
    if "fails" not in problem:
        assert "(x = " in str(error.value) and "C = " in str(error.value) and "k = " in str(error.value)


def test_a_kink_that_is_tried_must_be_declared():
    """The largest drift that is tried is 10 C: a clip there has a derivative of 1, where differences say .5."""

    def wide(x: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        return GATES["clip"](x, 10.0 * budget, slope)

    check_gate(Gate("mine", wide, passes=10.0, kinks=lambda budget, slope: (10.0 * budget,)))
    with pytest.raises(ValueError, match="differs from finite differences"):
        check_gate(Gate("mine", wide, passes=10.0))
