"""What PPOTrainer asks of a critic, where there is none."""

from __future__ import annotations

from typing import Any


class NoFuture:
    """The result of a save that had nothing to save."""

    def result(self) -> None:
        return None


class NoCritic:
    """The critic of a run that has a reward model only."""

    def train(self, ppo_rollout_data: Any) -> None:
        """There is no critic to train."""

    def save(self) -> NoFuture:
        """There is no critic to save."""
        return NoFuture()
