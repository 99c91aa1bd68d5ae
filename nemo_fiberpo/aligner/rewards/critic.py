"""The critic interface that PPOTrainer needs, without a critic."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any


class NoCritic:
    """The critic of a run that has only a reward model."""

    def train(self, ppo_rollout_data: Any) -> None:
        """Nothing to train."""

    def save(self) -> Future[None]:
        """Nothing to save; a future that is done."""
        done: Future[None] = Future()
        done.set_result(None)
        return done
