"""Which strata may stand together: what would count a drift twice, or not at all, is refused with an explanation.

Some of it shows in the configuration alone, some in the labels of a data set. A single batch is never held against a
hierarchy: two classifications may coincide in it by chance, and sweeps are exact then too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .stratum import Stratum
from .wording import nearest


def check_structure(strata: Sequence[Stratum], branches: Sequence[Stratum], sweeps: object) -> None:
    """Refuse what the configuration shows to be wrong; ValueError names the field."""
    if not strata:
        raise ValueError("strata: at least one stratum is required")
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 1:
        raise ValueError(f"sweeps: must be a whole number of at least 1, got {sweeps!r}")
    if sweeps > 1 and not branches:
        raise ValueError("sweeps: repeats the extraction of branches, but there are none; a chain is exact at once")
    _unique(strata, branches)
    for where, stratum in _placed(strata, branches):
        _check_join(where, stratum, strata, branches)
    for index, stratum in enumerate(strata):
        if stratum.beside is not None:
            raise ValueError(
                f"strata[{index}].beside: is for branches; a stratum of the chain stands where the list has it"
            )
        _check_only(f"strata[{index}].only", stratum, strata, index)
        if stratum.min_tokens and stratum.enabled and not any(other.enabled for other in strata[:index]):
            raise ValueError(
                f"strata[{index}].min_tokens: {stratum.name!r} is the coarsest active stratum, so that its small cells "
                "have no parent to be merged into"
            )
    for index, branch in enumerate(branches):
        _check_branch(f"branches[{index}]", branch, strata, branches[:index])


def _placed(strata: Sequence[Stratum], branches: Sequence[Stratum]) -> Iterator[tuple[str, Stratum]]:
    for kind, listed in (("strata", strata), ("branches", branches)):
        for index, stratum in enumerate(listed):
            yield f"{kind}[{index}]", stratum


def _unique(strata: Sequence[Stratum], branches: Sequence[Stratum]) -> None:
    seen: dict[str, str] = {}
    for where, stratum in _placed(strata, branches):
        if stratum.name in seen:
            why = "names must be unique"
            if where.startswith("branches"):
                why = "the same classification twice would count its drift twice"
            raise ValueError(f"{where}.name: {stratum.name!r} is already the name of {seen[stratum.name]}; {why}")
        seen[stratum.name] = where


def _check_join(where: str, stratum: Stratum, strata: Sequence[Stratum], branches: Sequence[Stratum]) -> None:
    if not stratum.join:
        return
    chain = [other.name for other in strata]
    for index, part in enumerate(stratum.join):
        if part == stratum.name:
            raise ValueError(f"{where}.join: names {part!r} itself, whose name it has; give the join a name of its own")
        if part in stratum.join[:index]:
            raise ValueError(f"{where}.join: names {part!r} twice; a classification joined with itself is itself")
        inner = next((other for other in (*strata, *branches) if other.name == part and other.join), None)
        if inner is not None:
            raise ValueError(f"{where}.join: {part!r} is a join; name its parts instead: {list(inner.join)}")
    if len(stratum.join) < 2:
        raise ValueError(f"{where}.join: must name two or more classifications, got {list(stratum.join)}")
    nested = sorted((chain.index(part), part) for part in stratum.join if part in chain)
    if len(nested) > 1:
        (_, coarser), (_, finer) = nested[:2]
        raise ValueError(
            f"{where}.join: every {finer} lies in one {coarser}, since both are in the chain: their join is {finer} "
            "itself, whose drift counts there already"
        )
    if stratum.name in chain and nested and nested[0][0] > chain.index(stratum.name):
        part = nested[0][1]
        raise ValueError(
            f"{where}.join: {part!r} is coarser than the join that refines it, but stands after it; strata are listed "
            "coarsest first"
        )
    for there, other in _placed(strata, branches):
        if there == where:
            return
        if other.enabled and stratum.enabled and set(other.join) == set(stratum.join):
            raise ValueError(
                f"{where}.join: {there} ({other.name!r}) is the join of the same classifications; the same "
                "classification twice would count its drift twice"
            )


def _check_only(where: str, stratum: Stratum, strata: Sequence[Stratum], place: int) -> None:
    coarser = {other.name: other for other in strata[:place]}
    for name in stratum.only:
        if name not in coarser:
            later = any(other.name == name for other in strata)
            why = "is not coarser than this stratum" if later else "is no stratum of the chain"
            raise ValueError(f"{where}.{name}: {why}; name one that stands before it{nearest(name, coarser)}")
        if stratum.enabled and not coarser[name].enabled:
            raise ValueError(f"{where}.{name}: is switched off")


def _check_branch(where: str, branch: Stratum, strata: Sequence[Stratum], earlier: Sequence[Stratum]) -> None:
    if branch.only:
        raise ValueError(
            f"{where}.only: a branch must cover every token, else its means are no projection; label the others with a "
            "cell of their own"
        )
    if branch.min_tokens is not None:
        raise ValueError(
            f"{where}.min_tokens: a branch has no parent that its small cells could be merged into; the token's own "
            "residual is measured from the chain and the branch together"
        )
    names = [stratum.name for stratum in strata]
    if branch.beside is not None and branch.beside not in names:
        raise ValueError(f"{where}.beside: no stratum of the chain is called {branch.beside!r}"
                         f"{nearest(branch.beside, names)}")  # fmt: skip
    if not branch.enabled:
        return
    active = [stratum for stratum in strata if stratum.enabled]
    if not active:
        raise ValueError(f"{where}: a branch stands beside a chain, but every stratum is switched off")
    beside = branch.beside or active[-1].name
    if beside not in [stratum.name for stratum in active]:
        raise ValueError(f"{where}.beside: {beside!r} is switched off")
    above = strata[: names.index(beside) + 1]
    known = {part for stratum in above if not stratum.only for part in (stratum.name, *stratum.columns)}
    if set(branch.columns) <= known:
        raise ValueError(f"{where}: {_nothing_left(branch.name, beside)}")
    if beside == active[-1].name and set(active[-1].columns) <= set(branch.columns):
        raise ValueError(f"{where}: {_belongs_into_the_chain(branch.name, beside)}")
    for other in earlier:
        if other.enabled and (other.beside or active[-1].name) == beside and set(branch.columns) <= set(other.columns):
            raise ValueError(f"{where}: {_nothing_left(branch.name, other.name)}")


def _nothing_left(name: str, finer: str) -> str:
    return (
        f"every {finer} lies in one {name}, so the drift of {name} is part of what {finer} has taken, and counts there "
        f"already: nothing would be left for the budget of {name}. Put {name} before {finer}: into `strata`, if they "
        "nest there, or as a branch beside a coarser stratum"
    )


def _belongs_into_the_chain(name: str, coarser: str) -> str:
    return (
        f"every {name} lies in one {coarser}, and finer strata in one {name}: it nests, so it belongs into `strata`, "
        f"after {coarser}, where its drift is counted beyond that of {coarser}"
    )


def check_data(
    strata: Sequence[Stratum], branches: Sequence[Stratum], labels: Mapping[str, Tensor], mask: Tensor | None
) -> None:
    """Refuse what the labels of a data set show to count twice; `strata` and `branches` are the active ones.

    `labels` are those of `resolve_labels`, so with joins; a stratum that has none is left out.
    """
    used = {name for stratum in (*strata, *branches) for name in (stratum.name, *stratum.columns)} & set(labels)
    cells = {name: labels[name] if mask is None else labels[name][mask] for name in used}

    def refines(finer: str, coarser: str) -> bool:
        if finer not in cells or coarser not in cells:
            return False
        pairs = torch.stack([cells[finer], cells[coarser]])
        return bool(torch.unique(pairs, dim=1).shape[1] == torch.unique(pairs[0]).numel())

    for stratum in (*strata, *branches):
        for part in stratum.join:
            if refines(part, stratum.name):
                others = " and one ".join(other for other in stratum.join if other != part)
                raise ValueError(
                    f"stratum {stratum.name!r}, join: in this data every {part} lies in one {others}, so the join is "
                    f"{part} itself; use {part} in its place"
                )
    names = [stratum.name for stratum in strata]
    for index, branch in enumerate(branches):
        place = names.index(branch.beside or names[-1])
        same = [other.name for other in branches[:index] if (other.beside or names[-1]) == names[place]]
        for taken in (names[place], *same):
            if refines(taken, branch.name):
                raise ValueError(f"branch {branch.name!r}: in this data {_nothing_left(branch.name, taken)}")
        following = names[place + 1 :]
        if refines(branch.name, names[place]) and (not following or refines(following[0], branch.name)):
            raise ValueError(
                f"branch {branch.name!r}: in this data {_belongs_into_the_chain(branch.name, names[place])}"
            )
