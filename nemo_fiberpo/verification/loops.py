"""The objective of a batch by loops over tokens and cells, which share no code with the objective that they check."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from nemo_fiberpo.labelling.expert_partitions import COLUMN
from nemo_fiberpo.objective import Hierarchy, SlopeCap

Shares = Callable[[tuple[int, ...]], Mapping[int, Fraction]]


def _whole(_place: tuple[int, ...]) -> Mapping[int, Fraction]:
    return {0: Fraction(1)}


def objective_by_loops(
    log_ratio: Tensor,
    mask: Tensor,
    advantage: Tensor,
    labels: Mapping[str, Tensor],
    hierarchy: Hierarchy,
    names: Mapping[str, Sequence[str]],
    shares_of: Shares = _whole,
) -> Tensor:
    """J by loops over tokens and cells, differentiable by autograd: docs/equations.md, the gated log-ratio, with (18).

    Args
        log_ratio, mask, advantage   [b, s]
        labels      one per token, [b, s], by column; "trajectory" among them
        names       of the labels of columns with budgets by name
        shares_of   place -> {expert partition: share}: of a token with soft membership in several

    A cell is the tuple of its labels, several where the stratum is a join. A token is one entry of share 1, or with
    soft membership one of share q per expert partition. A cell below the floor is passed over.
    """
    live = [tuple(place) for place in mask.nonzero().tolist()]
    channel = {(b, t): 1 if log_ratio[b, t] >= 0 else -1 for b, t in live}
    zero = log_ratio.new_zeros(())
    parts = {stratum.name: stratum.columns for stratum in hierarchy.strata}
    shares = {(place, expert): q for place in live for expert, q in shares_of(place).items()}
    ids = {
        (name, place, expert): tuple(expert if part == COLUMN else int(labels[part][place]) for part in of)
        for name, of in parts.items()
        for place, expert in shares
    }
    count: defaultdict[tuple, Fraction] = defaultdict(Fraction)
    for (of_stratum, place, expert), label in ids.items():
        count[of_stratum, label] += shares[place, expert]

    def spelled(stratum: str, cell: tuple[int, ...]) -> str:
        return "/".join(names[part][label] for part, label in zip(parts[stratum], cell, strict=True))

    def mean(stratum: str, label: tuple[int, ...], sign: int) -> torch.Tensor:
        here = [entry for entry in shares if ids[stratum, *entry] == label and channel[entry[0]] == sign]
        return sum((float(shares[entry]) * log_ratio[entry[0]] for entry in here), zero) / float(count[stratum, label])

    def gate(x: torch.Tensor, budget: float, slope: float) -> torch.Tensor:
        if abs(x) <= budget:
            return x
        if abs(x) < budget * (1 + 1 / slope):
            return torch.sign(x).detach() * ((slope + 1) * budget - slope * x.abs())
        return x * 0

    means = {(of, label, sign): mean(of, label, sign) for of, label in list(count) for sign in (1, -1)}
    logarithms = dict.fromkeys(live, zero)
    for ((place, expert), q), sign in itertools.product(shares.items(), (1, -1)):
        gated, above = zero, zero
        for stratum in hierarchy.strata:
            label = ids[stratum.name, place, expert]
            if count[stratum.name, label] < (stratum.min_tokens or 0):
                continue
            own_name = spelled(stratum.name, label) if stratum.budgets else ""
            budgets = stratum.budgets.get(own_name, stratum.budget)
            assert not isinstance(stratum.slope, SlopeCap), "a cap is not part of these loops"
            slope = stratum.slope or float(count[stratum.name, label])
            own = means[stratum.name, label, sign]
            gated = gated + gate(own - above, budgets.pos if sign > 0 else budgets.neg, slope)
            above = own
        value = log_ratio[place] if channel[place] == sign else zero
        gated = gated + (value - above).clamp(-hierarchy.token_clip, hierarchy.token_clip)
        logarithms[place] = logarithms[place] + float(q) * gated
    lengths = Counter(int(labels["trajectory"][b, t]) for b, t in live)
    total = zero
    for place in live:
        weight = 1 / (len(lengths) * lengths[int(labels["trajectory"][place])])
        total = total + weight * advantage[place] * logarithms[place].exp()
    return total
