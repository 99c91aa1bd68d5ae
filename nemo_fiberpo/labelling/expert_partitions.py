"""Partitions of the experts of a mixture: which there are, and each token's label or membership by router mass.

The mass m_{t e} of partition e at token t is the router's probability of all its experts, before the top-k selection,
averaged over layers; sum_e m_{t e} = 1. `megatron.routing` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fields import check, setting
from ..values import cell_name, nearest

COLUMN = "expert_partition"
"""The column of the data, and the name of the stratum, that holds the partition of each token."""

MASS_UNIT = 2.0**-40
"""Router probabilities are rounded to multiples of this. Sums of up to 2^12 layers are then exact in float64, hence the
same in whatever order layers and ranks are added up, and equal masses stay equal."""

MEMBERSHIP_UNITS = 255
"""The memberships of a token sum to this number."""

_KINDS = ("expert_parallel", "expert")
_MOST = torch.iinfo(torch.int16).max + 1


@dataclass(frozen=True)
class ExpertPartitions:
    """How the experts of a mixture are partitioned. Tokens are labelled by the partitions.

    Raises ValueError naming the field.
    """

    by: str | Mapping[str, Sequence[int]] = setting(
        "expert_parallel", form="expert_parallel, expert, or {partition: list of experts}"
    )
    """`expert_parallel`: the blocks of experts that expert-parallel ranks hold. `expert`: each expert by itself. A
    mapping numbers experts from 0 and has every expert in exactly one partition."""

    layers: str | Sequence[int] = setting("all", form="all, or list of layer numbers from 1")
    """MoE layers whose router masses are averaged, numbered as Megatron numbers layers."""

    membership: str = setting("hard", choices=("hard", "soft"))
    """`hard`: a token belongs to the partition with most router mass. `soft`: to all partitions, by their mass."""

    agreement: bool = setting(True)
    """Whether the routing of the training pass is compared with the labels."""

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.by, Mapping):
            object.__setattr__(self, "by", _checked_map(self.by))
        elif self.by not in _KINDS:
            raise ValueError(
                f"by: must be {' or '.join(_KINDS)}, or a mapping from names of partitions to lists of experts, got "
                f"{self.by!r}{nearest(self.by, _KINDS) if isinstance(self.by, str) else ''}"
            )
        if self.layers != "all":
            layers = _integers(self.layers, "layers", "all, or a list of layer numbers from 1")
            wrong = [number for number in layers if number < 1 or layers.count(number) > 1]
            if wrong or not layers:
                why = f"layer {wrong[0]} is named twice" if wrong and wrong[0] > 0 else "layers are numbered from 1"
                raise ValueError(f"layers: {why if layers else 'at least one layer is needed'}, got {self.layers!r}")
            object.__setattr__(self, "layers", layers)

    @property
    def soft_columns(self) -> tuple[str, ...]:
        """The columns in which tokens have memberships instead of a label, see `check_gating`."""
        return (COLUMN,) if self.membership == "soft" else ()

    def table(self, num_experts: int, expert_parallel_size: int = 1) -> tuple[Tensor, tuple[str, ...]]:
        """The partition of each expert, int64 [num_experts], and the names of the partitions.

        Partitions are numbered in the order of their experts, or as the mapping lists them. Raises ValueError for an
        expert that is in no partition or does not exist, and for a single partition, which would classify nothing.
        """
        if isinstance(self.by, Mapping):
            table, names = _table_of_map(self.by, num_experts), tuple(self.by)
        elif self.by == "expert":
            table, names = torch.arange(num_experts), tuple(f"expert_{index}" for index in range(num_experts))
        else:
            if expert_parallel_size < 2:
                raise ValueError(
                    "expert_partitions.by: expert_parallel makes one partition of all experts where the "
                    "expert-parallel size is 1; set by: expert, or a mapping from names of partitions to lists of "
                    "experts"
                )
            if num_experts % expert_parallel_size:
                raise ValueError(
                    f"expert_partitions.by: expert_parallel needs equal blocks, but {num_experts} experts do not "
                    f"divide over {expert_parallel_size} expert-parallel ranks"
                )
            block = num_experts // expert_parallel_size
            table = torch.arange(num_experts) // block
            ends = ((start, start + block - 1) for start in range(0, num_experts, block))
            names = tuple(f"expert_{a}" if a == b else f"experts_{a}-{b}" for a, b in ends)
        if not 2 <= len(names) <= _MOST:
            raise ValueError(f"expert_partitions.by: makes {len(names)} partition(s); there must be 2 to {_MOST}")
        return table, names


def _checked_map(by: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The mapping with tuples of experts. ValueError for an expert in two partitions."""
    checked: dict[str, tuple[int, ...]] = {}
    place: dict[int, str] = {}
    for key, value in by.items():
        name = cell_name(key, "by", "a partition")
        checked[name] = _integers(value, f"by.{name}", "a list of experts, numbered from 0")
        if not checked[name]:
            raise ValueError(f"by.{name}: names no expert; leave the partition out")
        for expert in checked[name]:
            if expert in place:
                where = f"is in {place[expert]!r} already" if place[expert] != name else "is named twice"
                raise ValueError(f"by.{name}: expert {expert} {where}; every expert belongs to one partition")
            place[expert] = name
    return checked


def _table_of_map(by: Mapping[str, Sequence[int]], num_experts: int) -> Tensor:
    table = torch.full((num_experts,), -1)
    for number, (name, experts) in enumerate(by.items()):
        for expert in experts:
            if not 0 <= expert < num_experts:
                raise ValueError(
                    f"expert_partitions.by.{name}: there is no expert {expert}; the model has experts 0 to "
                    f"{num_experts - 1}"
                )
            table[expert] = number
    missing = (table < 0).nonzero().flatten().tolist()
    if missing:
        which = f"expert {missing[0]} is" if len(missing) == 1 else f"experts {', '.join(map(str, missing))} are"
        raise ValueError(f"expert_partitions.by: {which} in no partition; every expert of the model belongs to one")
    return table


def _integers(value: object, where: str, wanted: str) -> tuple[int, ...]:
    integers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (None,)
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in integers):
        raise ValueError(f"{where}: must be {wanted}, got {value!r}")
    return integers


def hard_labels(masses: Tensor) -> Tensor:
    """The partition with most mass, the lowest of equal ones: masses [..., P] -> uint8 [...] (int16 for P > 256). The
    lowest if masses are not finite: such a token is refused anyway, since its log-prob is not finite either."""
    label = masses.nan_to_num(nan=0.0).argmax(-1)
    return label.to(torch.uint8 if masses.shape[-1] <= 256 else torch.int16)


def soft_membership(masses: Tensor) -> Tensor:
    """Shares q_{t e} of a token in the partitions in units of 1/255: masses [..., P] -> uint8 [..., P] that sum to 255.

    Shares are rounded down; the remaining units go to the largest remainders, and among equal ones to the lowest
    partitions. The arithmetic is in integers, so that equal masses give equal memberships on every rank. If masses are
    not finite, all units go to the lowest partition.
    """
    units = (masses.nan_to_num(nan=0.0) / MASS_UNIT).round().long()
    lowest = torch.zeros_like(units)
    lowest[..., 0] = 1
    total = units.sum(-1, keepdim=True)
    units = torch.where(total > 0, units, lowest)
    scaled, total = units * MEMBERSHIP_UNITS, units.sum(-1, keepdim=True)
    share = scaled // total
    order = (scaled - share * total).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1)
    left = MEMBERSHIP_UNITS - share.sum(-1, keepdim=True)
    return (share + (place < left)).to(torch.uint8)
