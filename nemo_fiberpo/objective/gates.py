"""Gates: the bounded response to a drift, with its derivative. The aggregate gate (10) and others, and the token clip.

A gate is a function (x, budget, slope) -> (value, derivative) of float64 tensors: the drift x of cells, of either sign;
their budgets C > 0; their slopes k > 0. It is odd, g(0) = 0 and g'(0) = 1, so that on-policy the Jacobian is the
identity. The paper leaves open what lies beyond C (E.5.2).

A gate passes where |X| <= C; beyond, it rolls back where its derivative is not 0, else it is zeroed (with the gate (10)
from C* = C (1 + 1/k)). What the nine combinations of a cell's two channels mean, see diagnostics/regimes.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

STATES = ("pass", "rollback", "zeroed")
GLOBAL_REGIMES = (
    "G-I", "G-II,r", "G-II", "G-III,r", "G-III",
    "pos rollback, neg pass", "pos zeroed, neg pass", "pos rollback, neg rollback", "pos zeroed, neg rollback",
)  # fmt: skip
REGIMES = GLOBAL_REGIMES[:5]  # those with a name in the paper; the others are "other" in a report
_REGIME = (0, 1, 2, 5, 7, 3, 6, 8, 4)  # index into GLOBAL_REGIMES by 3 x the state of pos + the state of neg


@lru_cache(maxsize=1024)
def constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Nested tuples of numbers as a tensor, to be read only. Kept: the host waits for each copy to a GPU."""
    return torch.tensor(values, dtype=dtype, device=device)


GateFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gate:
    """A gate with what is known of it."""

    name: str  # how a config calls it
    function: GateFunction  # (x, budget, slope) -> (value, derivative), elementwise over broadcastable float64 tensors
    # up to |x| = passes * C the value is x and the derivative 1, both exactly; 0 for a gate that bends at once
    passes: float = 0.0
    # (budget, slope) -> the |x| at which the derivative may jump
    kinks: Callable[[Tensor, Tensor], Sequence[Tensor]] = lambda budget, slope: ()

    def __call__(self, drift: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(drift, budget, slope)


def aggregate_gate(drift: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of g(x; C, k), (10), extended to negative x as an odd function.

        g(x) = x                             |x| <= C          pass-through, derivative 1
             = sgn(x) [C - k (|x| - C)]      C < |x| < C*      rollback,     derivative -k
             = 0                             |x| >= C*         zeroed,       derivative 0,   C* = C (1 + 1/k)

    Written as C - k (|x| - C), not (k+1) C - k |x|: near C the difference |x| - C is exact in floating point, so that a
    window of width C / k survives k = 1e6. Args: drift and budget (> 0) in nats, slope (> 0); broadcastable, any dtype.
    """
    size = drift.abs()
    passes = size <= budget
    room = budget - slope * (size - budget)
    value = torch.where(passes, drift, drift.sign() * room.clamp_min(0.0))
    derivative = torch.where(passes, 1.0, torch.where(room > 0.0, -slope, torch.zeros_like(room)))
    return value, derivative


def zeroed_from(budget: Tensor, slope: Tensor) -> Tensor:
    """C* = C (1 + 1/k), the drift from which the aggregate gate (10) is 0."""
    return budget * (1.0 + 1.0 / slope)


def clip_gate(drift: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """g(x) = clip(x, +-C): saturates at the budget, derivative 0 beyond, so nothing pushes back. `slope` is unused."""
    value = torch.minimum(torch.maximum(drift, -budget), budget)
    return value, (drift.abs() <= budget).to(drift.dtype)


def soft_gate(drift: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """g(x) = x exp(-(x / C)^2 / 2), g'(x) = (1 - (x / C)^2) exp(-(x / C)^2 / 2): smooth, the identity to second order
    at 0, with its peak of .61 C at x = C. Beyond, it falls to 0 without ever being flat. `slope` is unused."""
    square = (drift / budget).square()
    falling = torch.exp(-0.5 * square)
    return drift * falling, (1.0 - square) * falling


GATES = {
    "rollback": Gate("rollback", aggregate_gate, 1.0, lambda budget, slope: (budget, zeroed_from(budget, slope))),
    "clip": Gate("clip", clip_gate, 1.0, lambda budget, slope: (budget,)),
    "soft": Gate("soft", soft_gate),
}


def states(drift: Tensor, budget: Tensor, derivative: Tensor) -> Tensor:
    """Index into STATES of every gate, from its drift, budget and derivative."""
    return torch.where(drift.abs() <= budget, 0, torch.where(derivative != 0, 1, 2))


def regimes(state_2C: Tensor) -> Tensor:
    """Index into GLOBAL_REGIMES of every cell, from the states of its two channels."""
    return constant(_REGIME, torch.int64, state_2C.device)[3 * state_2C[0] + state_2C[1]]


def log_clip(residual: Tensor, token_clip: Tensor) -> Tensor:
    """Logarithm of the token clip (12): clip(x, +-eps), elementwise. Its derivative is 1 where it returns x, else 0."""
    return residual.clamp(-token_clip, token_clip)


def find_gate(given: object) -> Gate:
    """The gate that a config calls `given`: a name of `GATES`, "package.module:function" of a gate function or of a
    `Gate`, or a `Gate` itself. One that is not ours is checked, see `check_gate`. ValueError names the field `gate`."""
    if isinstance(given, str) and given in GATES:
        return GATES[given]
    if isinstance(given, str) and given.count(":") == 1:
        module, _, name = given.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"gate: {given!r} cannot be imported: {error}") from error
        if not isinstance(found, Gate) and not callable(found):
            raise ValueError(f"gate: {given!r} is no function and no Gate, but {found!r}")
        gate = replace(found, name=given) if isinstance(found, Gate) else Gate(given, found)
    elif isinstance(given, Gate):
        gate = given
    else:
        raise ValueError(f"gate: must be one of {', '.join(GATES)}, or package.module:function, got {given!r}")
    if gate not in GATES.values():
        check_gate(gate)
    return gate


def check_gate(gate: Gate) -> None:
    """ValueError where a gate breaks what is promised of gates, see the module and `Gate`; tried at many drifts,
    budgets and slopes, and the derivative against central differences away from the kinks that it declares."""
    budget = torch.tensor([0.003, 0.04, 1.0], dtype=torch.float64)[:, None, None]
    slope = torch.tensor([0.5, 1.0, 32.0, 1000.0], dtype=torch.float64)[None, :, None]
    size = budget * torch.cat([torch.zeros(1), torch.logspace(-3, 1, 400)]).double()

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            value, derivative = gate(x, budget, slope)
            return value.expand(3, 4, -1), derivative.expand(3, 4, -1)
        except Exception as error:
            raise ValueError(f"gate: {gate.name!r} fails on float64 tensors: {error!r}") from error

    (value, derivative), (mirrored, mirrored_derivative) = at(size), at(-size)
    step = 1e-6 * size.clamp_min(1e-3 * budget)
    difference = (at(size + step)[0] - at(size - step)[0]) / (2.0 * step)
    smooth = torch.ones_like(value, dtype=torch.bool)
    for kink in gate.kinks(budget, slope):
        smooth &= (size - kink).abs() > 2.0 * step
    inside = size <= gate.passes * budget
    problems = {
        "is not finite": ~(value.isfinite() & derivative.isfinite()),
        "is not 0 at x = 0": (size == 0) & (value != 0),
        "has a derivative other than 1 at x = 0": (size == 0) & (derivative != 1),
        "is not odd": (mirrored != -value) | (mirrored_derivative != derivative),
        f"does not pass exactly up to {gate.passes:g} C": inside & ((value != size) | (derivative != 1)),
        "has a derivative that differs from finite differences": smooth
        & ((difference - derivative).abs() > 1e-4 * (1.0 + derivative.abs())),
    }
    for problem, where in problems.items():
        if bool(where.any()):
            place = tuple(where.nonzero()[0].tolist())
            x, c, k = (float(t.expand(3, 4, size.shape[-1])[place]) for t in (size, budget, slope))
            raise ValueError(f"gate: {gate.name!r} {problem} (x = {x:.6g}, C = {c:g}, k = {k:g})")
