"""The sections of a run's config, parsed and checked before anything is loaded.

Unknown keys and invalid values raise a ValueError that names the field. `fiberpo config` prints what each key means.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import DictConfig

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings, HierarchyGating, KlSettings
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.parsing import build, plain, read_section
from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.aligner.config.run import PretrainedCheckpoint, ResumeSettings, RunSettings
from nemo_fiberpo.aligner.config.warm_start import WarmStartSettings
from nemo_fiberpo.config import (
    mapping,
    parse_expert_partitions,
    parse_hierarchy,
    parse_token_labels,
    reject_unknown_keys,
    section,
)
from nemo_fiberpo.labelling.token_labels import TokenLabels
from nemo_fiberpo.nemo_config import keys as nemo_keys
from nemo_fiberpo.objective import OBJECTIVES, ExpertPartitions, Hierarchy, RolloutCorrection
from nemo_fiberpo.plan.assumptions import Assumptions
from nemo_fiberpo.values import at

_OWN = ("hierarchy", "algorithm", "data", "rewards", "pretrained_checkpoint", "warm_start", "cluster", "resume")
SECTIONS = (*(entry.name for entry in dataclasses.fields(RunSettings)), *_OWN, *nemo_keys.SECTIONS)
"""All keys at the top level of a run's config."""


def run_settings(cfg: DictConfig) -> RunSettings:
    """The keys outside of sections; refuses unknown sections."""
    reject_unknown_keys(cfg, SECTIONS)
    given = {entry.name: cfg[entry.name] for entry in dataclasses.fields(RunSettings) if entry.name in cfg}
    return RunSettings(**given)


def hierarchy_section(cfg: DictConfig) -> tuple[Hierarchy, ExpertPartitions | None, TokenLabels | None]:
    """The `hierarchy` section with its `expert_partitions` and token labels, None where it has none."""
    with at("hierarchy."), section(cfg.hierarchy) as values:
        hierarchy = parse_hierarchy(values)
        return hierarchy, parse_expert_partitions(values, hierarchy), parse_token_labels(values, hierarchy)


def algorithm_settings(cfg: DictConfig) -> AlgorithmSettings:
    """The `algorithm` section."""
    values = plain(cfg, "algorithm")
    kl = build(KlSettings, mapping(values.pop("kl", None) or {}, "algorithm.kl"), "algorithm.kl")
    given = mapping(values.pop("rollout_correction", None) or {}, "algorithm.rollout_correction")
    correction = build(RolloutCorrection, given, "algorithm.rollout_correction")
    gating = _gating(values.get("objective", "fiberpo"), values.pop("gating", None))
    return build(AlgorithmSettings, values, "algorithm", kl=kl, rollout_correction=correction, **gating)


def _gating(objective: Any, fields: Any) -> dict[str, Any]:
    """The `gating` block as fields of its objective's class; {} for an objective that AlgorithmSettings refuses."""
    fields = mapping({} if fields is None else fields, "algorithm.gating")
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        return {}
    others = [name for name in fields if name != "use_min"]
    if objective == "fiberpo" and others:
        known = ", ".join(name for name in OBJECTIVES if name != "fiberpo")
        raise ValueError(
            f"algorithm.gating.{others[0]}: objective fiberpo is gated by the hierarchy and has only use_min here; "
            f"the objectives with other fields are {known}"
        )
    return {"gating": build(OBJECTIVES[objective] or HierarchyGating, fields, "algorithm.gating")}


def data_settings(cfg: DictConfig) -> DataSettings:
    """The `data` section."""
    return read_section(DataSettings, cfg, "data")


def reward_settings(cfg: DictConfig) -> RewardSettings:
    """The `rewards` section, or its defaults."""
    return read_section(RewardSettings, cfg, "rewards", optional=True)


def pretrained_checkpoint(cfg: DictConfig) -> PretrainedCheckpoint:
    """The `pretrained_checkpoint` section."""
    return read_section(PretrainedCheckpoint, cfg, "pretrained_checkpoint")


def warm_start_settings(cfg: DictConfig) -> WarmStartSettings:
    """The `warm_start` section."""
    return read_section(WarmStartSettings, cfg, "warm_start")


def cluster_settings(cfg: DictConfig) -> Assumptions:
    """The `cluster` section, or its defaults."""
    return read_section(Assumptions, cfg, "cluster", optional=True)


def check_resume(cfg: DictConfig) -> None:
    """Check the form of the `resume` section; `RunRecord` checks its keys."""
    read_section(ResumeSettings, cfg, "resume", optional=True)
