"""Random hierarchies with labels for them, as plain data: dicts for `load_hierarchy`, and numpy arrays.

Chains of 1 to 5 strata, joins, missing levels (`only`), floors (`min_tokens`), branches, sweeps, soft membership, named
cells with budgets of their own, every form of slope, and strata that are switched off.

Draws come from numpy's legacy generator, whose stream is frozen, and are rounded to multiples of 2^-26: the same seed
gives the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
PLAIN = ("domain", "prompt_group", "task", "trajectory", "segment")
WORDS = ("code", "math", "chat", "law", "bio", "art", "news", "maps")
SOFT_UNITS = 255


def columns_of(entry: dict[str, Any]) -> list[str]:
    return entry.get("join") or [entry["name"]]


class Draw:
    """Draws of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random_sample() < probability)

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.randint(low, high + 1, dtype=np.int64))

    def values(self, below: int, num: int) -> Array:
        return self.rng.randint(0, below, num, dtype=np.int64)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.whole(0, len(options) - 1)]

    def some(self, options: Sequence[Any], most: int) -> list[Any]:
        """One or more of the options, in their order."""
        chosen = self.rng.permutation(len(options))[: self.whole(1, min(most, len(options)))]
        return [options[index] for index in sorted(chosen)]

    def normal(self, num: int) -> Array:
        return np.round(self.rng.standard_normal(num) * 2.0**26) / 2.0**26

    def positive(self, low: float, high: float) -> float:
        """Between the two, evenly by logarithm, with four digits."""
        return float(f"{low * (high / low) ** self.rng.random_sample():.4g}")


@dataclass
class Batch:
    """What is being drawn: tokens in rows, their labels and names, and the strata, coarsest first."""

    draw: Draw
    rows: int
    length: int
    use_only: bool
    labels: dict[str, Array] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    strata: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num(self) -> int:
        return self.rows * self.length

    def split(self, parts: int, tokenwise: bool) -> Array:
        """A part for every row, or for every token: [T]."""
        if tokenwise:
            return self.draw.values(parts, self.num)
        return np.repeat(self.draw.values(parts, self.rows), self.length)

    def add_column(self, name: str, value_T: Array, named: bool) -> None:
        """Labels for the classes 0, 1, .. of `value_T`: with names, some of them of no token; or any integers."""
        size = int(value_T.max()) + 1
        if named and size < len(WORDS):
            size += self.draw.whole(0, 1)
            self.names[name] = [WORDS[index] for index in self.draw.rng.permutation(len(WORDS))[:size]]
            self.labels[name] = self.draw.rng.permutation(size)[value_T]
            return
        stride, first = self.draw.pick([(1, 0), (1, 100), (9_999_991, 7), (3, 2**30)])
        self.labels[name] = first + stride * self.draw.rng.permutation(size)[value_T]

    def add_soft(self, name: str, value_T: Array, parts: int, named: bool = False) -> None:
        """Shares in `parts` values, in units of 1/255: of some tokens all in one value, of some in several."""
        share = np.zeros((self.num, parts), np.int64)
        for token, value in enumerate(value_T):
            cuts = np.sort(self.draw.values(SOFT_UNITS + 1, parts - 1))
            spread = np.diff(np.concatenate([[0], cuts, [SOFT_UNITS]]))
            kind = self.draw.whole(0, 2)
            share[token] = spread if kind else 0
            if kind == 0:
                share[token, value] = SOFT_UNITS
            elif kind == 1 and parts > 2:
                share[token, value] += share[token, value - 1]
                share[token, value - 1] = 0
        self.labels[name] = share.astype(np.uint8)
        if named or self.draw.chance(0.5):
            self.names[name] = list(WORDS[:parts])

    def add_expert(self, named: bool) -> None:
        """The column of experts, hard or soft; `named` where it must have names."""
        parts = self.draw.whole(2, 4)
        value_T = self.split(parts, tokenwise=True)
        if self.draw.chance(0.55):
            self.add_soft("expert", value_T, parts, named)
        else:
            self.add_column("expert", value_T, named=True)

    def named(self, entry: dict[str, Any]) -> list[str]:
        """The names of the cells of a stratum; none where a part of it has none."""
        called = [""]
        for column in columns_of(entry):
            called = [f"{head}/{name}" if head else name for head in called for name in self.names.get(column, [])]
        return called


def _dense(value_T: Array) -> Array:
    return np.unique(value_T, return_inverse=True)[1].reshape(-1)


def _refined_chain(batch: Batch) -> None:
    """Every stratum refines the one before it, by labels of its own or as its join with one more column."""
    draw, depth, cell_T = batch.draw, batch.draw.whole(1, 5), np.zeros(batch.num, np.int64)
    previous: list[str] = []
    for level in range(depth):
        last = level == depth - 1
        tokenwise = last and draw.chance(0.35)
        parts = draw.whole(2, 3) if level < 2 or tokenwise else draw.whole(1, 3)
        part_T = batch.split(parts, tokenwise)
        if last and previous and draw.chance(0.4):
            batch.add_expert(named=len(previous) > 1)
            batch.strata.append({"name": f"{previous[0]}_expert", "join": [*previous, "expert"]})
            return
        cell_T = _dense(cell_T * parts + part_T)
        if draw.chance(0.3):
            if not previous:
                other_T = batch.split(2, tokenwise)
                batch.add_column("language", other_T, named=True)
                cell_T, previous = _dense(cell_T * 2 + other_T), ["language"]
            column = f"trait_{level}"
            bare = not batch.use_only and all(name in batch.names for name in previous)
            batch.add_column(column, part_T, named=not (bare and draw.chance(0.3)))
            previous = [*previous, column]
            batch.strata.append({"name": f"joined_{level}", "join": previous})
        else:
            few = level < 2 or cell_T.max() < 6
            batch.add_column(PLAIN[level], cell_T, draw.chance((0.9 if batch.use_only else 0.45) if few else 0.0))
            previous = [PLAIN[level]]
            batch.strata.append({"name": PLAIN[level]})


def _crossed_chain(batch: Batch) -> None:
    """A chain whose strata are joined with the experts from one of them on."""
    draw, depth, cell_T = batch.draw, batch.draw.whole(1, 3), np.zeros(batch.num, np.int64)
    plain = list(PLAIN[:depth])
    for name in plain:
        parts = draw.whole(2, 3)
        cell_T = _dense(cell_T * parts + batch.split(parts, tokenwise=False))
        batch.add_column(name, cell_T, named=cell_T.max() < 4 and draw.chance(0.6))
    batch.add_expert(named=False)
    start = draw.whole(0, depth)
    batch.strata += [{"name": name} for name in plain[:start]]
    if start == 0:
        batch.strata.append({"name": "expert"})
    batch.strata += [{"name": f"{name}_expert", "join": [name, "expert"]} for name in plain[max(start - 1, 0) :]]


def _budget(draw: Draw) -> dict[str, float]:
    return {"pos": draw.positive(0.005, 0.12), "neg": draw.positive(0.004, 0.09)}


def _configure(batch: Batch, entry: dict[str, Any]) -> None:
    """Budgets, overrides and slope of a stratum or a branch."""
    draw, names = batch.draw, batch.named(entry)
    entry["budget"] = _budget(draw)
    if names and draw.chance(0.4):
        entry["budgets"] = {name: _budget(draw) for name in draw.some(names, 2)}
    form = draw.whole(0, 4)
    if form < 2:
        entry["slope"] = draw.positive(0.2, 3.0) if form else draw.positive(3.0, 60.0)
    elif form == 2:
        entry["slope"] = {"cap": draw.whole(1, 20)}


def _arrange(batch: Batch, strata: list[dict[str, Any]], floors: bool) -> None:
    """Missing levels and floors of the active strata, none of them of the coarsest."""
    draw = batch.draw
    for place, entry in enumerate(strata[1:], 1):
        keys = [other for other in strata[:place] if len(batch.named(other)) > 1]
        if batch.use_only and keys and draw.chance(0.6):
            chosen = draw.some(keys[::-1], 1 if draw.chance(0.7) else 2)
            entry["only"] = {
                key["name"]: draw.some(batch.named(key), max(len(batch.named(key)) - 1, 1)) for key in chosen
            }
        if floors and draw.chance(0.6):
            entry["min_tokens"] = draw.whole(2, 9)


def _add_branches(batch: Batch, config: dict[str, Any], active: list[dict[str, Any]]) -> None:
    """One or two branches. None stands directly before a stratum that is missing somewhere."""
    draw, soft = batch.draw, any(label.ndim == 2 for label in batch.labels.values())
    config["branches"] = []
    places = [n for n in range(len(active)) if n + 1 == len(active) or not active[n + 1].get("only")]
    for index in range(draw.whole(1, 2)):
        column, place = f"branch_{index}", draw.pick(places)
        tokenwise, parts = draw.chance(0.6), draw.whole(2, 3)
        if index == 0 and not soft and draw.chance(0.3):
            batch.add_soft(column, batch.split(parts, tokenwise), parts)
        else:
            batch.add_column(column, batch.split(parts, tokenwise), named=draw.chance(0.6))
        entry: dict[str, Any] = {"name": column}
        joined = columns_of(active[0])
        finer = place > 0 and not set(columns_of(active[-1])) <= set(joined)
        if finer and all(name in batch.names for name in joined) and draw.chance(0.25):
            entry = {"name": f"{column}_joined", "join": [*joined, column]}
        if place < len(active) - 1 or draw.chance(0.5):
            entry["beside"] = active[place]["name"]
        if index and draw.chance(0.15):
            entry["enabled"] = False
        _configure(batch, entry)
        config["branches"].append(entry)
    config["sweeps"] = draw.whole(1, 3)


def draw_hierarchy(draw: Draw, rows: int, length: int) -> tuple[Batch, dict[str, Any]]:
    """Labels of rows * length tokens, and a hierarchy for `load_hierarchy`."""
    batch = Batch(draw, rows, length, use_only=draw.chance(0.4))
    if draw.chance(0.3):
        _crossed_chain(batch)
    else:
        _refined_chain(batch)
    off = draw.some(batch.strata, 2) if draw.chance(0.2) else []
    if len(off) == len(batch.strata) and draw.chance(0.8):
        off = []
    for entry in batch.strata:
        _configure(batch, entry)
        if any(entry is other for other in off):
            entry["enabled"] = False
    active = [entry for entry in batch.strata if entry.get("enabled", True)]
    config: dict[str, Any] = {"token_clip": draw.positive(0.02, 0.15), "strata": batch.strata}
    if active:
        _arrange(batch, active, floors=draw.chance(0.45))
        if draw.chance(0.45):
            _add_branches(batch, config, active)
    return batch, config
