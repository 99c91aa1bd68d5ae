"""Groups of runs whose configurations agree, except for seeds and folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_fiberpo.analysis.runs import Run

# Runs of a group may differ in their seeds, and with them in their data; `compare` checks the held-out data itself.
_NOT_COMPARED = ("seed", "model.seed", "data.train.sha256", "data.heldout.sha256")
_FIRST = ("algorithm.objective", "algorithm.gating", "algorithm", "hierarchy", "model.optim")
"""Keys that are preferred in a group's label."""


def settings_of(run: Run) -> dict[str, Any]:
    """The configuration by dotted key, without seeds, digests and the run's own folder."""
    return {key: _placed(value, run.name) for key, value in run.identity.items() if key not in _NOT_COMPARED}


def _placed(value: Any, name: str) -> Any:
    """`value`; a path inside the run's folder begins with RUN instead, so that such paths are equal between runs."""
    if isinstance(value, str) and f"/{name}/" in f"/{value}":
        return "RUN/" + f"/{value}".rpartition(f"/{name}/")[2]
    return value


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which the settings differ, those that describe a group best first."""
    keys = dict.fromkeys(key for one in settings for key in one)
    different = [key for key in keys if len({_text(one.get(key)) for one in settings}) > 1]
    return sorted(different, key=_rank)


def _rank(key: str) -> int:
    return next((at for at, head in enumerate(_FIRST) if key == head or key.startswith(head + ".")), len(_FIRST))


def labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each of the settings, such as "objective=grpo, lr=6e-05", with no more keys than tell them apart.
    Equal settings have equal labels."""
    keys = differing(settings)
    chosen: list[str] = []
    told_apart = 1
    for key in keys:
        parts = len({tuple(_text(one.get(k)) for k in (*chosen, key)) for one in settings})
        if parts > told_apart:
            chosen, told_apart = [*chosen, key], parts
    short = {key: _shortest(key, keys) for key in chosen}
    if not chosen:
        return [str(one.get("algorithm.objective", "one setting")) for one in settings]
    return [", ".join(f"{short[key]}={_text(one.get(key))}" for key in chosen) for one in settings]


def _shortest(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a dotted key that none of the other `keys` has."""
    parts = key.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(end for end in ends if not any(other != key and f".{other}".endswith(f".{end}") for other in keys))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row per differing key: the key, and its value in each group."""
    groups = list(settings.values())
    return [[key, *(_text(one.get(key)) for one in groups)] for key in differing(groups)]
