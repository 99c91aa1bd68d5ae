"""How long an optimizer step and our reductions in it take: estimates, from the assumptions of `cluster`.

    flops of a step = 8 N D + 8 L a d s D      forward and backward 6 N per token, the forward pass that measures the
                                               log-ratios 2 N; attention over s tokens, causal, likewise
    a reduction     = 2 ceil(log2 ranks) latency + 2 bytes / bandwidth
N parameters that a token is multiplied by, D tokens of the step, L layers, a heads of width d, s tokens per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .assumptions import Assumptions
from .layout import Layout
from .shape import ModelShape


@dataclass(frozen=True)
class Times:
    """Seconds of an off-policy optimizer step with rows of maximum length, and of our reductions in it."""

    step: float
    reductions: float

    @property
    def share(self) -> float:
        return self.reductions / (self.step + self.reductions)


def times(
    shape: ModelShape, layout: Layout, samples: int, length: int, passes: int, calls: int, size: int, given: Assumptions
) -> Times:
    """The times of a step of `samples` rows of `length` tokens in `passes` forward passes, with `calls` reductions of
    `size` bytes in total."""
    tokens = samples * length
    forward = 2 * shape.multiplied + 2 * shape.layers * shape.heads * shape.head_dim * length
    flops = (2 + passes) * forward * tokens
    step = flops / (layout.world * given.peak_tflops * 1e12 * given.mfu)
    hops = 2 * math.ceil(math.log2(layout.world)) if layout.world > 1 else 0
    reductions = calls * hops * given.latency_us * 1e-6
    if layout.world > 1:
        reductions += 2 * size / (given.bandwidth_gb_per_s * 1e9)
    return Times(step, reductions)
