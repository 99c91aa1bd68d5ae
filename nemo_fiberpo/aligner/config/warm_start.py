"""The `warm_start` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_fiberpo.fields import Settings, setting


@dataclass(frozen=True)
class WarmStartSettings(Settings):
    """The supervised warm start of the quickstart, for examples/warm_start.py; other runs have no such section."""

    data: str = setting()
    """JSON lines of prompts with `response`."""

    steps: int = setting(at_least=1)
    """Maximum number of optimizer steps."""

    batch_size: int = setting(at_least=1)
    """Samples per optimizer step, over all ranks."""

    lr: float = setting(above=0)
    """Learning rate."""

    stop_reward: float = setting(at_least=0, at_most=1)
    """Mean reward at which a domain is learned. The warm start ends when all domains are."""

    rehearsal: float = setting(at_least=0, at_most=1)
    """Sampling weight of a learned domain, where the others have 1; it keeps the domain from being forgotten."""

    check_every: int = setting(at_least=1)
    """Optimizer steps between measurements of the reward."""

    check_prompts: int = setting(at_least=1)
    """Training prompts per domain on which the reward is measured."""
