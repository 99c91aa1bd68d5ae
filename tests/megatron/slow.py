"""The objective of a batch by loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import torch

from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.objective import Hierarchy
from tests.megatron.batches import NAMES, Batch, labels_of, shares_of


def slow_objective(log_ratio: torch.Tensor, batch: Batch, chain: Hierarchy) -> torch.Tensor:
    """J by loops over tokens and cells, differentiable by autograd: docs/equations.md, the gated log-ratio, with (18).

    A cell is the tuple of its labels, several where the stratum is a join. A token is one entry of share 1, or with
    soft membership one of share q per expert partition. A cell below the floor is passed over.
    """
    live = [tuple(place) for place in batch["mask"].nonzero().tolist()]
    channel = {(b, t): 1 if log_ratio[b, t] >= 0 else -1 for b, t in live}
    zero = log_ratio.new_zeros(())
    parts = {stratum.name: stratum.columns for stratum in chain.strata}
    shares = {(place, expert): q for place in live for expert, q in shares_of(batch, place).items()}
    ids = {
        (stratum, place, expert): tuple(expert if part == COLUMN else int(labels_of(batch, part)[place]) for part in of)
        for stratum, of in parts.items()
        for place, expert in shares
    }
    count: defaultdict[tuple, Fraction] = defaultdict(Fraction)
    for (stratum, place, expert), label in ids.items():
        count[stratum, label] += shares[place, expert]

    def name(stratum: str, cell: tuple[int, ...]) -> str:
        return "/".join(NAMES[part][label] for part, label in zip(parts[stratum], cell, strict=True))

    def mean(stratum: str, label: tuple[int, ...], sign: int) -> torch.Tensor:
        here = [entry for entry in shares if ids[stratum, *entry] == label and channel[entry[0]] == sign]
        return sum((float(shares[entry]) * log_ratio[entry[0]] for entry in here), zero) / float(count[stratum, label])

    def gate(x: torch.Tensor, budget: float, slope: float) -> torch.Tensor:
        if abs(x) <= budget:
            return x
        if abs(x) < budget * (1 + 1 / slope):
            return torch.sign(x).detach() * ((slope + 1) * budget - slope * x.abs())
        return x * 0

    means = {(*cell, sign): mean(*cell, sign) for cell in list(count) for sign in (1, -1)}
    logarithms = dict.fromkeys(live, zero)
    for ((place, expert), q), sign in itertools.product(shares.items(), (1, -1)):
        gated, above = zero, zero
        for stratum in chain.strata:
            label = ids[stratum.name, place, expert]
            if count[stratum.name, label] < (stratum.min_tokens or 0):
                continue
            own_name = name(stratum.name, label) if stratum.budgets else ""
            budgets = stratum.budgets.get(own_name, stratum.budget)
            slope = stratum.slope or float(count[stratum.name, label])
            own = means[stratum.name, label, sign]
            gated = gated + gate(own - above, budgets.pos if sign > 0 else budgets.neg, slope)
            above = own
        value = log_ratio[place] if channel[place] == sign else zero
        gated = gated + (value - above).clamp(-chain.token_clip, chain.token_clip)
        logarithms[place] = logarithms[place] + float(q) * gated
    lengths = Counter(int(batch["trajectory"][b]) for b, _ in live)
    total = zero
    for place in live:
        weight = 1 / (len(lengths) * lengths[int(batch["trajectory"][place[0]])])
        total = total + weight * batch["advantage"][place] * logarithms[place].exp()
    return total


def same_metrics(one: dict[str, float], other: dict[str, float], rel: float = 1e-9) -> bool:
    """Whether two reports say the same, number by number; what has no value (NaN) has none in both."""
    return one.keys() == other.keys() and all(
        math.isclose(value, other[name], rel_tol=rel, abs_tol=1e-14) or (math.isnan(value) and math.isnan(other[name]))
        for name, value in one.items()
    )
