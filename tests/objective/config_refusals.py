"""Configurations that `load_hierarchy` refuses: sound ones with one thing wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]
Edit = tuple[Any, ...]
"""A path of keys and indices, and at last the value that is put there; `...` takes out what is there."""


def budget(pos: float = 0.05, neg: float = 0.03) -> dict[str, float]:
    return {"pos": pos, "neg": neg}


def stratum(name: str, **more: Any) -> Config:
    return {"name": name, "budget": budget(), **more}


def config(*strata: Config, branches: tuple[Config, ...] = (), **more: Any) -> Config:
    return {"token_clip": 0.04, "strata": list(strata), "branches": list(branches), **more}


def edited(base: Any, *edit: Any) -> Any:
    """A copy of `base` with one edit."""
    changed = copy.deepcopy(base)
    *path, last, value = edit
    node = changed
    for key in path:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return changed


DOMAIN = stratum("domain", budgets={"code": budget(0.03, 0.02)})
GROUP = stratum("prompt_group", slope={"cap": 32})
TRAJECTORY = stratum("trajectory", slope=32)
CHAIN = config(DOMAIN, GROUP, TRAJECTORY)
TREE = config(
    stratum("domain"),
    stratum("task", only={"domain": ["code", "math"]}),
    stratum("task_language", join=["task", "language"], only={"domain": ["code"]}),
    stratum("trajectory", min_tokens=4),
    branches=(stratum("modality", beside="domain"), stratum("expert", enabled=False)),
    sweeps=3,
)
OFF = stratum("domain", enabled=False)
S, B = "strata", "branches"
NUMBERS: list[Edit] = [
    ("token_clip",),
    (S, 0, "budget", "pos"),
    (S, 0, "budgets", "code", "neg"),
    (S, 2, "slope"),
    (S, 1, "slope", "cap"),
]

EDITS: list[Edit] = [
    ("token_clipp", 1),
    (S, 1, "bugdet", {}),
    (S, 1, "budget", "poss", 1),
    (S, 0, "budgets", "code", "negg", 1),
    (S, 1, "slope", "kap", 1),
    (S, 1, "zzzz", 1),
    ("token_clip", ...),
    (S, ...),
    (S, []),
    (S, {"name": "a"}),
    (S, 0, "domain"),
    (S, 0, "name", ...),
    (S, 0, "name", ""),
    (S, 0, "name", True),
    (S, 2, "name", "domain"),
    (S, 0, "budget", ...),
    (S, 0, "budget", 0.1),
    (S, 0, "budget", "neg", ...),
    (S, 0, "budgets", [1]),
    (S, 0, "budgets", "code", 3),
    (S, 0, "enabled", "no"),
    (S, 1, "slope", "cap", ...),
    (S, 2, "min_token", 4),
    (S, 2, "min_tokens", 1),
    (S, 2, "min_tokens", 2.5),
    (S, 2, "min_tokens", True),
    (S, 2, "min_tokens", "8"),
    (S, 0, "min_tokens", 8),
    (S, 1, "beside", "domain"),
    ("sweeps", 2),
    *((*path, bad) for path in NUMBERS for bad in (0, -1, float("inf"), float("nan"), True, "0.1", [1])),
]
TREE_EDITS: list[Edit] = [
    ("branchs", []),
    ("sweps", 2),
    (B, 0, "besid", "domain"),
    (S, 1, "ony", {}),
    (S, 2, "joins", []),
    (B, 0, "budget", "poss", 1),
    (B, {"name": "a"}),
    (B, 0, "modality"),
    (B, 0, "budget", ...),
    (B, 0, "beside", "domian"),
    (B, 0, "beside", 3),
    (B, 0, "name", "task"),
    (B, 0, "only", {"domain": ["code"]}),
    (B, 0, "min_tokens", 4),
    (B, 1, "name", "modality"),
    (S, 2, "join", "domain"),
    (S, 2, "join", ["task", 3]),
    (S, 2, "join", ["domain", "task"]),
    (S, 1, "only", ["code"]),
    (S, 1, "only", "domain", "code"),
    (S, 1, "only", "domain", []),
    (S, 1, "only", {"domian": ["code"]}),
    (S, 1, "only", {"trajectory": ["code"]}),
    (S, 0, "enabled", False),
    ("sweeps", 0),
    ("sweeps", 1.5),
    ("sweeps", True),
    (B, []),
]
STRUCTURES: dict[str, Config] = {
    "a branch named as a stratum": config(DOMAIN, TRAJECTORY, branches=(stratum("domain"),)),
    "a join with itself": config(stratum("crossing", join=["domain", "domain"])),
    "a join of one": config(stratum("crossing", join=["domain"])),
    "a join named as its part": config(stratum("crossing", join=["crossing", "x"])),
    "a join of nested strata": config(DOMAIN, GROUP, stratum("crossing", join=["prompt_group", "domain"])),
    "a coarser part below": config(stratum("crossing", join=["domain", "modality"]), DOMAIN),
    "a join of a join": config(stratum("crossing", join=["domain", "x"]), stratum("all", join=["crossing", "y"])),
    "a join twice": config(stratum("crossing", join=["a", "b"]), stratum("again", join=["b", "a"])),
    "a branch that a join refines": config(
        DOMAIN, stratum("crossing", join=["domain", "modality"]), TRAJECTORY, branches=(stratum("modality"),)
    ),
    "a branch that is a part of another": config(
        DOMAIN, TRAJECTORY, branches=(stratum("crossing", join=["expert", "layer"]), stratum("expert"))
    ),
    "a branch that refines the finest": config(
        DOMAIN, TRAJECTORY, branches=(stratum("crossing", join=["trajectory", "expert"]),)
    ),
    "a branch beside one that is off": config(OFF, TRAJECTORY, branches=(stratum("x", beside="domain"),)),
    "a branch beside no chain": config(OFF, branches=(stratum("x"),)),
    "only of a finer stratum": config(stratum("x", only={"domain": ["a"]}), DOMAIN),
    "only of one that is off": config(OFF, TRAJECTORY, stratum("x", only={"domain": ["a"]})),
    "a floor below one that is off": config(OFF, stratum("trajectory", min_tokens=3)),
}


def refused_configs() -> Iterator[tuple[str, Any]]:
    """By name."""
    for base, edits in ((CHAIN, EDITS), (TREE, TREE_EDITS)):
        for edit in edits:
            *path, value = edit
            what = "taken out" if value is ... else repr(value)
            yield f"{'tree' if base is TREE else 'chain'}: {'.'.join(map(str, path))} {what}", edited(base, *edit)
    yield from STRUCTURES.items()
    yield from ((f"no mapping: {given!r}", given) for given in (3, None, [1, 2]))
