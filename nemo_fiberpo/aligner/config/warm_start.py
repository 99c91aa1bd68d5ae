"""The `warm_start` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fiberpo.fields import check, setting


@dataclass(frozen=True)
class WarmStartSettings:
    """The supervised warm start of the quickstart. examples/warm_start.py reads it; other runs have no such section."""

    data: str = setting()
    """JSON lines of prompts with `response`."""

    steps: int = setting(at_least=1)
    """Most optimizer steps."""

    batch_size: int = setting(at_least=1)
    """Samples per optimizer step, over all ranks."""

    lr: float = setting(above=0)
    """Learning rate."""

    stop_reward: float = setting(at_least=0, at_most=1)
    """Mean reward at which a domain has learned enough. The warm start ends when all domains have."""

    rehearsal: float = setting(at_least=0, at_most=1)
    """Share of such a domain in the batches, where the others have 1. It keeps the domain from being forgotten."""

    check_every: int = setting(at_least=1)
    """Optimizer steps between two measurements of the reward."""

    check_prompts: int = setting(at_least=1)
    """Training prompts per domain on which the reward is measured."""

    def __post_init__(self) -> None:
        check(self)
