"""Random cases: hierarchies of `random_hierarchies` with tokens, masks, ranks, dtypes and other ratio-gating maps.

Log-ratios drift token by token and by class, on scales from far inside every budget to far beyond. Tokens come in rows
(`shape`) or in any order, and what masked tokens hold may be NaN or infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.objective.random_hierarchies import Array, Batch, Draw, columns_of, draw_hierarchy

NUM_CASES = 300
SCALES = (0.0, 0.004, 0.03, 0.03, 0.1, 0.1, 0.4)


@dataclass(frozen=True)
class Case:
    """One batch: the arguments of the public functions, and how its tokens are divided over ranks.

    labels     int64 [T], or uint8 [T, P] for soft membership
    shape      (B, S) of the whole batch; ranks then hold whole rows
    rank_T     the rank of every token; a rank may have none
    shared     whether cells are shared where one process could do without
    gatings    class name and arguments of other ratio-gating maps
    weights    (stratum, whether cells are built of it alone), for `token_weights`
    """

    name: str
    config: dict[str, Any]
    labels: dict[str, Array]
    mask: Array | None
    names: dict[str, list[str]]
    shape: tuple[int, int] | None
    log_ratio: Array
    weighted_advantage: Array
    dtype: str
    rank_T: Array
    world_size: int
    shared: bool
    gatings: tuple[tuple[str, dict[str, Any]], ...] = ()
    weights: tuple[tuple[str, bool], ...] = ()

    @property
    def live(self) -> Array:
        return np.ones(len(self.log_ratio), bool) if self.mask is None else self.mask

    @property
    def active(self) -> list[dict[str, Any]]:
        """The entries of the strata and branches that are switched on."""
        entries = [*self.config["strata"], *self.config.get("branches", [])]
        return [entry for entry in entries if entry.get("enabled", True)]

    @property
    def soft(self) -> str | None:
        """The column of soft membership, where an active stratum goes by it."""
        used = {column for entry in self.active for column in columns_of(entry)}
        return next((name for name in self.labels if self.labels[name].ndim == 2 and name in used), None)


def _eligible(case_labels: dict[str, Array], active: list[dict[str, Any]], floors: bool) -> list[str]:
    """Strata that have every token in one cell; without `floors` those of them that merge no cells."""
    return [
        entry["name"]
        for entry in active
        if not entry.get("only")
        and (floors or not entry.get("min_tokens"))
        and all(case_labels[column].ndim == 1 for column in columns_of(entry))
    ]


def _gatings(draw: Draw, strata: list[str]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Up to two maps; those that couple tokens where there is a stratum for it."""
    clip = {"low": draw.positive(0.02, 0.5), "high": draw.positive(0.02, 0.9), "use_min": draw.chance(0.5)}
    token_wise = [
        ("PpoClip", clip),
        ("TrulyPpo", {"eps": draw.positive(0.02, 0.6), "alpha": draw.positive(0.1, 3.0), "use_min": draw.chance(0.5)}),
    ]
    if not strata:
        return (draw.pick(token_wise),)
    coupling = [
        ("Gspo", {**clip, "low": clip["low"] / 8, "high": clip["high"] / 8, "stratum": draw.pick(strata)}),
        ("Apc", {"delta": draw.positive(0.003, 0.1), "stratum": draw.pick(strata), "space": "ratio"}),
        ("Apc", {"delta": draw.positive(0.003, 0.1), "stratum": draw.pick(strata), "space": "log"}),
    ]
    return draw.pick(token_wise), draw.pick(coupling)


def _mask(draw: Draw, batch: Batch) -> Array | None:
    """No mask, scattered tokens, the ends of rows, whole rows, or no live token at all."""
    kind, num = draw.whole(0, 8), batch.num
    if kind < 2:
        return None
    if kind < 5:
        return draw.values(10, num) > 1
    if kind < 8:
        ends = np.repeat(draw.values(batch.length + 1, batch.rows), batch.length)
        return np.arange(num) % batch.length < ends
    return np.zeros(num, bool) if draw.chance(0.4) else draw.values(10, num) > 7


def _log_ratio(draw: Draw, batch: Batch) -> Array:
    scale = draw.pick(SCALES)
    value = draw.normal(batch.num)
    for name in draw.some([name for name, label in batch.labels.items() if label.ndim == 1] or [""], 3):
        if name:
            class_T = np.unique(batch.labels[name], return_inverse=True)[1].reshape(-1)
            value = value + draw.normal(int(class_T.max()) + 1)[class_T]
    value[draw.values(9, batch.num) == 0] = 0.0
    value[draw.values(19, batch.num) == 0] = -0.0
    return np.round(scale * value * 2.0**26) / 2.0**26


def _ranks(draw: Draw, batch: Batch, in_rows: bool) -> tuple[Array, int]:
    world_size = 1 if draw.chance(0.5) else draw.whole(2, 4)
    holders = draw.rng.permutation(world_size)
    if world_size > 1 and draw.chance(0.3):
        holders = holders[1:]
    return holders[batch.split(len(holders), tokenwise=not in_rows)], world_size


def _allow_negative(draw: Draw, batch: Batch, config: dict[str, Any]) -> None:
    """Labels of strata of the chain may be negative where no stratum is missing and no join has them as a part."""
    entries = [*config["strata"], *config.get("branches", [])]
    apart = {column for entry in entries if entry.get("join") for column in entry["join"]} | set(batch.names)
    for entry in config["strata"] if not any(entry.get("only") for entry in entries) else []:
        name = entry["name"]
        free = not entry.get("join") and name not in apart and batch.labels[name].ndim == 1
        if free and draw.chance(0.3):
            batch.labels[name] = batch.labels[name] - 1000


def make_case(seed: int) -> Case:
    """The case of a seed."""
    draw = Draw(seed)
    rows, length = (draw.whole(2, 3), 32) if draw.chance(0.06) else (draw.whole(4, 10), draw.whole(6, 8))
    batch, config = draw_hierarchy(draw, rows, length)
    _allow_negative(draw, batch, config)
    in_rows = draw.chance(0.35)
    mask, log_ratio, (rank_T, world_size) = _mask(draw, batch), _log_ratio(draw, batch), _ranks(draw, batch, in_rows)
    advantage = draw.normal(batch.num) * draw.pick([1.0, 0.125])
    if mask is not None and draw.chance(0.5):
        for value in (log_ratio, advantage):
            bad = draw.values(4, batch.num)
            value[~mask & (bad == 0)], value[~mask & (bad == 1)] = np.nan, -np.inf
    labels, order = batch.labels, slice(None)
    if not in_rows and draw.chance(0.6):
        order = draw.rng.permutation(batch.num)
    active = [entry for entry in [*config["strata"], *config.get("branches", [])] if entry.get("enabled", True)]
    used = {column for entry in active for column in columns_of(entry)}
    if used and draw.chance(0.5):
        labels = {name: label for name, label in labels.items() if name in used}
    known = set(labels) | {entry["name"] for entry in [*config["strata"], *config.get("branches", [])]}
    whole, hard = _eligible(labels, active, floors=True), [name for name in labels if labels[name].ndim == 1]
    weights = [(name, False) for name in draw.some(whole, 1)] if whole else []
    weights += [(name, True) for name in draw.some(hard, 1)] if hard else []
    return Case(
        name=f"seed_{seed}",
        config=config,
        labels={name: label[order] for name, label in labels.items()},
        mask=None if mask is None else mask[order],
        names={name: list(called) for name, called in batch.names.items() if name in known},
        shape=(rows, length) if in_rows else None,
        log_ratio=log_ratio[order],
        weighted_advantage=advantage[order],
        dtype=draw.pick(["float64"] * 9 + ["float32"] * 2 + ["bfloat16"]),
        rank_T=rank_T[order],
        world_size=world_size,
        shared=world_size > 1 or any(entry.get("min_tokens") for entry in active) or draw.chance(0.5),
        gatings=_gatings(draw, _eligible(labels, active, floors=False)) if draw.chance(0.45) else (),
        weights=tuple(weights),
    )
