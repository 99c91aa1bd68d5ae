"""Labels that a hierarchy makes from those of the data: joins, and strata that are missing in parts of the tree.

Both are arithmetic on the labels of a token, so that they come out the same on every rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .cells import check_labels
from .levels import Part
from .stratum import Stratum
from .wording import nearest

UNNAMED_LABELS = 1 << 31
"""Labels of a part of a join that has no names must be below it."""
_LARGEST = torch.iinfo(torch.int64).max

Names = Mapping[str, Sequence[str]]


def resolve_labels(
    chain: Sequence[Stratum],
    branches: Sequence[Stratum],
    labels: Mapping[str, Tensor],
    mask: Tensor | None,
    names: Names,
    shape: tuple[int, int] | None,
) -> tuple[dict[str, Tensor], dict[str, Sequence[str]], dict[str, tuple[Part, ...]]]:
    """Labels and names of every active stratum, and of joins the parts that have names, from those of the data.

        a join    ((l_1 * n_2) + l_2) * n_3 + ..., called "a/b" where all parts have names; n is the number of a part's
                  names, `UNNAMED_LABELS` without names
        missing   where `only` leaves a stratum out: -1 - (l * K + n) of its nearest ancestor that is there, which has
                  label l at place n of a chain of K. The cell repeats its parent's

    Raises ValueError where labels are missing, or where a live token is in no cell (a negative label) of a join, a
    branch or a stratum with `only`. What masked tokens hold is ignored.
    """
    columns = [column for stratum in (*chain, *branches) for column in stratum.columns]
    for column in columns:
        if column not in labels:
            user = next(stratum for stratum in (*chain, *branches) if column in stratum.columns)
            given = ", ".join(map(repr, labels)) or "none"
            what = "the join" if user.join else "the active stratum"
            raise ValueError(f"labels: {what} {user.name!r} needs labels of {column!r} (given: {given})")
    check_labels({f"labels[{column!r}]": labels[column] for column in columns}, mask, shape)
    out, named = dict(labels), dict(names)
    parts: dict[str, tuple[Part, ...]] = {}
    for stratum in (*chain, *branches):
        if stratum.join and stratum.name in names:
            raise ValueError(f"names[{stratum.name!r}]: is a join, whose names are made from those of its parts")
        here = mask
        for coarser, kept in stratum.only.items():
            inside = _inside(stratum, coarser, kept, out[coarser], named.get(coarser))
            here = inside if here is None else here & inside
        if stratum.join:
            out[stratum.name], joined, parts[stratum.name] = _join(stratum, labels, names, here)
            if joined is not None:
                named[stratum.name] = joined
        elif stratum.only or stratum in branches:
            _refuse_outside(stratum, stratum.name, labels[stratum.name], 0, None, here)
        if stratum.only:
            out[stratum.name] = _repeat_parent(stratum, chain, out, mask, here)
    return out, named, parts


def _inside(
    stratum: Stratum, coarser: str, kept: Sequence[str], label_T: Tensor, names: Sequence[str] | None
) -> Tensor:
    """Bool [T]: tokens in the cells of `coarser` that are called one of `kept`."""
    where = f"stratum {stratum.name!r}, only.{coarser}"
    if names is None:
        raise ValueError(f"{where}: goes by name, so names[{coarser!r}] must list the names of its label values")
    for name in kept:
        if name not in names:
            raise ValueError(f"{where}: no cell of the data is called {name!r}{nearest(name, names)}")
    values = torch.tensor([list(names).index(name) for name in kept], dtype=torch.int64, device=label_T.device)
    return torch.isin(label_T, values)


def _join(
    stratum: Stratum, labels: Mapping[str, Tensor], names: Names, here: Tensor | None
) -> tuple[Tensor, list[str] | None, tuple[Part, ...]]:
    """The labels of a joined stratum, its names where all its parts have some, and the parts that have."""
    sizes = [len(names[part]) if part in names else UNNAMED_LABELS for part in stratum.join]
    if math.prod(sizes) > _LARGEST:
        raise ValueError(
            f"stratum {stratum.name!r}, join: {sum(part not in names for part in stratum.join)} of its parts have no "
            "names; at most one can be without, or two if no other part has many"
        )
    joined_T = torch.zeros_like(labels[stratum.join[0]])
    for part, size in zip(stratum.join, sizes, strict=True):
        _refuse_outside(stratum, part, labels[part], size, names.get(part), here)
        joined_T = joined_T * size + labels[part]
    strides = [math.prod(sizes[index + 1 :]) for index in range(len(sizes))]
    known = zip(stratum.join, strides, strict=True)
    parts = tuple(Part(part, tuple(names[part]), stride) for part, stride in known if part in names)
    if len(parts) < len(stratum.join):
        return joined_T, None, parts
    called = ["/".join(of_parts) for of_parts in itertools.product(*(names[part] for part in stratum.join))]
    return joined_T, called, parts


def _refuse_outside(
    stratum: Stratum, column: str, label_T: Tensor, size: int, names: Sequence[str] | None, here: Tensor | None
) -> None:
    """Refuse a token, of those `here`, that has no label in `column`, or for `size` > 0 one that is not below it."""
    wrong = label_T < 0
    if size:
        wrong |= label_T >= size
    if here is not None:
        wrong &= here
    if not bool(wrong.any()):
        return
    index = int(wrong.nonzero()[0])
    label = int(label_T[index])
    if label < 0:
        kind = "join" if stratum.join else "stratum" if stratum.only else "branch"
        why = f"token {index} of the flat batch is in no cell; the {kind} {stratum.name!r} needs one for every token"
        if stratum.only:
            why += " of the cells that `only` names"
    elif names is not None:
        why = f"has no name; names[{column!r}] has {len(names)}"
    else:
        why = f"labels without names must be below {size} to be joined in {stratum.name!r}"
    raise ValueError(f"labels[{column!r}]: value {label}: {why}")


def _repeat_parent(
    stratum: Stratum, chain: Sequence[Stratum], labels: Mapping[str, Tensor], mask: Tensor | None, here: Tensor | None
) -> Tensor:
    """The labels of a stratum of the chain, with those of its nearest ancestor, marked as such, where it is missing."""
    place = [other.name for other in chain].index(stratum.name)
    parent = chain[place - 1]
    parent_T = labels[parent.name]
    assert here is not None
    missing = ~here if mask is None else mask & ~here
    largest = (_LARGEST - len(chain)) // len(chain)
    wrong = missing & ((parent_T > largest) if parent.only else (parent_T < 0) | (parent_T > largest))
    if bool(wrong.any()):
        label = int(parent_T[wrong.nonzero()[0]])
        raise ValueError(
            f"labels[{parent.name!r}]: value {label}: must be within 0 .. {largest} where {stratum.name!r} is missing"
        )
    marked_T = torch.where(parent_T < 0, parent_T, -1 - (parent_T * len(chain) + place - 1))
    return torch.where(here, labels[stratum.name], marked_T)
