"""YAML, DictConfig or dict -> Hierarchy, expert partitions and token labels. Errors are ValueErrors that name the
field, and the file if any.

token_clip: 0.04
token_clips: {code: 0.06}                      # of named cells of the coarsest stratum
strata:                                        # by name, coarsest first
  domain: {budget: {pos: 0.02, neg: 0.015}, budgets: {code: {pos: 0.03, neg: 0.02}}}
  prompt_group: {budget: {pos: 0.04, neg: 0.03}, slope: {cap: 32}}
  task: {budget: {pos: 0.03, neg: 0.02}, only: {domain: [code, math]}}
  task_language: {join: [task, language], budget: {pos: 0.03, neg: 0.02}}
  trajectory: {budget: {pos: 0.12, neg: 0.05}, slope: 32, gate: soft, enabled: true}
  trajectory_expert: {join: [trajectory, expert_partition], budget: {pos: 0.12, neg: 0.05}, min_tokens: 16}
branches:
  modality: {beside: domain, budget: {pos: 0.02, neg: 0.015}}
sweeps: 2
gate: clip                                     # of every stratum that names none
expert_partitions: {by: {cold: [0, 3], hot: [1, 2]}, layers: all, membership: hard, agreement: true}
token_labels: {segment: {markers: {think: ["<think>", "</think>"]}, rest: answer}}
ignore: ["<tool_result>", "</tool_result>"]

`strata` and `branches` may be lists too: `- {name: domain, budget: {pos: 0.02, neg: 0.015}}`. Null is the same as
absent.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from .budget_warnings import budget_warnings, log_budget_warnings
from .labelling.expert_partitions import COLUMN
from .labelling.token_labels import TokenLabels
from .objective import Budget, ExpertPartitions, Hierarchy, SlopeCap, Stratum
from .plain import NAMED, as_plain, read_yaml
from .values import at, nearest, positive_number

Source = Mapping[str, Any] | DictConfig | str | os.PathLike[str]


def load_hierarchy(cfg: Source) -> Hierarchy:
    """The hierarchy of a mapping, a DictConfig (interpolations are resolved) or a YAML file's path.

    `budget` of a stratum and `token_clip` are required; budgets, token_clip and slope are finite and positive; `slope`
    is a number or {cap: number}; names are unique. `objective/stratum.py` has the rules of a chain and its branches.
    Raises ValueError naming the path of the field as written (`strata.domain.budget`, or `strata[0].budget` in a list),
    with the nearest valid key for an unknown one, and the file and, for a syntax error or a duplicate key, the line.
    Logs `budget_warnings`.
    """
    with section(cfg) as plain:
        hierarchy = parse_hierarchy(plain)
    prefix = f"{os.fspath(cfg)}: " if isinstance(cfg, str | os.PathLike) else ""
    log_budget_warnings(budget_warnings(hierarchy), prefix)
    return hierarchy


def load_expert_partitions(cfg: Source) -> ExpertPartitions | None:
    """`expert_partitions` of a hierarchy; `cfg` as for `load_hierarchy`. None if no active stratum uses the column
    `expert_partition`.

    The block is required if a stratum uses the column, and an error if none does, enabled or not; all its keys are
    optional, see `ExpertPartitions`. Raises ValueError naming the field, as `load_hierarchy`.
    """
    with section(cfg) as plain:
        return parse_expert_partitions(plain, parse_hierarchy(plain))


def parse_expert_partitions(cfg: Mapping[str, Any], hierarchy: Hierarchy) -> ExpertPartitions | None:
    """`load_expert_partitions` of plain values, with the parsed hierarchy."""
    block = cfg.get("expert_partitions")
    if block is None:
        if COLUMN in hierarchy.columns:
            raise ValueError(
                f"expert_partitions: is required, because {_users(hierarchy.active)} needs the column {COLUMN!r}; "
                "for example {by: expert_parallel}"
            )
        return None
    block = mapping(block, "expert_partitions")
    reject_unknown_keys(block, ["by", "layers", "membership", "agreement"], "expert_partitions")
    with at("expert_partitions."):
        partitions = ExpertPartitions(**block)
    if not any(COLUMN in stratum.columns for stratum in (*hierarchy.strata, *hierarchy.branches)):
        raise ValueError(
            f"expert_partitions: no stratum is called {COLUMN!r} or joins it, so nothing would use the partitions; "
            "add one, or leave the block out"
        )
    return partitions if COLUMN in hierarchy.columns else None


def load_token_labels(cfg: Source) -> TokenLabels | None:
    """`token_labels` and `ignore` of a hierarchy, None if it has neither; `cfg` as for `load_hierarchy`. ValueError
    naming the field, also for a source that no stratum uses."""
    with section(cfg) as plain:
        return parse_token_labels(plain, parse_hierarchy(plain))


def parse_token_labels(cfg: Mapping[str, Any], hierarchy: Hierarchy) -> TokenLabels | None:
    """`load_token_labels` of plain values, with the parsed hierarchy."""
    found = TokenLabels.parse(cfg.get("token_labels"), cfg.get("ignore"))
    if found is not None:
        everywhere = (*hierarchy.strata, *hierarchy.branches)
        found.check_columns([column for stratum in everywhere for column in stratum.columns])
    return found


def _users(strata: Iterable[Stratum]) -> str:
    return next(f"stratum {stratum.name!r}" for stratum in strata if COLUMN in stratum.columns)


@contextmanager
def section(cfg: Source) -> Iterator[Any]:
    """`cfg` as plain dicts and lists; for a file's path, errors raised in the block begin with it."""
    if isinstance(cfg, str | os.PathLike):
        path = os.fspath(cfg)
        with at(f"{path}: "):
            yield read_yaml(path)
        return
    if not isinstance(cfg, Mapping | DictConfig):
        raise ValueError(f"hierarchy: must be a mapping or the path of a YAML file, got {cfg!r}")
    yield as_plain(cfg)


def reject_unknown_keys(cfg: Mapping[Any, Any], valid: Iterable[str], where: str = "") -> None:
    """ValueError for the first key of `cfg` not in `valid`: its path below `where` and the nearest valid key."""
    valid = list(valid)
    for key in cfg:
        if key not in valid:
            path = f"{where}.{key}" if where else str(key)
            raise ValueError(f"{path}: unknown key{nearest(key, valid)}")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value`; ValueError naming `where` unless it is a mapping."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a mapping, got {value!r}")
    return value


def _required(cfg: dict[str, Any], key: str, where: str) -> Any:
    if cfg.get(key) is None:
        path = f"{where}.{key}" if where else key
        raise ValueError(f"{path}: is required")
    return cfg[key]


def parse_hierarchy(cfg: Any) -> Hierarchy:
    """`load_hierarchy` of plain values, without warnings."""
    cfg = mapping(cfg, "hierarchy")
    reject_unknown_keys(cfg, [*_HIERARCHY, "expert_partitions", "token_labels", "ignore"])
    for key in ("token_clip", "strata"):
        _required(cfg, key, "")
    fields = {key: read(cfg[key], key) for key, read in _HIERARCHY.items() if cfg.get(key) is not None}
    try:
        return Hierarchy(**fields)
    except ValueError as error:
        raise ValueError(_as_written(str(error), cfg)) from error.__cause__


def _as_written(message: str, cfg: dict[str, Any]) -> str:
    """`message` with the paths of strata as written: `strata.domain` for `strata[0]` in a mapping."""

    def path(match: re.Match[str]) -> str:
        entries, place = cfg.get(match[1]), int(match[2])
        if not isinstance(entries, dict) or place >= len(entries):
            return match[0]
        return f"{match[1]}.{list(entries)[place]}"

    return re.sub(rf"\b({'|'.join(NAMED)})\[(\d+)\](?:\.name\b)?", path, message)


def _strata(cfg: Any, where: str) -> tuple[Stratum, ...]:
    if isinstance(cfg, list):
        return tuple(_stratum(entry, f"{where}[{i}]") for i, entry in enumerate(cfg))
    if not isinstance(cfg, dict):
        raise ValueError(f"{where}: must be a mapping from names to strata, coarsest first, or a list, got {cfg!r}")
    return tuple(_named_stratum(name, cfg, where) for name in cfg)


def _named_stratum(name: Any, siblings: dict[Any, Any], where: str) -> Stratum:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: the name of a stratum must be a non-empty text, got {name!r}")
    where, entry = f"{where}.{name}", siblings[name]
    if entry is None:
        raise ValueError(f"{where}: must be a mapping, got None; enabled: false switches a stratum off")
    entry = mapping(entry, where)
    if entry.get("name", name) != name:
        raise ValueError(f"{where}.name: is {name!r} by its key, got {entry['name']!r}; leave it out")
    try:
        return _stratum({**entry, "name": name}, where)
    except ValueError as error:
        # An override of a misspelled stratum creates a new one that lacks its required keys.
        others = [str(other) for other in siblings if other != name]
        if str(error).endswith(": is required") and (close := difflib.get_close_matches(name, others, 1, 0.8)):
            raise ValueError(f"{error}; did you mean the stratum {close[0]!r}?") from error.__cause__
        raise


def _stratum(cfg: Any, where: str) -> Stratum:
    cfg = mapping(cfg, where)
    reject_unknown_keys(cfg, ["name", *_STRATUM], where)
    for key in ("name", "budget"):
        _required(cfg, key, where)
    fields = {key: read(cfg[key], f"{where}.{key}") for key, read in _STRATUM.items() if cfg.get(key) is not None}
    with at(f"{where}."):
        return Stratum(cfg["name"], **fields)


def _budget(cfg: Any, where: str) -> Budget:
    cfg = mapping(cfg, where)
    reject_unknown_keys(cfg, ["pos", "neg"], where)
    pos, neg = (_required(cfg, key, where) for key in ("pos", "neg"))
    with at(f"{where}."):
        return Budget(pos, neg)


def _budgets(cfg: Any, where: str) -> dict[str, Budget]:
    budgets: dict[str, Budget] = {}
    for key, value in mapping(cfg, where).items():
        if str(key) in budgets:
            raise ValueError(f"{where}.{key}: is given twice, as text and as {key!r}")
        budgets[str(key)] = _budget(value, f"{where}.{key}")
    return budgets


def _slope(cfg: Any, where: str) -> float | SlopeCap:
    if not isinstance(cfg, dict):
        return positive_number(cfg, where)
    reject_unknown_keys(cfg, ["cap"], where)
    return SlopeCap(positive_number(_required(cfg, "cap", where), f"{where}.cap"))


def _as_given(value: Any, _where: str) -> Any:
    """Left to `Stratum` or `Hierarchy` to check."""
    return value


# Field -> parser of (value, path).
_HIERARCHY: dict[str, Callable[[Any, str], Any]] = {
    "token_clip": _as_given,
    "token_clips": _as_given,
    "strata": _strata,
    "branches": _strata,
    "sweeps": _as_given,
    "gate": _as_given,
}
_STRATUM: dict[str, Callable[[Any, str], Any]] = {
    "budget": _budget,
    "budgets": _budgets,
    "slope": _slope,
    "enabled": _as_given,
    "join": _as_given,
    "only": _as_given,
    "beside": _as_given,
    "min_tokens": _as_given,
    "gate": _as_given,
}
