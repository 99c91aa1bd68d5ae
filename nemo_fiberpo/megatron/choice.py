"""Two passes over all micro-batches, or an optimistic step: by what second passes have cost at this place so far."""

from __future__ import annotations

from typing import Any

from nemo_fiberpo.megatron.optimistic import optimistic_step
from nemo_fiberpo.megatron.step import StepResult, exact_step
from nemo_fiberpo.step_cost import FORWARD, FORWARD_RECOMPUTED, pays

RECENT = 0.3  # weight of the newest share in the running mean
RETRY = 16  # an optimistic step is tried again at every such visit to a place where it does not pay


class StepChoice:
    """Running means of the share of micro-batches that second passes ran over, by place in the rollout.

    Shares are the same on all ranks, hence so are the choices. A place without a mean of its own takes that of the
    place before, as policies drift away from the one of the rollout. Means are not saved: they change what a step
    costs, and its rounding, but not its gradient.
    """

    def __init__(self) -> None:
        self._share: dict[int, float] = {}
        self._visits: dict[int, int] = {}

    def optimistic(self, place: int, forward: float = FORWARD) -> bool:
        """Whether the optimistic step is taken at a visit to the place; `forward` is the cost of a forward pass."""
        self._visits[place] = self._visits.get(place, 0) + 1
        known = self._share.get(place, self._share.get(place - 1, 0.0))
        return pays(known, forward) or self._visits[place] % RETRY == 0

    def note(self, place: int, share: float) -> None:
        """Record the share of an optimistic step."""
        before = self._share.get(place, share)
        self._share[place] = before + RECENT * (share - before)

    def step(self, place: int, guessed: Any, *given: Any, **options: Any) -> StepResult:
        """`optimistic_step` with the cells `guessed`, or `exact_step`; arguments as those.

        place   optimizer steps since the old log-probs were computed, at least 1
        """
        policy, microbatches, tokens, *rest = given
        recomputed = getattr(policy.config, "recompute_granularity", None) == "full"
        if not self.optimistic(place, FORWARD_RECOMPUTED if recomputed else FORWARD):
            return exact_step(*given, **options)
        result = optimistic_step(policy, microbatches, tokens, guessed, *rest, **options)
        assert result.second_share is not None
        self.note(place, result.second_share)
        return result
