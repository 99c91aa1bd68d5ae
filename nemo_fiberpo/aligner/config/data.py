"""The `data` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fiberpo.fields import Settings, setting


@dataclass(frozen=True)
class DataSettings(Settings):
    """The prompts to train on and to hold out."""

    train: str = setting(may_change=True)
    """JSON lines of prompts to train on, see docs/data.md for their format. A resumed run may read the same content
    from another path."""

    heldout: str | None = setting(None, may_change=True)
    """JSON lines of prompts to evaluate on, before and after training and every `algorithm.val_check_interval` RL
    steps."""

    max_prompt_length: int = setting(512, at_least=1)
    """Longest prompt, in tokens."""

    too_long: str = setting("error", choices=("error", "drop"))
    """What happens to longer prompts: `error` ends the run, `drop` leaves them out."""

    heldout_greedy: bool = setting(False)
    """Whether to evaluate held-out prompts with greedy decoding as well as sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "heldout"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: is empty; name a JSONL file")
