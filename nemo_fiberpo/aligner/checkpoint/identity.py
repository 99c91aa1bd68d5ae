"""The identity of a run: the values that must not change on a resume, by dotted key.

This package's sections count as parsed, with defaults and the order of strata, so the form of the YAML does not matter.
NeMo's `model` counts as written, and the few keys of `trainer` that training depends on. The record of an earlier start
is parsed again before it is compared: keys that it lacks take their defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_fiberpo.aligner.config import sections
from nemo_fiberpo.aligner.config.algorithm import AlgorithmSettings
from nemo_fiberpo.aligner.config.data import DataSettings
from nemo_fiberpo.aligner.config.rewards import RewardSettings
from nemo_fiberpo.fields import changeable
from nemo_fiberpo.objective import Gate, Stratum

# Fields declared with `may_change`. Data files count by their content, see `RunRecord`.
_MAY_CHANGE = (
    *changeable(AlgorithmSettings, "algorithm"),
    *changeable(DataSettings, "data"),
    *changeable(RewardSettings, "rewards"),
)
# A diagnostic, and a key of which only 0 is accepted.
_OF_NO_EFFECT = ("model.optim.check_for_nan_in_grad", "model.ppo.length_params.min_length")
_TRAINER = ("precision", "gradient_clip_val", "max_steps")
_PARSED: dict[str, Callable[[DictConfig], Any]] = {
    "hierarchy": sections.hierarchy_section,
    "algorithm": sections.algorithm_settings,
    "data": sections.data_settings,
    "rewards": sections.reward_settings,
    "warm_start": sections.warm_start_settings,
}
_BY = "hierarchy.expert_partitions.by"
# Mappings whose keys are the user's names, which may have dots.
_OF_NAMES = ("only", "by", "graders", "token_clips")


def identity_of(cfg: DictConfig) -> dict[str, Any]:
    """The identity of a run with this config, as JSON values. Raises what parsing its sections raises."""
    found: dict[str, Any] = {"seed": cfg.seed, "cpu": cfg.get("cpu", False)}
    for section in _PARSED:
        if cfg.get(section) is not None:
            found |= _parsed(section, cfg)
    if cfg.get("model") is not None:
        found |= _flatten("model", OmegaConf.to_container(cfg.model, resolve=True))
        found = {key: leaf for key, leaf in found.items() if key not in _OF_NO_EFFECT}
    for name in _TRAINER:
        found[f"trainer.{name}"] = cfg.trainer.get(name) if "trainer" in cfg else None
    if (cfg.algorithm.get("kl") or {}).get("coefficient"):  # the reference policy
        found["pretrained_checkpoint.restore_from_path"] = cfg.pretrained_checkpoint.restore_from_path
    if found.get(_BY) == "expert_parallel":
        # The partitions depend on the size of this axis.
        found[_BY] = f"expert_parallel, {cfg.model.get('expert_model_parallel_size') or 1} ranks"
    found["ranks"] = int(os.environ.get("WORLD_SIZE", "1"))
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def identity_of_record(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded identity, as `identity_of` would return it now. A section that is refused today stays as recorded."""
    found = {key: leaf for key, leaf in stored.items() if key not in _OF_NO_EFFECT}
    for section in _PARSED:
        written = {
            key: value for key, value in stored.items() if under(key, (section,)) and not key.endswith(".sha256")
        }
        if not written:
            continue
        try:
            parsed = _parsed(section, OmegaConf.create({section: _filled(section, _unflatten(section, written))}))
        except (ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException):
            continue
        if _BY in parsed and _BY in written:
            parsed[_BY] = written[_BY]
        found = {key: value for key, value in found.items() if key not in written} | parsed
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def hierarchy_of_record(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The `hierarchy` section of a record, in the form that `nemo_fiberpo.config` reads."""
    return _filled(
        "hierarchy",
        _unflatten("hierarchy", {key: value for key, value in stored.items() if under(key, ("hierarchy",))}),
    )


def under(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `prefixes` or below one."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _parsed(section: str, cfg: DictConfig) -> dict[str, Any]:
    """The leaves of a parsed section, without those that may change."""
    value = _PARSED[section](cfg)
    if section == "hierarchy":
        hierarchy, partitions, labels = value
        leaves = _flatten(section, hierarchy) | _flatten(f"{section}.expert_partitions", partitions)
        leaves |= {} if labels is None else _flatten(section, labels.written())
    else:
        leaves = _flatten(section, value)
    return {key: leaf for key, leaf in leaves.items() if not under(key, _MAY_CHANGE)}


def _flatten(where: str, value: Any) -> dict[str, Any]:
    """Leaves by dotted key: dataclasses by field, strata by name with their order. An empty field of a dataclass is
    None."""
    if isinstance(value, tuple) and value and all(isinstance(entry, Stratum) for entry in value):
        leaves: dict[str, Any] = {f"{where}.order": [entry.name for entry in value]}
        for entry in value:
            leaves |= _fields(f"{where}.{entry.name}", entry, ("name",))
        return leaves
    if isinstance(value, Gate):
        return {where: value.name}
    if dataclasses.is_dataclass(value):
        return _fields(where, value)
    if isinstance(value, Mapping) and value:
        return {key: leaf for name, entry in value.items() for key, leaf in _flatten(f"{where}.{name}", entry).items()}
    return {where: value}


def _fields(where: str, value: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if field.name not in without:
            entry = getattr(value, field.name)
            empty = isinstance(entry, Mapping | tuple | list) and not entry
            leaves |= _flatten(f"{where}.{field.name}", None if empty else entry)
    return leaves


def _unflatten(section: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """A section from its leaves, the inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for key, value in written.items():
        path = key.removeprefix(f"{section}.")
        kind, _, rest = path.partition(".")
        names = written.get(f"{section}.{kind}.order") if section == "hierarchy" else None
        if names is None:
            _set(tree, _path(path), value)
            continue
        of = tree.setdefault(kind, {name: {} for name in names})
        if rest != "order":
            name = max((name for name in names if rest.startswith(f"{name}.")), key=len)
            _set(of[name], _path(rest.removeprefix(f"{name}.")), value)
    return tree


def _path(key: str) -> tuple[str, ...]:
    head, dot, rest = key.partition(".")
    if not dot:
        return (head,)
    if head == "budgets":
        cell, _, channel = rest.rpartition(".")
        return head, cell, channel
    return (head, rest) if head in _OF_NAMES else (head, *_path(rest))


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *above, last = path
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _filled(section: str, tree: dict[str, Any]) -> dict[str, Any]:
    """The section with required keys that are not recorded, and `by` without the number of ranks."""
    if section == "data":
        return {"train": "", **tree}
    if section == "rewards" and tree.get("kind") == "server":
        return {"server": {}, **tree}
    partitions = tree.get("expert_partitions")
    if isinstance(partitions, dict) and isinstance(by := partitions.get("by"), str):
        partitions["by"] = by.partition(",")[0]
    return tree
