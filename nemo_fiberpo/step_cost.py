"""What the passes of an optimizer step cost, and measured shares of second passes: what the training step, a plan of it
and docs/performance.md go by. A cost of 1 is one forward and backward pass over all micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

FORWARD = 0.32
"""Cost of the forward pass by which two passes exceed one forward and backward pass."""
FORWARD_RECOMPUTED = 0.25
"""The same where the backward pass recomputes all activations, so that 1 includes two forward passes."""

SHUFFLED, WHOLE_GROUPS, BY_DOMAIN = "shuffled", "whole groups", "whole groups, by domain"


@dataclass(frozen=True)
class MeasuredShares:
    """f at the off-policy steps of a rollout, in their order, of rows dealt to micro-batches in an arrangement."""

    run: str
    rows: str
    microbatches: int
    shares: tuple[float, ...]


MEASURED = (
    MeasuredShares("quickstart", SHUFFLED, 2, (0.08, 0.42, 0.75)),
    MeasuredShares("quickstart", SHUFFLED, 8, (0.04, 0.41, 0.70)),
    MeasuredShares("quickstart", WHOLE_GROUPS, 2, (0.00, 0.25, 0.58)),
    MeasuredShares("quickstart", WHOLE_GROUPS, 8, (0.00, 0.24, 0.56)),
    MeasuredShares("quickstart", BY_DOMAIN, 8, (0.00, 0.17, 0.44)),
    MeasuredShares("study", SHUFFLED, 2, (0.00, 0.75, 1.00)),
    MeasuredShares("study", SHUFFLED, 8, (0.00, 0.66, 0.78)),
    MeasuredShares("study", WHOLE_GROUPS, 2, (0.00, 0.25, 0.50)),
    MeasuredShares("study", WHOLE_GROUPS, 8, (0.00, 0.25, 0.47)),
    MeasuredShares("study", BY_DOMAIN, 8, (0.00, 0.16, 0.31)),
)
"""By benchmarks/second_pass.py, with 4 optimizer steps a rollout."""


def pays(share: float, forward: float) -> bool:
    """Whether an optimistic step that is expected to repeat this share of its micro-batches is taken, by the cost of a
    forward pass."""
    return share < forward


def auto_cost(shares: Sequence[float], forward: float) -> float:
    """Mean cost of steps with `passes: auto`, from f at each place in the rollout and the cost of a forward pass."""
    return fmean(1.0 + (share if pays(share, forward) else forward) for share in shares)


def auto_forward_passes(shares: Sequence[float], forward: float) -> float:
    """Their mean number of forward passes; those of optimistic steps have a backward pass each."""
    return fmean(1.0 + (share if pays(share, forward) else 1.0) for share in shares)
