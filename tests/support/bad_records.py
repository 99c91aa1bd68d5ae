"""A prompt whose grader breaks where the answer says so, see bad_graders.py, and a tokenizer for it."""

from __future__ import annotations

from pathlib import Path

from nemo_fiberpo.aligner.data.records import PromptRecord

HERE = str(Path(__file__).parent)
BAD = {"bad": "bad_graders:grade"}


def bad(answer: str = "7") -> PromptRecord:
    return PromptRecord("p", "d", "bad", {"answer": answer}, "made.jsonl:1")


class Letters:
    """A tokenizer: letters are their code points, 0 ends a sequence."""

    eos_id = 0

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))
