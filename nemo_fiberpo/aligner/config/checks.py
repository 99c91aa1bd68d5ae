"""Every check of a run's config that needs only the config. Each error is a ValueError that names the key."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.model_checks import check_all_forward, model_problems, partition_table
from nemo_fiberpo.aligner.config.precision import check_precision
from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.aligner.config.sections import (
    algorithm_settings,
    check_resume,
    cluster_settings,
    data_settings,
    hierarchy_section,
    pretrained_checkpoint,
    reward_settings,
    run_settings,
    warm_start_settings,
)
from nemo_fiberpo.budget_warnings import budget_warnings, log_budget_warnings
from nemo_fiberpo.labelling.token_labels import TokenLabels
from nemo_fiberpo.nemo_config.keys import check_nemo_keys
from nemo_fiberpo.objective import ExpertPartitions, Hierarchy, check_gating
from nemo_fiberpo.plain import as_plain, named_references
from nemo_fiberpo.plan.batches import Batches
from nemo_fiberpo.plan.lengths import too_long
from nemo_fiberpo.values import short

Attempt = Callable[[Callable[[], Any]], Any]
_REQUIRED = ("hierarchy", "algorithm", "data", "rewards", "model", "trainer", "exp_manager", "pretrained_checkpoint")
_OPTIONAL = ("warm_start", "cluster", "resume")  # null is the same as absent
# Logger, the name of its package, -> what pip installs. NeMo's protobuf is too old for later versions of wandb.
_LOGGERS = {"wandb": "'wandb<0.20'", "mlflow": "mlflow", "clearml": "clearml", "neptune": "neptune"}


@dataclass(frozen=True)
class RunConfig:
    """The parsed sections of a config. Where errors are collected rather than raised, a faulty section is None."""

    hierarchy: Hierarchy
    partitions: ExpertPartitions | None
    token_labels: TokenLabels | None
    algorithm: AlgorithmSettings
    data: DataSettings
    rewards: RewardSettings


def _call(check: Callable[[], Any]) -> Any:
    return check()


def read_config(cfg: DictConfig, attempt: Attempt = _call) -> RunConfig:
    """Parse and check the sections, each and together; logs `budget_warnings`. Raises ValueError naming the field.

    attempt  calls its argument; `fiberpo plan` passes one that returns None on an error, to collect all errors
    """
    attempt(lambda: check_shape(cfg))
    # Typed as in training, where none of them is None.
    hierarchy, partitions, labels = cast(
        "tuple[Hierarchy, Any, Any]", attempt(lambda: check_sections(cfg)) or (None, None, None)
    )
    algorithm = attempt(lambda: algorithm_settings(cfg))
    data = attempt(lambda: data_settings(cfg))
    rewards = attempt(lambda: reward_settings(cfg))
    attempt(lambda: pretrained_checkpoint(cfg))
    if cfg.get("warm_start") is not None:
        attempt(lambda: warm_start_settings(cfg))
    attempt(lambda: check_precision(cfg.trainer.get("precision")))
    attempt(lambda: check_accelerator(cfg))
    if algorithm is not None and data is not None:
        attempt(lambda: algorithm.check_data(data))
    if algorithm is not None and hierarchy is not None:
        soft = partitions.soft_columns if partitions is not None else ()
        attempt(lambda: check_gating(algorithm.gating_map, hierarchy, soft))
        attempt(lambda: algorithm.check_passes(hierarchy.active, cfg.model.micro_batch_size))
    if algorithm is not None and algorithm.all_forward:
        attempt(lambda: check_all_forward(cfg.model, algorithm.kept_on == "host"))
    attempt(lambda: check_nemo_keys(cfg))
    return RunConfig(hierarchy, partitions, labels, algorithm, data, rewards)


def read_training_config(cfg: DictConfig) -> RunConfig:
    """`read_config`, plus what only training requires: all references resolve, the host is NeMo-Aligner, loggers are
    installed, and the actor supports the `model` section. The checkpoint's own config is merged on loading."""
    with named_references():
        config = read_config(cfg)
        check_host(cfg)
        as_plain(cfg)
        check_loggers(cfg)
        for problem in model_problems(cfg.model, cfg.get("cpu", False)):
            raise ValueError(problem)
        check_batches(cfg, 1)
        check_lengths(cfg)
        if config.partitions is not None and "num_moe_experts" in cfg.model:
            partition_table(config.partitions, cfg.model)
        return config


def check_shape(cfg: DictConfig) -> None:
    """Check that sections are mappings and that top-level keys are known and of their types."""
    with named_references():
        given = run_settings(cfg)
    for key in ("name", "run_dir"):
        if getattr(given, key) == "":
            raise ValueError(f"{key}: is empty")
    for name in (*_REQUIRED, *_OPTIONAL):
        with named_references(name):
            section = cfg.get(name)
        if not isinstance(section, DictConfig) and (section is not None or name in _REQUIRED):
            raise ValueError(f"{name}: must be a mapping, got {short(section)}")


def check_sections(cfg: DictConfig) -> tuple[Hierarchy, ExpertPartitions | None, TokenLabels | None]:
    """Parse the hierarchy and check the sections that nothing else reads; logs `budget_warnings`."""
    check_resume(cfg)
    if (cfg.get("trainer") or {}).get("max_time") is not None:
        raise ValueError(
            f"trainer.max_time: {cfg.trainer.max_time!r} would stop Lightning's own loop, which does not run here; set "
            "exp_manager.max_time_per_run"
        )
    parsed = hierarchy_section(cfg)
    log_budget_warnings(budget_warnings(parsed[0]), "hierarchy: ")
    return parsed


def check_loggers(cfg: DictConfig) -> None:
    """ValueError for a logger whose package is not installed."""
    for name, requirement in _LOGGERS.items():
        key = f"create_{name}_logger"
        if cfg.exp_manager.get(key) and importlib.util.find_spec(name) is None:
            key = "wandb" if name == "wandb" and cfg.get("wandb") else f"exp_manager.{key}"
            raise ValueError(f"{key}: needs the package {name}, which is not installed; pip install {requirement}")


def check_graders(graders: Mapping[str, str] | None) -> None:
    """ValueError naming the custom grader whose module or function does not exist."""
    for name, target in (graders or {}).items():
        module, _, function = target.partition(":")
        where = f"rewards.graders.{name}: {target}"
        try:
            found = getattr(importlib.import_module(module), function, None)
        except ImportError as error:
            raise ValueError(
                f"{where}: {error}. Modules are searched on Python's path and beside the run config"
            ) from error
        except Exception as error:
            raise ValueError(f"{where}: importing {module} fails with {type(error).__name__}: {error}") from error
        if not callable(found):
            raise ValueError(f"{where}: the module has no function {function!r}")


def check_host(cfg: DictConfig) -> None:
    """ValueError for a layout that is not for NeMo-Aligner, see `cluster.host`."""
    host = cluster_settings(cfg).host
    if host != "nemo_aligner":
        raise ValueError(
            f"cluster.host: {host}; this layout is for a custom trainer on nemo_fiberpo.megatron, see "
            "docs/parallelism.md; NeMo-Aligner cannot run it, `fiberpo plan` can plan it"
        )


def on_cpu(cfg: DictConfig) -> bool:
    """Whether the ranks have no GPU."""
    return bool(cfg.get("cpu", False)) or cfg.trainer.get("accelerator") == "cpu"


def check_accelerator(cfg: DictConfig) -> None:
    """ValueError if the two keys that choose CPU or GPU disagree."""
    accelerator, cpu = cfg.trainer.get("accelerator"), bool(cfg.get("cpu", False))
    if cpu and accelerator not in ("cpu", "auto", None):
        raise ValueError(f"trainer.accelerator: {accelerator!r}, but cpu is true; set it to cpu, or cpu to false")
    if accelerator == "cpu" and not cpu:
        raise ValueError(
            "trainer.accelerator: cpu, but cpu is false; set cpu to true too, or trainer.accelerator to gpu"
        )


def batch_sizes(cfg: DictConfig) -> Batches:
    """The batch sizes of a run."""
    algorithm, ppo = cfg.algorithm, cfg.model.ppo
    return Batches(
        prompts=algorithm.prompts_per_rollout,
        group=algorithm.samples_per_prompt,
        steps=algorithm.get("optimizer_steps", 1),
        micro=cfg.model.micro_batch_size,
        forward=ppo.forward_micro_batch_size,
        generation=ppo.rollout_micro_batch_size,
    )


def check_batches(cfg: DictConfig, data_parallel_size: int, context_parallel_size: int = 1) -> None:
    """ValueError naming the batch size that does not fit the others, see `Batches.problems`."""
    for problem in batch_sizes(cfg).problems(data_parallel_size, context_parallel_size):
        raise ValueError(problem)


def check_lengths(cfg: DictConfig) -> None:
    """ValueError naming the key of the model that the longest prompt and response exceed."""
    for problem in too_long(cfg.model, data_settings(cfg).max_prompt_length):
        raise ValueError(problem)
