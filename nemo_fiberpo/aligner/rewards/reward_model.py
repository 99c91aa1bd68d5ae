"""The reward model of a run: graders, or NeMo-Aligner's reward-model server.

Both have the interface of the critic client of NeMo-Aligner's PPOTrainer (`infer_rm_critic`, `train`, `save`), with
values of zero, and add the column `grader_failed` to the rollout batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.aligner.data.prompts import Tokenizer
from nemo_fiberpo.aligner.rewards.critic import NoCritic
from nemo_fiberpo.prompts.records import PromptRecord
from nemo_fiberpo.rewards import CRASH, EXHAUSTED, OK, RuleRewards, Scores

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_failures(failed: int, answers: int, max_failed: float, reasons: Sequence[str]) -> None:
    """RuntimeError with the first reasons if more than a share `max_failed` of the responses was not graded. Counts are
    of all ranks, reasons of this one."""
    if failed > max_failed * answers:
        known = "; ".join(reasons[:3]) or "see the output of the other ranks for reasons"
        raise RuntimeError(
            f"{failed} of {answers} responses could not be graded, more than rewards.max_failed = "
            f"{max_failed:g}: {known}"
        )


def decode_responses(rollout_batch: dict[str, Tensor], tokenizer: Tokenizer) -> list[str]:
    """The response texts of a rollout batch.

    response_tokens int64 [B, S], prompt_lengths [B] and response_lengths [B] (prompt included). A text is the tokens
    [prompt_length, response_length) up to the first end-of-sequence token, decoded and stripped.
    """
    texts = []
    for row, start, stop in zip(
        rollout_batch["response_tokens"].tolist(),
        rollout_batch["prompt_lengths"].tolist(),
        rollout_batch["response_lengths"].tolist(),
        strict=True,
    ):
        tokens = row[start:stop]
        if tokenizer.eos_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_id)]
        texts.append(tokenizer.ids_to_text(tokens).strip())
    return texts


class RuleRewardModel(NoCritic):
    """Rewards from graders, as the reward model and critic of NeMo-Aligner's PPOTrainer.

    SPMD: `infer_rm_critic` is collective over the model-parallel group (TP x PP), whose ranks hold the same rollout
    batch. Its first rank grades and broadcasts. `options` are those of RuleRewards; `group` overrides the group
    (default: NeMo-Aligner's). `prompt_index` indexes `records`.
    """

    def __init__(
        self,
        records: Sequence[PromptRecord],
        tokenizer: Tokenizer,
        options: dict[str, Any] | None = None,
        group: ProcessGroup | None = None,
    ):
        self._records, self._tokenizer, self._group = records, tokenizer, group
        self._options = dict(options or {})
        self._rewards: RuleRewards | None = None
        self.max_failed: float = self._options.pop("max_failed", 0.5)
        self.reasons: list[str] = []  # the first three failures of the latest batch on this rank

    @property
    def drops_failures(self) -> bool:
        """Whether samples with grader_failed = CRASH are left out of the loss and of every baseline."""
        return self._options.get("on_failure", "drop") == "drop"

    def start(self) -> None:
        """Start the graders, on the ranks that grade, and check the data against them; the ranks share the lines.
        ValueError naming the lines that are wrong."""
        _, rank, source, _ = self._place()
        if rank != source:
            return
        self._rewards = RuleRewards(self._records, **self._options)
        isolation = self._rewards.wait_until_ready()
        if rank == 0:
            print(f"graders: isolation in force: {isolation}", flush=True)
        self._rewards.check_records(*self._share())

    def infer_rm_critic(self, rollout_batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rewards float32 [B] and values (zeros) float32 [B, S - 1] on the batch's device.

        Reads response_tokens, prompt_lengths, response_lengths and prompt_index [B]; adds grader_failed int64 [B] (0
        graded, 1 out of time or memory, 2 crash). RuntimeError on every rank if grading failed on the first.
        """
        tokens = rollout_batch["response_tokens"]
        size, rank, source, group = self._place()
        packed = torch.zeros(3, tokens.size(0), dtype=torch.float64, device=tokens.device)
        failure: Exception | None = None
        if rank == source:
            try:
                scores = self._grade(rollout_batch)
                packed[0], packed[1] = scores.rewards, scores.codes
            except Exception as error:  # the others wait in the broadcast
                failure, packed[2] = error, 1.0
        if size > 1:
            torch.distributed.broadcast(packed, src=source, group=group)
        if failure is not None:
            raise failure
        if bool((packed[2] > 0).any()):
            raise RuntimeError(f"grading failed on rank {source}; see its output")
        rollout_batch["grader_failed"] = packed[1].long()
        values = torch.zeros(tokens.size(0), tokens.size(1) - 1, device=tokens.device)
        return packed[0].float(), values

    def _grade(self, rollout_batch: dict[str, Tensor]) -> Scores:
        if self._rewards is None:
            self._rewards = RuleRewards(self._records, **self._options)
        indices = rollout_batch["prompt_index"].tolist()
        scores = self._rewards.score(indices, decode_responses(rollout_batch, self._tokenizer))
        reasons = [
            f"{self._records[index].where}: {reason}"
            for index, reason, failure in zip(indices, scores.reasons, scores.failed, strict=True)
            if failure
        ]
        self.reasons = reasons[:3] or self.reasons
        return scores

    def _share(self) -> tuple[int, int]:
        """Index of this rank among those that grade, and their number."""
        if self._group is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        from nemo_fiberpo.aligner.generation.inference_layout import generation_axis

        return generation_axis()[:2]

    def _place(self) -> tuple[int, int, int, ProcessGroup | None]:
        """Size of the model-parallel group, this rank, the rank that grades (both global) and the group."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 1, 0, 0, None
        group = self._group
        if group is None:
            from nemo_aligner.utils import parallel_state

            group = parallel_state.get_model_parallel_group()
        members = torch.distributed.get_process_group_ranks(group)
        return len(members), torch.distributed.get_rank(), members[0], group

    def close(self) -> None:
        """End the grading processes of this rank."""
        if self._rewards is not None:
            self._rewards.close()


def make_reward_model(settings: RewardSettings, records: Sequence[PromptRecord], tokenizer: Tokenizer) -> Any:
    """The reward model of the `rewards` section."""
    if settings.kind == "rules":
        return RuleRewardModel(records, tokenizer, settings.rule_options())
    from omegaconf import OmegaConf

    from nemo_fiberpo.aligner.rewards.server import RemoteRewardModel

    return RemoteRewardModel(OmegaConf.create(dict(settings.server or {})))


def zero_failures(rewards: Tensor, grader_failed: Tensor, drops_failures: bool) -> tuple[Tensor, Tensor]:
    """Rewards with 0 where the grader failed, and int64 [B]: 0 for samples left out of the loss and of every baseline.
    These are the crashes, if `drops_failures`; a response that exhausts its time or memory stays."""
    valid = grader_failed != CRASH if drops_failures else torch.ones_like(grader_failed, dtype=torch.bool)
    return torch.where(grader_failed != OK, 0.0, rewards), valid.long()


def reward_metrics(
    rewards: Tensor, domain: Tensor, grader_failed: Tensor, domains: Sequence[str], drops_failures: bool
) -> dict[str, float]:
    """Per domain: mean reward of the valid samples, and how many responses exhausted their time or memory, or crashed.

    All tensors [B], of the whole (gathered) rollout. Keys: "reward/{domain}", "grader_timeouts/{domain}",
    "grader_crashes/{domain}". A domain without samples has no "reward".
    """
    metrics: dict[str, float] = {}
    for number, name in enumerate(domains):
        here = domain == number
        counts = here & (grader_failed != CRASH) if drops_failures else here
        if bool(counts.any()):
            metrics[f"reward/{name}"] = rewards[counts].double().mean().item()
        metrics[f"grader_timeouts/{name}"] = float((here & (grader_failed == EXHAUSTED)).sum())
        metrics[f"grader_crashes/{name}"] = float((here & (grader_failed == CRASH)).sum())
    return metrics
