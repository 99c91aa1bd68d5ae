"""The `hierarchy`, `algorithm`, `data` and `rewards` sections of a run's config, checked before anything is loaded.

Unknown keys and values that make no sense are ValueErrors that name the field. The keys of `algorithm` are explained in
`algorithm.AlgorithmSettings`, those of `hierarchy` in `nemo_fiberpo.config`; `model`, `trainer` and `exp_manager` are
NeMo's own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings, HierarchyGating, KlSettings
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.fields import build, choice, plain, whole
from nemo_fiberpo.config import (
    mapping,
    parse_expert_partitions,
    parse_hierarchy,
    parse_token_labels,
    reject_unknown_keys,
)
from nemo_fiberpo.graders.builtin import UNSAFE_TASKS
from nemo_fiberpo.labelling.token_labels import TokenLabels
from nemo_fiberpo.objective import OBJECTIVES, ExpertPartitions, Hierarchy
from nemo_fiberpo.plan.assumptions import Assumptions
from nemo_fiberpo.values import at, nearest, positive_number

REWARD_KINDS = ("rules", "server")
SCORES = ("threshold", "raw")
ON_FAILURE = ("drop", "zero", "error")
PRECISIONS = ("bf16", "bf16-mixed", 32, "32", "32-true")
SECTIONS = (
    "name",
    "seed",
    "hierarchy",
    "algorithm",
    "data",
    "rewards",
    "model",
    "trainer",
    "exp_manager",
    "pretrained_checkpoint",
    "warm_start",
    "cluster",
    "cpu",
    "wandb",
    "collective_timeout",
    "resume",
    "run_dir",
    "data_dir",
)


@dataclass(frozen=True)
class RewardSettings:
    """kind `rules` grades responses in killable processes (see `rewards.rules.RuleRewards` for its options); kind
    `server` asks NeMo-Aligner's reward-model server, with the client's own configuration in `server`. A rollout or an
    evaluation of which more than the share `max_failed` cannot be graded stops the run."""

    kind: str = "rules"
    workers: int = 1
    time_limit: float = 2.0
    memory_limit_mib: int = 4096
    score: str = "threshold"
    on_failure: str = "drop"
    max_failed: float = 0.5
    unsafe_tasks: Sequence[str] | None = None
    graders: Mapping[str, str] | None = None
    server: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        choice(self, "kind", REWARD_KINDS)
        choice(self, "score", SCORES)
        choice(self, "on_failure", ON_FAILURE)
        whole(self, "workers", 1)
        whole(self, "memory_limit_mib", 1)
        positive_number(self.time_limit, "time_limit")
        if isinstance(self.max_failed, bool) or not isinstance(self.max_failed, (int, float)):
            raise ValueError(f"max_failed: must be a number, got {self.max_failed!r}")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed: must be a share of the answers, from 0 to 1, got {self.max_failed!r}")
        tasks = [] if self.unsafe_tasks is None else self.unsafe_tasks
        if isinstance(tasks, str) or not isinstance(tasks, Sequence):
            raise ValueError(f"unsafe_tasks: must be a list of tasks, such as [countdown], got {tasks!r}")
        for task in tasks:
            if task not in UNSAFE_TASKS:
                raise ValueError(f"unsafe_tasks: {task!r} is unknown{nearest(task, UNSAFE_TASKS)}")
        object.__setattr__(self, "unsafe_tasks", sorted(set(tasks)))
        for name, target in self.graders.items() if isinstance(self.graders, Mapping) else ():
            if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+", target):
                raise ValueError(
                    f"graders.{name}: must be package.module:function, got {target!r}; the module is found beside the "
                    "run config, too"
                )
        if (self.kind == "server") != (self.server is not None):
            raise ValueError("server: the reward server's address, for kind: server and only there")
        for entry in dataclasses.fields(self) if self.kind == "server" else ():
            given = getattr(self, entry.name)
            if entry.name not in ("kind", "graders", "server") and given not in (entry.default, []):
                raise ValueError(
                    f"{entry.name}: {given!r} is read for kind: rules alone, a server grades by itself; leave it at "
                    f"{entry.default!r}"
                )

    def rule_options(self) -> dict[str, Any]:
        names = [entry.name for entry in dataclasses.fields(self) if entry.name not in ("kind", "server")]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class WarmStartSettings:
    """The supervised warm start of the quickstart (examples/warm_start.py).

    data          JSONL of prompts with `response`
    steps         optimizer steps at most
    batch_size    samples per optimizer step, over all ranks
    lr            learning rate
    stop_reward   mean reward on `check_prompts` training prompts per domain at which a domain has learned enough; the
                  warm start ends when all have
    rehearsal     share of such a domain in the batches, the others' being 1, so that it is not forgotten
    check_every   optimizer steps between two checks
    """

    data: str
    steps: int
    batch_size: int
    lr: float
    stop_reward: float
    rehearsal: float
    check_every: int
    check_prompts: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every", "check_prompts"):
            whole(self, name, 1)
        positive_number(self.lr, "lr")
        for name in ("stop_reward", "rehearsal"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"{name}: must be a number from 0 to 1, got {share!r}")


def hierarchy_section(cfg: DictConfig) -> tuple[Hierarchy, ExpertPartitions | None]:
    """The `hierarchy` section, and how it partitions experts, if it does. Raises ValueError naming the field."""
    values = plain(cfg, "hierarchy")
    with at("hierarchy."):
        hierarchy = parse_hierarchy(values)
        return hierarchy, parse_expert_partitions(values, hierarchy)


def token_labels_section(cfg: DictConfig) -> TokenLabels | None:
    """`token_labels` and `ignore` of the `hierarchy` section. Raises ValueError naming the field."""
    values = plain(cfg, "hierarchy")
    with at("hierarchy."):
        return parse_token_labels(values, parse_hierarchy(values))


def algorithm_settings(cfg: DictConfig) -> AlgorithmSettings:
    """The `algorithm` section. Raises ValueError naming the field."""
    values = plain(cfg, "algorithm")
    kl = build(KlSettings, mapping(values.pop("kl", None) or {}, "algorithm.kl"), "algorithm.kl")
    gating = _gating(values.get("objective", "fiberpo"), values.pop("gating", None))
    return build(AlgorithmSettings, values, "algorithm", kl=kl, **gating)


def _gating(objective: Any, fields: Any) -> dict[str, Any]:
    """The `gating` block as its objective reads it; nothing for a name that AlgorithmSettings refuses."""
    fields = mapping({} if fields is None else fields, "algorithm.gating")
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        return {}
    others = [name for name in fields if name != "use_min"]
    if objective == "fiberpo" and others:
        known = ", ".join(name for name in OBJECTIVES if name != "fiberpo")
        raise ValueError(
            f"algorithm.gating.{others[0]}: objective fiberpo is gated by the hierarchy and has no field here but "
            f"use_min; with algorithm.objective: {known}"
        )
    return {"gating": build(OBJECTIVES[objective] or HierarchyGating, fields, "algorithm.gating")}


def data_settings(cfg: DictConfig) -> DataSettings:
    """The `data` section. Raises ValueError naming the field."""
    return build(DataSettings, plain(cfg, "data"), "data")


def reward_settings(cfg: DictConfig) -> RewardSettings:
    """The `rewards` section. Raises ValueError naming the field."""
    return build(RewardSettings, plain(cfg, "rewards"), "rewards")


def warm_start_settings(cfg: DictConfig) -> WarmStartSettings:
    """The `warm_start` section. Raises ValueError naming the field."""
    return build(WarmStartSettings, plain(cfg, "warm_start"), "warm_start")


def check_precision(precision: Any, field: str = "trainer.precision") -> None:
    """ValueError unless the precision is one that a policy can be trained in; `field` names it."""
    if str(precision).split("-")[0] in ("16", "fp16"):
        raise ValueError(
            f"{field}: {precision!r}: float16 needs a scale of the loss, which the optimizer would divide the gradient "
            "by and the exact step does not multiply it with; use bf16, or 32"
        )
    if isinstance(precision, bool) or precision not in PRECISIONS:
        raise ValueError(f"{field}: {precision!r} is unknown{nearest(precision, dict.fromkeys(map(str, PRECISIONS)))}")


def cluster_settings(cfg: DictConfig) -> Assumptions:
    """The `cluster` section, which `fiberpo plan` reads; its defaults where there is none. Raises ValueError naming the
    field."""
    return build(Assumptions, plain(cfg, "cluster") if cfg.get("cluster") else {}, "cluster")


def check_resume(cfg: DictConfig) -> None:
    """The `resume` section: `allow` lists the keys that may differ when a run goes on. ValueError names the field;
    `resume.RunRecord` says which keys there are."""
    if cfg.get("resume") is None:
        return
    values = plain(cfg, "resume")
    reject_unknown_keys(values, ("allow",), "resume")
    allow = values.get("allow")
    if not isinstance(allow, list) or not all(isinstance(key, str) and key for key in allow):
        raise ValueError(f"resume.allow: must be a list of keys, such as [hierarchy, model.optim.lr], got {allow!r}")
