"""Rewards by rules: responses graded against their prompts' records, in processes that can be killed."""

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

logger = logging.getLogger(__name__)

# Values of the column grader_failed. An answer that exhausts its time or memory has reward 0 like a wrong one: if it
# were left out of the loss, a policy would learn to hang the grader where it knows no answer.
OK, EXHAUSTED, CRASH = 0, 1, 2
_CODES: dict[Failure | None, int] = {None: OK, "timeout": EXHAUSTED, "memory": EXHAUSTED, "crash": CRASH}


def refuse_unsafe(records: Sequence[PromptRecord], unsafe_tasks: Collection[str]) -> None:
    """ValueError naming the first line whose task evaluates answers as Python and is not in `unsafe_tasks`."""
    for record in records:
        task = record.fields.get("task")
        if record.grader == "reasoning_gym" and task in UNSAFE_TASKS and task not in unsafe_tasks:
            raise ValueError(
                f"{record.where}: task: {task!r} of reasoning-gym evaluates answers as Python. An answer that runs "
                f"code sets its own reward, see docs/graders.md; rewards.unsafe_tasks=[{task}] accepts that"
            )


@dataclass(frozen=True)
class Scores:
    """Rewards of n responses. A response that could not be graded has reward 0.0 and says so in `failed`."""

    rewards: Tensor  # float32 [n]
    failed: list[Failure | None]
    reasons: list[str]  # "" where graded

    @property
    def codes(self) -> Tensor:
        """int64 [n]: 0 graded, 1 out of time or memory, 2 crash."""
        return torch.tensor([_CODES[failure] for failure in self.failed], dtype=torch.int64)


class RuleRewards:
    """Grades responses to `records` by their graders (see `graders.py`), `workers` processes at a time.

    score        "threshold": 1.0 for a score of at least 1, else 0.0; "raw": the score itself.
    on_failure   what becomes of a response whose grader crashed: "drop" (no loss, no part in a baseline) and "zero"
                 (reward 0) are for the trainer to apply, see `drops_failures`; "error" raises here, and for a response
                 that exhausts its time or memory too, which else has reward 0.
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
        """Whether a sample with grader_failed = CRASH is to be masked out of the loss and of every baseline."""
        return self.on_failure == "drop"

    def wait_until_ready(self) -> str:
        """Return when every worker has its graders loaded (seconds): the isolation that is in force, in words. Raise
        what is wrong with the graders."""
        return self._pool.wait_until_ready()

    def check_records(self, first: int = 0, step: int = 1) -> None:
        """Hold every `step`-th record, from `first` on, against its grader. ValueError naming the lines whose reference
        answer does not score 1, or whose prompt or a canary does (see `graders.checks`). A grader of one's own whose
        score is taken as it is owes no line a 1."""
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
