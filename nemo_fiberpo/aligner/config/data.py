"""The `data` section of a run's config: which prompts."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fiberpo.aligner.config.fields import choice, whole

TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class DataSettings:
    """train and heldout are JSONL files (see `prompts.py`); prompts of more than max_prompt_length tokens are an error
    or dropped. `heldout_greedy` evaluates the held-out prompts by greedy decoding in addition to sampling."""

    train: str
    heldout: str | None = None
    max_prompt_length: int = 512
    too_long: str = "error"
    heldout_greedy: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: is empty; name a JSONL file")
        whole(self, "max_prompt_length", 1)
        choice(self, "too_long", TOO_LONG)
