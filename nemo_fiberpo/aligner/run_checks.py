"""All that can be said of a run's configuration before its policy is loaded: what the training script, `--check` and
the tests that make up configurations share. Every refusal is a ValueError that names the key.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_fiberpo.aligner import launch
from nemo_fiberpo.aligner.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.fields import build, fits, in_words, plain
from nemo_fiberpo.aligner.model_checks import model_problems, partition_table
from nemo_fiberpo.aligner.nemo_keys import check_nemo_keys
from nemo_fiberpo.aligner.policy_file import read_config
from nemo_fiberpo.aligner.prompts import load_prompts
from nemo_fiberpo.aligner.settings import (
    SECTIONS,
    DataSettings,
    RewardSettings,
    algorithm_settings,
    check_precision,
    data_settings,
    reward_settings,
    warm_start_settings,
)
from nemo_fiberpo.config import as_plain, named_references, reject_unknown_keys
from nemo_fiberpo.objective import ExpertPartitions, Hierarchy, check_gating
from nemo_fiberpo.values import short

_REQUIRED = ("hierarchy", "algorithm", "data", "rewards", "model", "trainer", "exp_manager", "pretrained_checkpoint")
_OPTIONAL = ("warm_start", "cluster", "resume")  # a null is as if it were left out
_VALUES: dict[str, Any] = {
    "name": str,
    "run_dir": str,
    "data_dir": str | None,
    "seed": int,
    "cpu": bool,
    "collective_timeout": float,
}
_LOGGERS = {"wandb": "wandb", "mlflow": "mlflow", "clearml": "clearml", "neptune": "neptune"}  # name -> its package


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """The `pretrained_checkpoint` section: the policy that training begins from."""

    restore_from_path: str


@dataclass(frozen=True)
class Checked:
    """The sections of a run, parsed."""

    hierarchy: Hierarchy
    partitions: ExpertPartitions | None
    settings: AlgorithmSettings
    data: DataSettings
    reward: RewardSettings


def pretrained_checkpoint(cfg: DictConfig) -> PretrainedCheckpoint:
    """The `pretrained_checkpoint` section. Raises ValueError naming the field."""
    made: PretrainedCheckpoint = build(
        PretrainedCheckpoint, plain(cfg, "pretrained_checkpoint"), "pretrained_checkpoint"
    )
    return made


def check_shape(cfg: DictConfig) -> None:
    """Sections are mappings, and the keys beside them of their types; an unknown one is refused."""
    reject_unknown_keys(cfg, SECTIONS)
    values: dict[str, Any] = {}
    for key in [key for key in _VALUES if key in cfg]:
        with named_references(key):
            values[key] = value = cfg[key]
        if not fits(value, _VALUES[key]):
            raise ValueError(f"{key}: must be {in_words(_VALUES[key])}, got {short(value)}")
    for key in ("name", "run_dir"):
        if values.get(key, "-") == "":
            raise ValueError(f"{key}: is empty")
    if not 0 <= values.get("seed", 0) < 2**31:
        raise ValueError(f"seed: must be from 0 to {2**31 - 1}, got {short(values['seed'])}")
    for name in (*_REQUIRED, *_OPTIONAL):
        with named_references(name):
            given = cfg.get(name)
        if not isinstance(given, DictConfig) and (given is not None or name in _REQUIRED):
            raise ValueError(f"{name}: must be a mapping, got {short(given)}")


def check_run(cfg: DictConfig) -> Checked:
    """The whole configuration, without a look at files. Logs `budget_warnings`."""
    with named_references():  # a key that is not there at all, too
        return _checked(cfg)


def _checked(cfg: DictConfig) -> Checked:
    check_shape(cfg)
    hierarchy, partitions = launch.check_sections(cfg)
    launch.check_host(cfg)
    checked = Checked(hierarchy, partitions, algorithm_settings(cfg), data_settings(cfg), reward_settings(cfg))
    pretrained_checkpoint(cfg)
    if cfg.get("warm_start") is not None:
        warm_start_settings(cfg)
    as_plain(cfg)  # every reference leads somewhere
    columns = partitions.soft_columns if partitions is not None else ()
    check_gating(checked.settings.gating_map, hierarchy, columns)
    check_precision(cfg.trainer.get("precision"))
    check_nemo_keys(cfg)
    check_loggers(cfg.exp_manager)
    for problem in model_problems(cfg.model, cfg.get("cpu", False)):
        raise ValueError(problem)
    for problem in launch.batch_sizes(cfg).problems(1):
        raise ValueError(problem)
    checked.settings.check_passes(hierarchy.active, cfg.model.micro_batch_size)
    checked.settings.check_data(checked.data)
    launch.check_lengths(cfg)
    if partitions is not None and "num_moe_experts" in cfg.model:
        partition_table(partitions, cfg.model)
    return checked


def check_loggers(exp_manager: Mapping[str, Any]) -> None:
    """ValueError for a logger whose package is not installed."""
    for name, package in _LOGGERS.items():
        key = f"create_{name}_logger"
        if exp_manager.get(key) and importlib.util.find_spec(package) is None:
            raise ValueError(f"exp_manager.{key}: needs the package {package}, which is not installed; pip install it")


def check_graders(graders: Mapping[str, str] | None) -> None:
    """ValueError naming the grader of one's own whose module or function there is not."""
    for name, target in (graders or {}).items():
        module, _, function = target.partition(":")
        where = f"rewards.graders.{name}"
        try:
            found = getattr(importlib.import_module(module), function, None)
        except ImportError as error:
            raise ValueError(
                f"{where}: {target}: {error}. Modules are looked for where Python does, and beside the run config"
            ) from error
        except Exception as error:
            raise ValueError(
                f"{where}: {target}: importing {module} ends in {type(error).__name__}: {error}"
            ) from error
        if not callable(found):
            raise ValueError(f"{where}: {target}: the module has no function {function!r}")


def check_files(cfg: DictConfig, checked: Checked) -> Iterator[str]:
    """A line for each file that the configuration names: what was checked of it, or that it is not there."""
    own = tuple(checked.reward.graders or ())
    for key, path in (("data.train", checked.data.train), ("data.heldout", checked.data.heldout)):
        if path is None:
            continue
        if not Path(path).exists():
            yield f"{key}: not checked: there is no {path}"
            continue
        yield f"{key}: {len(load_prompts(path, own))} prompts in {path}"
    policy = Path(cfg.pretrained_checkpoint.restore_from_path)
    if policy.exists():
        read_config(policy)
        yield f"pretrained_checkpoint.restore_from_path: the configuration in {policy}; its weights not checked"
    else:
        yield f"pretrained_checkpoint.restore_from_path: not checked: there is no {policy}"
