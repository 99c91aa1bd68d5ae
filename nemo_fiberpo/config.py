"""YAML, DictConfig or dict -> Hierarchy, and how it partitions experts. Every refusal is a ValueError that names the
field, and the file if any.

token_clip: 0.04
strata:
  - {name: domain, budget: {pos: 0.02, neg: 0.015}, budgets: {code: {pos: 0.03, neg: 0.02}}}
  - {name: prompt_group, budget: {pos: 0.04, neg: 0.03}, slope: {cap: 32}}
  - {name: task, budget: {pos: 0.03, neg: 0.02}, only: {domain: [code, math]}}
  - {name: task_language, join: [task, language], budget: {pos: 0.03, neg: 0.02}}
  - {name: trajectory, budget: {pos: 0.12, neg: 0.05}, slope: 32, enabled: true}
  - {name: trajectory_expert, join: [trajectory, expert_partition], budget: {pos: 0.12, neg: 0.05}, min_tokens: 16}
branches:
  - {name: modality, beside: domain, budget: {pos: 0.02, neg: 0.015}}
sweeps: 2
expert_partitions: {by: {cold: [0, 3], hot: [1, 2]}, layers: all, membership: hard, agreement: true}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .objective import Budget, ExpertPartitions, Hierarchy, SlopeCap, Stratum
from .objective.expert_partitions import COLUMN
from .objective.stratum import nearest, positive_number

STRATUM_KEYS = ("name", "budget", "budgets", "slope", "enabled", "join", "only", "beside", "min_tokens")


def load_hierarchy(cfg: Mapping[str, Any] | DictConfig | str | os.PathLike[str]) -> Hierarchy:
    """The hierarchy that `cfg` describes: a mapping, a DictConfig (interpolations are resolved) or a YAML file's path.

    `budget` of a stratum and `token_clip` are required; budgets, token_clip and slope are finite and positive; `slope`
    is a number or {cap: number}; names are unique. What a chain and its branches must keep to, so that no drift counts
    twice, is in `objective/structure.py`. Raises ValueError naming the full path of the field, for an unknown
    key with the nearest valid one, and for a file with its path and, for a syntax error, the line.
    """
    with _section(cfg) as plain:
        return _hierarchy(plain)


def load_expert_partitions(
    cfg: Mapping[str, Any] | DictConfig | str | os.PathLike[str],
) -> ExpertPartitions | None:
    """`expert_partitions` of a hierarchy; `cfg` as for `load_hierarchy`. None where no active stratum needs the column
    `expert_partition`.

    All its keys may be left out, see `ExpertPartitions`, but not the block itself: `expert_partitions: {}` takes every
    default. Raises ValueError naming the field, as `load_hierarchy`; for a hierarchy that needs the column without the
    block, and for the block where no stratum has the column, switched on or off.
    """
    with _section(cfg) as plain:
        hierarchy = _hierarchy(plain)
        block = plain.get("expert_partitions")
        strata = (*hierarchy.strata, *hierarchy.branches)
        if block is None:
            if COLUMN in hierarchy.columns:
                raise ValueError(
                    f"expert_partitions: is required, because {_users(hierarchy.active)} needs the column {COLUMN!r}; "
                    "it says how experts are partitioned, e.g. {by: expert_parallel}"
                )
            return None
        block = mapping(block, "expert_partitions")
        reject_unknown_keys(block, ["by", "layers", "membership", "agreement"], "expert_partitions")
        with _at("expert_partitions."):
            partitions = ExpertPartitions(**block)
        if not any(COLUMN in stratum.columns for stratum in strata):
            raise ValueError(
                f"expert_partitions: no stratum is called {COLUMN!r} or joins it, so nothing would use the partitions; "
                "add one, or leave the block out"
            )
        return partitions if COLUMN in hierarchy.columns else None


def _users(strata: Iterable[Stratum]) -> str:
    return next(f"stratum {stratum.name!r}" for stratum in strata if COLUMN in stratum.columns)


@contextmanager
def _section(cfg: Mapping[str, Any] | DictConfig | str | os.PathLike[str]) -> Iterator[Any]:
    """`cfg` as plain dicts and lists; for a file's path, errors of the block begin with it."""
    if isinstance(cfg, str | os.PathLike):
        path = os.fspath(cfg)
        with _at(f"{path}: "):
            yield _read(path)
        return
    if not isinstance(cfg, Mapping | DictConfig):
        raise ValueError(f"hierarchy: must be a mapping or the path of a YAML file, got {cfg!r}")
    yield _plain(cfg)


def reject_unknown_keys(cfg: Mapping[Any, Any], valid: Iterable[str], where: str = "") -> None:
    """ValueError for the first key of `cfg` that is not `valid`: its path below `where` and the nearest valid key."""
    valid = list(valid)
    for key in cfg:
        if key not in valid:
            path = f"{where}.{key}" if where else str(key)
            raise ValueError(f"{path}: unknown key{nearest(key, valid)}")


@contextmanager
def _at(prefix: str) -> Iterator[None]:
    """Put `prefix` before the message of a ValueError from below."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error.__cause__


def _read(path: str) -> Any:
    try:
        return _plain(OmegaConf.load(path))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{line}not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _plain(cfg: Any) -> Any:
    """`cfg` as plain dicts, lists and scalars, interpolations resolved."""
    try:
        node = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg)
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{key}{str(error).splitlines()[0]}") from error


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a mapping; else ValueError that names `where` it stands."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a mapping, got {value!r}")
    return value


def _required(cfg: dict[str, Any], key: str, where: str) -> Any:
    if cfg.get(key) is None:
        path = f"{where}.{key}" if where else key
        raise ValueError(f"{path}: is required")
    return cfg[key]


def _hierarchy(cfg: Any) -> Hierarchy:
    cfg = mapping(cfg, "hierarchy")
    reject_unknown_keys(cfg, ["token_clip", "strata", "branches", "sweeps", "expert_partitions"])
    token_clip, strata = _required(cfg, "token_clip", ""), _required(cfg, "strata", "")
    if not isinstance(strata, list):
        raise ValueError(f"strata: must be a list of strata, coarsest first, got {strata!r}")
    branches = cfg.get("branches") or []
    if not isinstance(branches, list):
        raise ValueError(f"branches: must be a list of strata, got {branches!r}")
    return Hierarchy(
        tuple(_stratum(entry, f"strata[{i}]") for i, entry in enumerate(strata)),
        token_clip,
        tuple(_stratum(entry, f"branches[{i}]") for i, entry in enumerate(branches)),
        cfg.get("sweeps", 1),
    )


def _stratum(cfg: Any, where: str) -> Stratum:
    cfg = mapping(cfg, where)
    reject_unknown_keys(cfg, STRATUM_KEYS, where)
    name = _required(cfg, "name", where)
    budget = _budget(_required(cfg, "budget", where), f"{where}.budget")
    overrides = mapping(cfg.get("budgets") or {}, f"{where}.budgets")
    budgets = {str(key): _budget(value, f"{where}.budgets.{key}") for key, value in overrides.items()}
    slope = cfg.get("slope")
    if isinstance(slope, dict):
        reject_unknown_keys(slope, ["cap"], f"{where}.slope")
        slope = SlopeCap(positive_number(_required(slope, "cap", f"{where}.slope"), f"{where}.slope.cap"))
    elif slope is not None:
        slope = positive_number(slope, f"{where}.slope")
    with _at(f"{where}."):
        enabled, join, only = cfg.get("enabled", True), cfg.get("join") or (), cfg.get("only") or {}
        beside, min_tokens = cfg.get("beside"), cfg.get("min_tokens")
        return Stratum(name, budget, budgets, slope, enabled, join, only, beside, min_tokens)


def _budget(cfg: Any, where: str) -> Budget:
    cfg = mapping(cfg, where)
    reject_unknown_keys(cfg, ["pos", "neg"], where)
    pos, neg = (_required(cfg, key, where) for key in ("pos", "neg"))
    with _at(f"{where}."):
        return Budget(pos, neg)
