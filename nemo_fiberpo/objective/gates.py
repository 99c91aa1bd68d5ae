"""The two scalar gates, each with its value and its slope: the aggregate gate (10) and the token clip (12)."""

from __future__ import annotations

from torch import Tensor, clamp, sign, where, zeros_like


def aggregate_gate(drift: Tensor, budget: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of g(x; C, k), equation (10), extended to negative x as an odd function.

        g(x) = x                             |x| <= C          pass-through, derivative 1
             = sgn(x) [C - k (|x| - C)]      C < |x| < C*      rollback,     derivative -k
             = 0                             |x| >= C*         zeroed,       derivative 0,   C* = C (1 + 1/k)

    The rollback is written as C - k (|x| - C), not (k+1) C - k |x|: the difference |x| - C is exact in floating point
    near C, so a window of width C / k survives k = 1e6.

    Args: `drift`, `budget` (> 0) and `slope` (> 0), in log-ratio units but for the slope, broadcastable; any dtype.
    Returns (g, dg/dx), shaped like the broadcast arguments.
    """
    size = drift.abs()
    passes = size <= budget
    room = budget - slope * (size - budget)
    value = where(passes, drift, sign(drift) * room.clamp_min(0.0))
    derivative = where(passes, 1.0, where(room > 0.0, -slope, zeros_like(room)))
    return value, derivative


def log_clip(residual: Tensor, token_clip: float, out: Tensor | None = None) -> Tensor:
    """Logarithm of the clip (12): clip(x, +-eps), elementwise. Its derivative is 1 where it returns x, else 0."""
    return clamp(residual, -token_clip, token_clip, out=out)
