"""The `data` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fiberpo.fields import check, setting


@dataclass(frozen=True)
class DataSettings:
    """The prompts to train on and to hold out."""

    train: str = setting(may_change=True)
    """JSON lines of prompts to train on. Their format is in nemo_fiberpo/prompts/records.py. A resumed run may
    read the file from another path; its content counts."""

    heldout: str | None = setting(None, may_change=True)
    """JSON lines of prompts to evaluate on, before and after training and every `algorithm.val_check_interval` RL
    steps."""

    max_prompt_length: int = setting(512, at_least=1)
    """Longest prompt, in tokens."""

    too_long: str = setting("error", choices=("error", "drop"))
    """What happens to longer prompts: the run ends with an error, or they are left out."""

    heldout_greedy: bool = setting(False)
    """Whether held-out prompts are answered by greedy decoding too, beside sampling."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("train", "heldout"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: is empty; name a JSONL file")
