"""Rewards: by rules graded in killable processes, or by NeMo-Aligner's reward-model server.

Both are shaped like the critic client that NeMo-Aligner's PPOTrainer talks to (`infer_rm_critic`, `train`, `save`),
with values of zero, since there is no critic. Both add the column `grader_failed` to the rollout batch.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nemo_fiberpo.aligner.grader_pool import Failure, GraderPool
from nemo_fiberpo.aligner.graders import GRADER_FIELDS, UNSAFE_TASKS
from nemo_fiberpo.aligner.prompts import PromptRecord, Tokenizer
from nemo_fiberpo.aligner.settings import RewardSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

OK, TIMEOUT, CRASH = 0, 1, 2  # values of the column grader_failed
_CODES: dict[Failure | None, int] = {None: OK, "timeout": TIMEOUT, "crash": CRASH}


def refuse_unsafe(records: Sequence[PromptRecord], unsafe_tasks: Collection[str]) -> None:
    """ValueError naming the first line whose task evaluates answers as Python and is not in `unsafe_tasks`."""
    for record in records:
        task = record.fields.get("task")
        if record.grader == "reasoning_gym" and task in UNSAFE_TASKS and task not in unsafe_tasks:
            raise ValueError(
                f"{record.where}: task: {task!r} of reasoning-gym evaluates answers as Python. An answer that runs "
                f"code sets its own reward, see docs/graders.md; rewards.unsafe_tasks=[{task}] accepts that"
            )


def stop_if_ungraded(failed: int, answers: int, max_failed: float, reasons: Sequence[str]) -> None:
    """RuntimeError with the first reasons if more than that share of the answers could not be graded. The counts are
    of all ranks, the reasons those that this rank knows."""
    if failed > max_failed * answers:
        known = "; ".join(reasons[:3]) or "the reasons are in the output of other ranks"
        raise RuntimeError(
            f"{failed} of {answers} answers could not be graded, a share of more than rewards.max_failed = "
            f"{max_failed:g}: {known}"
        )


@dataclass(frozen=True)
class Scores:
    """Rewards of n responses. A response that could not be graded has reward 0.0 and says so in `failed`."""

    rewards: Tensor  # float32 [n]
    failed: list[Failure | None]
    reasons: list[str]  # "" where graded

    @property
    def codes(self) -> Tensor:
        """int64 [n]: 0 graded, 1 timeout, 2 crash."""
        return torch.tensor([_CODES[failure] for failure in self.failed], dtype=torch.int64)


class RuleRewards:
    """Grades responses to `records` by their graders (see `graders.py`), `workers` processes at a time.

    score        "threshold": 1.0 for a score of at least 1, else 0.0; "raw": the score itself.
    on_failure   what becomes of a response whose grader timed out or crashed: "drop" (no loss, no part in a baseline)
                 and "zero" (reward 0) are for the trainer to apply, see `drops_failures`; "error" raises here.
    time_limit   seconds of wall clock per response.
    graders      graders of one's own: {name: "package.module:function"}.
    unsafe_tasks tasks of reasoning-gym that evaluate answers as Python and may do so here; others are refused.

    ValueError for an unknown option, or naming the line of a task that is refused; RuntimeError if a grader cannot be
    loaded, from `wait_until_ready` or the first `score`.
    """

    def __init__(
        self,
        records: Sequence[PromptRecord],
        *,
        workers: int = 1,
        time_limit: float = 2.0,
        memory_limit_mib: int = 4096,
        score: Literal["threshold", "raw"] = "threshold",
        on_failure: Literal["drop", "zero", "error"] = "drop",
        graders: dict[str, str] | None = None,
        unsafe_tasks: Collection[str] = (),
    ):
        refuse_unsafe(records, unsafe_tasks)
        for name, value, valid in (
            ("score", score, ("threshold", "raw")),
            ("on_failure", on_failure, ("drop", "zero", "error")),
        ):
            if value not in valid:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(valid)}")
        self.records, self._score, self.on_failure = list(records), score, on_failure
        self._targets = targets = {name: name for name in GRADER_FIELDS} | (graders or {})
        samples = {(record.grader, record.fields.get("task")): record.fields for record in reversed(self.records)}
        self._pool = GraderPool(
            graders={name: targets[name] for name in sorted({record.grader for record in self.records})},
            samples=[(grader, fields) for (grader, _), fields in samples.items()],
            workers=workers,
            time_limit=time_limit,
            memory_limit_mib=memory_limit_mib,
        )

    @property
    def drops_failures(self) -> bool:
        """Whether a sample with grader_failed > 0 is to be masked out of the loss and of every baseline."""
        return self.on_failure == "drop"

    def wait_until_ready(self) -> str:
        """Return when every worker has its graders loaded (seconds): the isolation that is in force, in words. Raise
        what is wrong with the graders."""
        return self._pool.wait_until_ready()

    def check_records(self, first: int = 0, step: int = 1) -> None:
        """Hold every `step`-th record, from `first` on, against its grader. ValueError naming the lines whose reference
        answer does not score 1, or whose prompt or a canary does (see `grader_checks.complaint`). A grader of one's own
        whose score is taken as it is owes no line a 1."""
        own = [self._score == "raw" and self._is_own(record.grader) for record in self.records]
        records = [record for record, free in zip(self.records, own, strict=True) if not free][first::step]
        lines = [
            (record.grader, record.fields, {"prompt": record.prompt, "response": record.response}) for record in records
        ]
        outcomes = self._pool.grade(lines)
        again = [number for number, outcome in enumerate(outcomes) if outcome.failure == "timeout"]
        for number, outcome in zip(again, self._pool.grade([lines[number] for number in again]), strict=True):
            outcomes[number] = outcome
        wrong = [f"{record.where}: {outcomes[n].reason}" for n, record in enumerate(records) if outcomes[n].failure]
        if wrong:
            more = f"\nand {len(wrong) - 10} more of {len(records)} lines" if len(wrong) > 10 else ""
            raise ValueError("\n".join(wrong[:10]) + more)

    def _is_own(self, grader: str) -> bool:
        return self._targets[grader] != grader

    def score(self, prompt_indices: Sequence[int], responses: Sequence[str]) -> Scores:
        """Grade `responses[i]` against the record `prompt_indices[i]`. The text goes to the grader as it is.

        RuntimeError naming prompt and response if a grader failed and on_failure is "error".
        """
        records = [self.records[index] for index in prompt_indices]
        items = [(record.grader, record.fields, text) for record, text in zip(records, responses, strict=True)]
        outcomes = self._pool.grade(items)
        failures = [number for number, outcome in enumerate(outcomes) if outcome.failure]
        if failures:
            first = failures[0]
            message = (
                f"{len(failures)} of {len(outcomes)} answers could not be graded; the first, to "
                f"{records[first].where}: {outcomes[first].failure}, {outcomes[first].reason}; "
                f"the answer was {responses[first][:200]!r}"
            )
            if self.on_failure == "error":
                raise RuntimeError(message)
            logger.warning(message)
        raw = torch.tensor([outcome.score for outcome in outcomes], dtype=torch.float64)
        rewards = (raw >= 1.0).float() if self._score == "threshold" else raw.float()
        return Scores(rewards, [outcome.failure for outcome in outcomes], [outcome.reason for outcome in outcomes])

    def close(self) -> None:
        """End the grading processes."""
        self._pool.close()

    def __enter__(self) -> RuleRewards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def decode_responses(rollout_batch: dict[str, Tensor], tokenizer: Tokenizer) -> list[str]:
    """The response texts of a rollout batch.

    response_tokens int64 [B, S], prompt_lengths [B] and response_lengths [B] (prompt included). A text is the tokens
    [prompt_length, response_length) up to the first end-of-sequence token, decoded, without white space at its ends.
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


class NoFuture:
    """The result of a save that had nothing to save."""

    def result(self) -> None:
        return None


class RuleRewardModel:
    """Rule rewards as the reward model and critic of NeMo-Aligner's PPOTrainer.

    SPMD: `infer_rm_critic` is collective over the model-parallel group (TP x PP), whose ranks hold the same rollout
    batch. Its first rank grades and broadcasts, so the others get the same bits and start no process. `options` are
    those of RuleRewards; `group` overrides the group (default: NeMo-Aligner's). `prompt_index` counts in `records`.
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
        self.reasons: list[str] = []  # why this rank could not grade answers: the first three of the latest batch
        refuse_unsafe(records, self._options.get("unsafe_tasks") or ())

    @property
    def drops_failures(self) -> bool:
        """Whether a sample with grader_failed > 0 is to be masked out of the loss and of every baseline."""
        return self._options.get("on_failure", "drop") == "drop"

    def start(self) -> None:
        """Start the graders now, on the ranks that grade, so that what is wrong with them shows before training. These
        ranks share the check of every line of data against its grader: ValueError naming the lines that are wrong."""
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

        Reads response_tokens, prompt_lengths, response_lengths and prompt_index [B]; adds grader_failed int64 [B]
        (0 graded, 1 timeout, 2 crash) to `rollout_batch`. RuntimeError on every rank if grading failed on the first.
        """
        tokens = rollout_batch["response_tokens"]
        size, rank, source, group = self._place()
        packed = torch.zeros(3, tokens.size(0), dtype=torch.float64, device=tokens.device)
        failure: Exception | None = None
        if rank == source:
            try:
                scores = self._grade(rollout_batch)
                packed[0], packed[1] = scores.rewards, scores.codes
            except Exception as error:  # told to the others first: they wait in the broadcast
                failure, packed[2] = error, 1.0
        if size > 1:
            torch.distributed.broadcast(packed, src=source, group=group)
        if failure is not None:
            raise failure
        if bool((packed[2] > 0).any()):
            raise RuntimeError(f"grading failed on rank {source}; the reason is in its output")
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
        """Number of this rank among those that grade, and how many they are."""
        if self._group is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        from nemo_fiberpo.aligner.inference_layout import generation_axis

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

    def train(self, ppo_rollout_data: Any) -> None:
        """There is no critic to train."""

    def save(self) -> NoFuture:
        """There is no critic to save."""
        return NoFuture()

    def close(self) -> None:
        """End the grading processes of this rank, if it has any."""
        if self._rewards is not None:
            self._rewards.close()


def make_reward_model(settings: RewardSettings, records: Sequence[PromptRecord], tokenizer: Tokenizer) -> Any:
    """The reward model that the `rewards` section asks for: rules graded here, or NeMo-Aligner's server."""
    if settings.kind == "rules":
        return RuleRewardModel(records, tokenizer, settings.rule_options())
    from omegaconf import OmegaConf

    from nemo_fiberpo.aligner.remote_rewards import RemoteRewardModel

    return RemoteRewardModel(OmegaConf.create(dict(settings.server or {})))


def reward_metrics(
    rewards: Tensor, domain: Tensor, grader_failed: Tensor, domains: Sequence[str], drops_failures: bool
) -> dict[str, float]:
    """Per domain: mean reward of the samples that count, and how many answers timed out or crashed their grader.

    All tensors [B], of the whole (gathered) rollout. Keys: "reward/{domain}", "grader_timeouts/{domain}",
    "grader_crashes/{domain}". A domain without samples has no "reward" key: 0 would be a claim.
    """
    metrics: dict[str, float] = {}
    for number, name in enumerate(domains):
        here = domain == number
        counts = here & (grader_failed == OK) if drops_failures else here
        if bool(counts.any()):
            metrics[f"reward/{name}"] = rewards[counts].double().mean().item()
        metrics[f"grader_timeouts/{name}"] = float((here & (grader_failed == TIMEOUT)).sum())
        metrics[f"grader_crashes/{name}"] = float((here & (grader_failed == CRASH)).sum())
    return metrics
