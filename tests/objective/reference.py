"""The objective in plain Python loops over entries, from the formulas of docs/equations.md: no code of the package.

An entry is a token with its label in every column, and its share in them: a token has one entry, of share 1, or with
soft membership one for every value in which it has a share. Every entry carries what is left of its two channels. A
stratum takes from each entry the mean over the entry's cell, coarser strata first, and nothing where the stratum is
missing or the cell is below its floor. What a cell has taken in all is its drift.

Numbers remember what they were made of, so that the gradient comes from the same loops by the chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

UNITS = 255
"""Soft shares are whole numbers of 1/255."""
Cell = tuple[int, ...]
Pair = list["Number"]


class Number:
    """A value, and the numbers it was made of with its partial derivatives by them."""

    __slots__ = ("parts", "value")

    def __init__(self, value: float, parts: Sequence[tuple[Number, float]] = ()) -> None:
        self.value, self.parts = value, parts


def combination(terms: Sequence[tuple[Number, float]], constant: float = 0.0) -> Number:
    """constant + the sum of factor * number."""
    return Number(constant + math.fsum(number.value * factor for number, factor in terms), terms)


def product(a: Number, b: Number) -> Number:
    return Number(a.value * b.value, [(a, b.value), (b, a.value)])


def exp(x: Number) -> Number:
    return Number(math.exp(x.value), [(x, math.exp(x.value))])


def gradient(total: Number, leaves: Sequence[Number]) -> list[float]:
    """Derivatives of `total` by the leaves."""
    order: list[Number] = []
    seen: set[int] = set()
    stack = [(total, False)]
    while stack:
        number, finished = stack.pop()
        if finished:
            order.append(number)
        elif id(number) not in seen:
            seen.add(id(number))
            stack += [(number, True), *((part, False) for part, _ in number.parts)]
    by: dict[int, float] = {id(total): 1.0}
    for number in reversed(order):
        for part, partial in number.parts:
            by[id(part)] = by.get(id(part), 0.0) + partial * by[id(number)]
    return [by.get(id(leaf), 0.0) for leaf in leaves]


def rollback(x: Number, budget: float, slope: float) -> Number:
    """(10), case by case."""
    if abs(x.value) <= budget:
        return x
    if abs(x.value) < budget * (1.0 + 1.0 / slope):
        return combination([(x, -slope)], math.copysign((slope + 1.0) * budget, x.value))
    return Number(0.0)


def clip(x: Number, bound: float, slope: float = 0.0) -> Number:
    """(12) in logarithms; and the gate of that name."""
    return x if abs(x.value) <= bound else Number(math.copysign(bound, x.value))


def soft(x: Number, budget: float, slope: float) -> Number:
    """x exp(-(x / C)^2 / 2)."""
    square = product(x, x)
    return product(x, exp(combination([(square, -0.5 / budget**2)])))


GATES = {"rollback": rollback, "clip": clip, "soft": soft}


@dataclass
class Entry:
    token: int
    labels: dict[str, int]
    share: Fraction
    left: Pair


def entries_of(ell: Sequence[Number], labels: Mapping[str, Sequence[Any]], live: Sequence[bool]) -> list[Entry]:
    """`labels` by column: a label for every token; or for one column the shares of every token in its values."""
    out = []
    for i in range(len(ell)):
        if not live[i]:
            continue
        of_token = {name: column[i] for name, column in labels.items()}
        spread = [name for name, label in of_token.items() if isinstance(label, Sequence)]
        shares = dict(enumerate(of_token[spread[0]])) if spread else {None: UNITS}
        for value, share in shares.items():
            if share:
                own = of_token | ({spread[0]: value} if spread else {})
                channels = [ell[i], Number(0.0)] if ell[i].value >= 0 else [Number(0.0), ell[i]]
                out.append(Entry(i, own, Fraction(share, UNITS), channels))
    return out


class Stratum:
    """Cells of one stratum: which entries they hold, their tokens, and the drift that they have taken."""

    def __init__(self, given: Any, coarser: Sequence[Stratum], entries: Sequence[Entry], names: Any) -> None:
        self.given, self.columns, self.names = given, tuple(given.join) or (given.name,), names
        self.members: dict[Cell, list[Entry]] = {}
        above = {stratum.given.name: stratum for stratum in coarser}
        for entry in entries:
            if all(above[name].called(above[name].cell(entry)) in kept for name, kept in given.only.items()):
                self.members.setdefault(tuple(entry.labels[name] for name in self.columns), []).append(entry)
        self.holder = {id(entry): cell for cell, members in self.members.items() for entry in members}
        self.count = {cell: sum(entry.share for entry in members) for cell, members in self.members.items()}
        self.drift: dict[Cell, Pair] = {
            cell: [Number(0.0), Number(0.0)] for cell, count in self.count.items() if count >= (given.min_tokens or 0)
        }

    def cell(self, entry: Entry) -> Cell | None:
        return self.holder.get(id(entry))

    def called(self, cell: Cell | None) -> str | None:
        """The name of a cell; of a join those of its parts."""
        if cell is None or not all(name in self.names for name in self.columns):
            return None
        return "/".join(self.names[name][label] for name, label in zip(self.columns, cell, strict=True))

    def take(self) -> None:
        """Every cell takes the mean, (9) and (33), of what its entries have left."""
        for cell, drift in self.drift.items():
            members, count = self.members[cell], self.count[cell]
            for side in (0, 1):
                mean = combination([(entry.left[side], float(entry.share / count)) for entry in members])
                drift[side] = combination([(drift[side], 1.0), (mean, 1.0)])
                for entry in members:
                    entry.left[side] = combination([(entry.left[side], 1.0), (mean, -1.0)])

    def gated(self, entry: Entry, default: Any) -> list[Number]:
        """g of both channels of the entry's cell; `default` is the gate of the hierarchy."""
        cell = self.cell(entry)
        if cell is None or cell not in self.drift:
            return []
        budget = self.given.budgets.get(self.called(cell), self.given.budget)
        slope, count = self.given.slope, float(self.count[cell])
        slope = count if slope is None else min(count, slope.cap) if hasattr(slope, "cap") else slope
        gate = GATES[(self.given.gate or default).name]
        pair = zip(self.drift[cell], (budget.pos, budget.neg), strict=True)
        return [gate(x, bound, slope) for x, bound in pair]


def in_order(hierarchy: Any, chain: Sequence[Stratum], branches: Sequence[Stratum]) -> list[Stratum]:
    """Strata in the order in which they take: a part of the chain and the branches beside its last stratum, repeated
    `sweeps` times, then the next part."""
    order: list[Stratum] = []
    first = 0
    for place, stratum in enumerate(chain):
        beside = [b for b in branches if (b.given.beside or chain[-1].given.name) == stratum.given.name]
        if beside:
            order += [*chain[first : place + 1], *beside] * hierarchy.sweeps
            first = place + 1
    return order + list(chain[first:])


@dataclass
class Outcome:
    """J; dJ/d ell and log rhat of every token, 0 where masked."""

    value: float
    coefficients: list[float]
    gated: list[float]


def evaluate(
    hierarchy: Any,
    labels: Mapping[str, Sequence[Any]],
    ell: Sequence[float],
    weight: Sequence[float],
    live: Sequence[bool],
    names: Mapping[str, Sequence[str]],
    use_min: bool = False,
) -> Outcome:
    """(18) and (30), of what `hierarchy` says as data; with `use_min` each token counts min(r A, rhat A)."""
    leaves = [Number(x if alive else 0.0) for x, alive in zip(ell, live, strict=True)]
    entries = entries_of(leaves, labels, live)
    chain: list[Stratum] = []
    for given in hierarchy.strata:
        if given.enabled:
            chain.append(Stratum(given, chain, entries, names))
    branches = [Stratum(given, (), entries, names) for given in hierarchy.branches if given.enabled]
    for stratum in in_order(hierarchy, chain, branches):
        stratum.take()
    terms: dict[int, list[tuple[Number, float]]] = {i: [] for i in range(len(ell)) if live[i]}
    for entry in entries:
        eps = hierarchy.token_clip
        if hierarchy.token_clips:
            eps = hierarchy.token_clips.get(chain[0].called(chain[0].cell(entry)), eps)
        parts = [clip(left, eps) for left in entry.left]
        for stratum in (*chain, *branches):
            parts += stratum.gated(entry, hierarchy.gate)
        terms[entry.token] += [(part, float(entry.share)) for part in parts]
    gated = {i: combination(of_token) for i, of_token in terms.items()}
    counted = []
    for i, log_rhat in gated.items():
        ratio, own = exp(log_rhat), exp(leaves[i])
        counted.append((own if use_min and own.value * weight[i] < ratio.value * weight[i] else ratio, weight[i]))
    total = combination(counted)
    coefficients = gradient(total, leaves)
    return Outcome(total.value, coefficients, [gated[i].value if i in gated else 0.0 for i in range(len(ell))])
