"""Rewards from graders, which run in processes that can be killed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemo_fiberpo.graders.builtin import GRADER_FIELDS, UNSAFE_TASKS
from nemo_fiberpo.graders.pool import Failure, GraderPool
from nemo_fiberpo.prompts.records import PromptRecord
from nemo_fiberpo.values import one_of

logger = logging.getLogger(__name__)

# Values of the column grader_failed. A response that exhausts its time or memory has reward 0, like a wrong one: if it
# were left out of the loss, a policy would learn to hang the grader.
OK, EXHAUSTED, CRASH = 0, 1, 2
_CODES: dict[Failure | None, int] = {None: OK, "timeout": EXHAUSTED, "memory": EXHAUSTED, "crash": CRASH}


def refuse_unsafe(records: Sequence[PromptRecord], unsafe_tasks: Collection[str]) -> None:
    """ValueError naming the first line whose task evaluates responses as Python and is not in `unsafe_tasks`."""
    for record in records:
        task = record.fields.get("task")
        if record.grader == "reasoning_gym" and task in UNSAFE_TASKS and task not in unsafe_tasks:
            raise ValueError(
                f"{record.where}: task: {task!r} of reasoning-gym evaluates responses as Python, by which a response "
                f"can set its own reward, see docs/graders.md; rewards.unsafe_tasks=[{task}] accepts that"
            )


@dataclass(frozen=True)
class Scores:
    """Rewards of n responses; 0.0 where `failed` is set."""

    rewards: Tensor  # float32 [n]
    failed: list[Failure | None]
    reasons: list[str]  # "" where graded

    @property
    def codes(self) -> Tensor:
        """int64 [n]: 0 graded, 1 out of time or memory, 2 crash."""
        return torch.tensor([_CODES[failure] for failure in self.failed], dtype=torch.int64)


class RuleRewards:
    """Grades responses to `records` with their graders, in `workers` processes.

    score        "threshold": 1.0 for a score of at least 1, else 0.0; "raw": the score itself
    on_failure   for a response whose grader crashed: "drop" and "zero" are left to the caller; "error" raises here,
                 also for exhausted time or memory, which otherwise gives reward 0
    time_limit   wall-clock seconds per response
    graders      custom graders: {name: "package.module:function"}
    unsafe_tasks tasks of reasoning-gym that may evaluate responses as Python; others that do are refused

    ValueError for an unknown option, or naming the line of a refused task; RuntimeError from `wait_until_ready` or the
    first `score` if a grader cannot be loaded.
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
        one_of(score, "score", ("threshold", "raw"))
        one_of(on_failure, "on_failure", ("drop", "zero", "error"))
        self.records, self._score, self._on_failure = list(records), score, on_failure
        self._targets = targets = {name: name for name in GRADER_FIELDS} | (graders or {})
        samples = {(record.grader, record.fields.get("task")): record.fields for record in reversed(self.records)}
        self._pool = GraderPool(
            graders={name: targets[name] for name in sorted({record.grader for record in self.records})},
            samples=[(grader, fields) for (grader, _), fields in samples.items()],
            workers=workers,
            time_limit=time_limit,
            memory_limit_mib=memory_limit_mib,
        )

    def wait_until_ready(self) -> str:
        """Wait until every worker has loaded its graders; returns a description of the isolation in force. Raises the
        graders' errors."""
        return self._pool.wait_until_ready()

    def check_records(self, first: int = 0, step: int = 1) -> None:
        """Check every `step`-th record, from `first` on, against its grader. ValueError naming the lines whose
        reference answer does not score 1, or whose prompt or a canary does (see `graders.checks`). Custom graders with
        raw scores are exempt."""
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
        """Grade `responses[i]` against the record `prompt_indices[i]`.

        RuntimeError naming prompt and response if a grader failed and on_failure is "error".
        """
        records = [self.records[index] for index in prompt_indices]
        items = [(record.grader, record.fields, text) for record, text in zip(records, responses, strict=True)]
        outcomes = self._pool.grade(items)
        failures = [number for number, outcome in enumerate(outcomes) if outcome.failure]
        if failures:
            first = failures[0]
            message = (
                f"{len(failures)} of {len(outcomes)} responses could not be graded; the first, to "
                f"{records[first].where}: {outcomes[first].failure}, {outcomes[first].reason}; "
                f"the response was {responses[first][:200]!r}"
            )
            if self._on_failure == "error":
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
