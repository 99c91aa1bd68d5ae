"""FiberPO written out token by token from the equations, in plain Python: slow, obvious, no code of the package.

Values are floats, or `Dual` numbers that carry a gradient, so the same loops give the derivative by the chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


class Dual:
    """A number with its gradient: a dict from token index to partial derivative."""

    def __init__(self, value: float, grad: dict[int, float] | None = None) -> None:
        self.value, self.grad = value, grad or {}

    @staticmethod
    def of(number: Dual | float) -> Dual:
        return number if isinstance(number, Dual) else Dual(float(number))

    def _with(self, other: Dual | float, value: float, by_self: float, by_other: float) -> Dual:
        other = Dual.of(other)
        keys = {**self.grad, **other.grad}
        return Dual(value, {k: by_self * self.grad.get(k, 0.0) + by_other * other.grad.get(k, 0.0) for k in keys})

    def __add__(self, other: Dual | float) -> Dual:
        return self._with(other, self.value + Dual.of(other).value, 1.0, 1.0)

    def __sub__(self, other: Dual | float) -> Dual:
        return self._with(other, self.value - Dual.of(other).value, 1.0, -1.0)

    def __mul__(self, other: Dual | float) -> Dual:
        other = Dual.of(other)
        return self._with(other, self.value * other.value, other.value, self.value)

    def __truediv__(self, number: float) -> Dual:
        return self * (1.0 / number)

    def exp(self) -> Dual:
        return self._with(0.0, math.exp(self.value), math.exp(self.value), 0.0)


@dataclass
class Level:
    """One stratum: the cell of each token, budgets (C+, C-) and slope k by cell; a floor, which branches alone read."""

    cell: Sequence[int]
    budget: Callable[[int], tuple[float, float]]
    slope: Callable[[int, int], float]  # (cell, token count) -> k
    floor: int = 0


def aggregate_gate(x: Dual, budget: float, slope: float) -> Dual:
    """(10), case by case."""
    zeroed_from = budget * (1.0 + 1.0 / slope)
    if abs(x.value) <= budget:
        return x
    if abs(x.value) < zeroed_from:
        return (Dual((slope + 1.0) * budget) - x * slope) if x.value > 0 else (x * -slope - (slope + 1.0) * budget)
    return Dual(0.0)


def clip(x: Dual, eps: float) -> Dual:
    return x if abs(x.value) <= eps else Dual(math.copysign(eps, x.value))


def gated_log_ratios(
    ell: Sequence[float], live: Sequence[bool], levels: Sequence[Level], eps: float
) -> dict[int, Dual]:
    """MASTER: L_i = sum_l [ sum_n g(M_n^l - M_{n-1}^l) + clip(a_i^l - M_K^l) ] for every live token i."""
    tokens = [i for i in range(len(ell)) if live[i]]
    channel = {}
    for i in tokens:
        own = Dual(ell[i], {i: 1.0})
        channel[i] = (own, Dual(0.0)) if ell[i] >= 0 else (Dual(0.0), own)
    means = []
    for level in levels:
        mean: dict[int, tuple[Dual, Dual]] = {}
        for cell in {level.cell[i] for i in tokens}:
            members = [i for i in tokens if level.cell[i] == cell]
            sums = [Dual(0.0), Dual(0.0)]
            for i in members:
                sums = [sums[side] + channel[i][side] for side in (0, 1)]
            mean[cell] = (sums[0] / len(members), sums[1] / len(members))
        means.append(mean)
    out = {}
    for i in tokens:
        total = Dual(0.0)
        for side in (0, 1):
            above = Dual(0.0)
            for level, mean in zip(levels, means, strict=True):
                cell = level.cell[i]
                count = sum(1 for j in tokens if level.cell[j] == cell)
                here = mean[cell][side]
                total = total + aggregate_gate(here - above, level.budget(cell)[side], level.slope(cell, count))
                above = here
            total = total + clip(channel[i][side] - above, eps)
        out[i] = total
    return out


def objective(
    ell: Sequence[float], weight: Sequence[float], live: Sequence[bool], levels: Sequence[Level], eps: float
) -> tuple[float, list[float], list[float]]:
    """J = sum_i w_i A_i exp(L_i), dJ/d ell for every token (0 where masked), and L (0 where masked)."""
    return evaluated(gated_log_ratios(ell, live, levels, eps), weight)


def evaluated(gated: Mapping[int, Dual], weight: Sequence[float]) -> tuple[float, list[float], list[float]]:
    """J, dJ/d ell and L for every token (0 where masked), from L of the live tokens."""
    total = Dual(0.0)
    for i, value in gated.items():
        total = total + value.exp() * weight[i]
    coefficients = [total.grad.get(i, 0.0) for i in range(len(weight))]
    return total.value, coefficients, [gated[i].value if i in gated else 0.0 for i in range(len(weight))]
