"""Every check of a run's config that needs nothing but the config, for training, `fiberpo check` and `fiberpo plan`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.model_checks import partition_table
from nemo_fiberpo.aligner.config.nemo import check_precision
from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.aligner.config.sections import (
    algorithm_settings,
    check_resume,
    cluster_settings,
    data_settings,
    hierarchy_section,
    reward_settings,
    run_settings,
    token_labels_section,
)
from nemo_fiberpo.budget_warnings import budget_warnings, log_budget_warnings
from nemo_fiberpo.labelling.token_labels import TokenLabels
from nemo_fiberpo.objective import ExpertPartitions, Hierarchy, check_gating
from nemo_fiberpo.plan.batches import Batches
from nemo_fiberpo.plan.lengths import too_long

T = TypeVar("T")
Attempt = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class RunConfig:
    """The sections of a config, parsed. Where problems are collected instead of raised, a section that has one is
    None."""

    hierarchy: Hierarchy
    partitions: ExpertPartitions | None
    token_labels: TokenLabels | None
    algorithm: AlgorithmSettings
    data: DataSettings
    rewards: RewardSettings


def _directly(check: Callable[[], T]) -> T:
    return check()


def read_config(cfg: DictConfig, attempt: Attempt = _directly) -> RunConfig:
    """Parse and check the sections, alone and together.

    attempt   calls what it is given; one that returns None for an error, as `fiberpo plan` has it, finds all of them

    Raises ValueError naming the field. Logs `budget_warnings`.
    """
    # Typed as in training, where none is None.
    hierarchy, partitions = cast("tuple[Hierarchy, Any]", attempt(lambda: check_sections(cfg)) or (None, None))
    algorithm = attempt(lambda: algorithm_settings(cfg))
    data = attempt(lambda: data_settings(cfg))
    rewards = attempt(lambda: reward_settings(cfg))
    attempt(lambda: check_precision(cfg.trainer.precision))
    attempt(lambda: check_accelerator(cfg))
    if algorithm is not None and data is not None:
        attempt(lambda: algorithm.check_data(data))
    if algorithm is not None and hierarchy is not None:
        soft = partitions.soft_columns if partitions is not None else ()
        attempt(lambda: check_gating(algorithm.gating_map, hierarchy, soft))
        attempt(lambda: algorithm.check_passes(hierarchy.active, cfg.model.micro_batch_size))
    labels = token_labels_section(cfg) if hierarchy is not None else None
    return RunConfig(hierarchy, partitions, labels, algorithm, data, rewards)


def read_training_config(cfg: DictConfig) -> RunConfig:
    """`read_config`, with what is an error in training only: another host, and lengths and experts that the model's
    config rules out by itself. The policy's own config joins it when the policy is loaded."""
    config = read_config(cfg)
    check_host(cfg)
    check_lengths(cfg)
    if config.partitions is not None and "num_moe_experts" in cfg.model:
        partition_table(config.partitions, cfg.model)
    return config


def check_sections(cfg: DictConfig) -> tuple[Hierarchy, ExpertPartitions | None]:
    """Refuse unknown sections; the hierarchy, and how it partitions experts, if it does. ValueError names the field.
    Logs `budget_warnings`."""
    if run_settings(cfg).wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: true, but the package is not installed; pip install wandb, or set it to false")
    check_resume(cfg)
    if (cfg.get("trainer") or {}).get("max_time") is not None:
        raise ValueError(
            f"trainer.max_time: {cfg.trainer.max_time!r} would stop Lightning's own loop, which does not run here; set "
            "exp_manager.max_time_per_run"
        )
    hierarchy, partitions = hierarchy_section(cfg)
    token_labels_section(cfg)
    log_budget_warnings(budget_warnings(hierarchy), "hierarchy: ")
    return hierarchy, partitions


def check_host(cfg: DictConfig) -> None:
    """ValueError for a layout that is not for NeMo-Aligner, see `cluster.host`; unknown keys of the section too."""
    host = cluster_settings(cfg).host
    if host != "nemo_aligner":
        raise ValueError(
            f"cluster.host: {host}; this layout is for a trainer of one's own on nemo_fiberpo.megatron, see "
            "docs/parallelism.md; NeMo-Aligner cannot run it. `fiberpo plan` takes it"
        )


def on_cpu(cfg: DictConfig) -> bool:
    """Whether the ranks have no GPU."""
    return bool(cfg.get("cpu", False)) or cfg.trainer.get("accelerator") == "cpu"


def check_accelerator(cfg: DictConfig) -> None:
    """ValueError where the two keys that choose CPU or GPU disagree."""
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
        steps=algorithm.optimizer_steps,
        micro=cfg.model.micro_batch_size,
        forward=ppo.forward_micro_batch_size,
        generation=ppo.rollout_micro_batch_size,
    )


def check_batches(cfg: DictConfig, data_parallel_size: int, context_parallel_size: int = 1) -> None:
    """ValueError naming the field by which the batch sizes do not fit together, see `Batches.problems`."""
    for problem in batch_sizes(cfg).problems(data_parallel_size, context_parallel_size):
        raise ValueError(problem)


def check_lengths(cfg: DictConfig) -> None:
    """ValueError naming the key of the model that the longest prompt and response do not fit in."""
    for problem in too_long(cfg.model, cfg.data.max_prompt_length):
        raise ValueError(problem)
