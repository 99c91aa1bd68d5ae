"""The top-level keys of a run's config, and the sections `resume` and `pretrained_checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_fiberpo.fields import Settings, setting


@dataclass(frozen=True)
class RunSettings(Settings):
    """Top-level keys of a run's config."""

    name: str = setting("fiberpo")
    """Name of the run, for `run_dir` and the loggers."""

    run_dir: str | None = setting(None)
    """Folder of metrics, checkpoints and logs. The same command resumes the run in it."""

    data_dir: str | None = setting(None)
    """Folder of the quickstart's data and tokenizer; other runs do not use it."""

    seed: int = setting(1234, at_least=0, at_most=2**31 - 1)
    """Seed of prompt order, sampling and fresh weights."""

    cpu: bool = setting(False)
    """Whether to run without a GPU. Set `trainer.accelerator: cpu` too."""

    wandb: bool = setting(False)
    """Whether to log to Weights & Biases too, into the project of `exp_manager.wandb_logger_kwargs`. First `pip install
    'wandb<0.20'`, and log in with `wandb login` or set WANDB_MODE=offline."""

    collective_timeout: float = setting(1800.0, above=0)
    """Seconds before a rank gives up on the others, in every process group. Must exceed the longest time that a rank is
    busy by itself: grading, saving a checkpoint, generating a much longer response."""


@dataclass(frozen=True)
class ResumeSettings(Settings):
    """What may differ when a run is resumed."""

    allow: Sequence[str] = setting(default_factory=list, form="list of keys, such as [hierarchy, model.optim.lr]")
    """Keys, or sections, that may have a new value, in addition to those that may always change; see
    docs/checkpoints.md."""


@dataclass(frozen=True)
class PretrainedCheckpoint(Settings):
    """The policy that training starts from."""

    restore_from_path: str = setting()
    """A .nemo file or folder, such as `fiberpo import-hf` writes."""
