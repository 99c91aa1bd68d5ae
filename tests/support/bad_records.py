"""Prompts with real graders, one whose grader breaks where the answer says so (see bad_graders.py), and a tokenizer."""

from __future__ import annotations

from pathlib import Path

from nemo_fiberpo.prompts.records import PromptRecord
from nemo_fiberpo.rewards import RuleRewards

HERE = str(Path(__file__).parent)
BAD = {"bad": "bad_graders:grade"}
LIMIT = 1.5  # seconds for an answer: long for one that does nothing, also where the machine is busy


def bad(answer: str = "7") -> PromptRecord:
    return PromptRecord("p", "d", "bad", {"answer": answer}, "made.jsonl:1")


def rewards_of(*responses: str, **options) -> tuple[list[float], list[str | None], list[str]]:
    with RuleRewards([bad()], graders=BAD, time_limit=LIMIT, **options) as rewards:
        scores = rewards.score([0] * len(responses), list(responses))
    return scores.rewards.tolist(), scores.failed, scores.reasons


def sum_entry() -> dict:
    return {"answer": "5", "metadata": {}, "question": "2 - 4 + 7 ="}


def gym(task: str, entry: dict, **fields) -> PromptRecord:
    return PromptRecord("p", "d", "reasoning_gym", {"task": task, "entry": entry, **fields}, "made.jsonl:1")


class Letters:
    """A tokenizer: letters are their code points, 0 ends a sequence."""

    eos_id = 0

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))
