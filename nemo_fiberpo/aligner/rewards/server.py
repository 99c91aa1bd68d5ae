"""Rewards from NeMo-Aligner's reward-model server, without a critic."""

from __future__ import annotations

from typing import Any

import torch
from nemo_aligner.utils.server_utils import FutureResult
from omegaconf import DictConfig
from torch import Tensor

from nemo_fiberpo.aligner.rewards.critic import NoCritic
from nemo_fiberpo.rewards import OK


class _RewardsOnly(FutureResult):
    """Waits for the server; `result()` is (rewards float32 [B], values of zero [B, S - 1]) on every rank."""

    def __init__(self, future: FutureResult, tokens: Tensor):
        self._future, self._tokens = future, tokens

    def result(self) -> tuple[Tensor, Tensor]:
        rewards = self._future.result().flatten()
        batch, length = self._tokens.shape
        if rewards.numel() != batch:
            raise RuntimeError(f"the reward server sent {rewards.numel()} rewards for {batch} responses")
        if not bool(torch.isfinite(rewards).all()):
            raise RuntimeError("the reward server sent a reward that is not finite")
        return rewards, torch.zeros(batch, length - 1, device=rewards.device)


class RemoteRewardModel(NoCritic):
    """The reward model and critic of PPOTrainer, with `RemoteGPTRMClient`: the server of NeMo-Aligner's
    `serve_reward_model.py`.

    `cfg` is that client's: {reward_model: {ip, port, name}, pad_to_length}. SPMD: the client sends from the first rank
    of the model-parallel group and broadcasts the answer within it.
    """

    drops_failures = False  # a server that fails ends the run
    max_failed = 1.0
    reasons: tuple[str, ...] = ()

    def __init__(self, cfg: DictConfig, client: Any = None):
        if client is None:
            from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient  # needs pytriton

            client = RemoteGPTRMClient(cfg)
        self._client = client

    def infer_rm_critic(self, rollout_batch: dict[str, Tensor]) -> FutureResult:
        """Send the batch; returns a future of (rewards [B], values [B, S - 1]). Adds grader_failed = 0 to the batch."""
        tokens = rollout_batch["response_tokens"]
        rollout_batch["grader_failed"] = torch.full((tokens.size(0),), OK, device=tokens.device)
        return _RewardsOnly(self._client.infer_rm(rollout_batch), tokens)

    def start(self) -> None:
        """Nothing to start: the server is another job's."""

    def close(self) -> None:
        """Close the connection, whose thread would keep the process alive."""
        self._client.communicator.close()
