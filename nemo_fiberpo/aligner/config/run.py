"""The keys of a run's config that stand outside its sections, and the short sections `resume` and
`pretrained_checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_fiberpo.fields import check, setting


@dataclass(frozen=True)
class RunSettings:
    """Keys at the top level of a run's config."""

    name: str = setting("fiberpo")
    """Name of the run, for `run_dir` and the loggers."""

    run_dir: str | None = setting(None)
    """Folder of metrics, checkpoints and logs. The run in it is resumed when the same command is given again."""

    data_dir: str | None = setting(None)
    """Folder of the quickstart's data and tokenizer. Other runs do not read it."""

    seed: int = setting(1234, at_least=0, at_most=2**31 - 1)
    """Seed of prompt order, sampling and fresh weights."""

    cpu: bool = setting(False)
    """Whether to run without a GPU. Set `trainer.accelerator: cpu` too."""

    wandb: bool = setting(False)
    """Whether to log to Weights & Biases too. Log in with `wandb login`, or set WANDB_MODE=offline; the project is that
    of `exp_manager.wandb_logger_kwargs`."""

    collective_timeout: float = setting(1800.0, above=0)
    """Seconds before a rank gives up on the others. It holds in every process group, and must be longer than a rank can
    be busy by itself: grading, saving a checkpoint, a response far longer than the others."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ResumeSettings:
    """What may differ when a run is resumed."""

    allow: Sequence[str] = setting(default_factory=list, form="list of keys, such as [hierarchy, model.optim.lr]")
    """Keys, or sections, that may have another value than before. All others must be as they were, but for those that
    may always change; see docs/checkpoints.md."""

    def __post_init__(self) -> None:
        if not isinstance(self.allow, list) or not all(isinstance(key, str) and key for key in self.allow):
            raise ValueError(f"allow: must be a list of keys, such as [hierarchy, model.optim.lr], got {self.allow!r}")


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """The policy that training starts from."""

    restore_from_path: str = setting()
    """A .nemo file or folder, such as `fiberpo import-hf` writes."""

    def __post_init__(self) -> None:
        check(self)
