"""What `fiberpo verify` compares: a layout that is checked, the steps, the precision and its tolerance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from nemo_fiberpo.verification.model import EXPERTS, Layout, Shape
from nemo_fiberpo.verification.steps import Tolerance, Variant

PRECISIONS = {
    "float64": (torch.float64, Tolerance(1e-10, 1e-10, 1e-10)),
    "float32": (torch.float32, Tolerance(1e-5, 2e-5, 2e-5)),
    "bf16": (torch.bfloat16, Tolerance(1e-3, 0.1, 0.06)),
}
"""The dtype, and errors that pass unless others are given: some times what rounding makes on a CPU."""
SAMPLES = 16
"""In a batch, at least."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the axes as a user gives them, beside what else a config decides.

    etp      None for that of the dense layers, Megatron's default
    experts  None for both a mixture of experts and, without expert parallelism, a dense model
    packed   None for both packed and padded rows
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    experts: bool | None = None
    packed: bool | None = None
    sequence_parallel: bool | None = None
    dispatcher: str = "alltoall"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "ep", "etp", "vpp"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"--{name}: must be at least 1, got {size}")

    @property
    def expert_tensor(self) -> int:
        return self.etp or self.tp

    def least_ranks(self, atleast: int = 1) -> int:
        """The smallest number of ranks that make groups of these sizes."""
        dense, experts = self.tp * self.pp * self.cp, self.expert_tensor * self.ep * self.pp
        step = math.lcm(dense, experts)
        return -(-atleast // step) * step

    def problems(self, ranks: int) -> Iterator[str]:
        """What is wrong with them, by the names of the options."""
        if ranks < 1:
            yield f"--ranks: must be at least 1, got {ranks}"
        elif ranks != self.least_ranks(ranks):
            experts = f", and of ep x etp x pp = {self.expert_tensor * self.ep * self.pp}" if self.ep > 1 else ""
            few, many = self.least_ranks(ranks) - self.least_ranks(), self.least_ranks(ranks)
            yield (
                f"--ranks: {ranks} ranks are not a multiple of tp x pp x cp = {self.tp * self.pp * self.cp}{experts}; "
                f"take {f'{few} or {many}' if few else many} ranks, or other sizes"
            )
        if self.ep > 1 and self.experts is False:
            yield f"--ep: {self.ep}, but the model of the config has no experts; set it to 1"
        if self.ep == 1 and self.experts is not False and self.expert_tensor != self.tp:
            yield (
                f"--etp: {self.etp} without expert parallelism, which Megatron does not get right; leave it out, or "
                "set --ep"
            )
        if self.vpp > 1 and self.pp == 1:
            yield "--vpp: virtual pipeline stages need pipeline stages; set --pp to 2 or more, or leave it out"


def variants(sizes: Sizes, ranks: int, dtype: torch.dtype, spec: str) -> list[Variant]:
    """The steps to compare."""
    kinds = [sizes.experts] if sizes.experts is not None else [True] + [False] * (sizes.ep == 1)
    rows = [sizes.packed] if sizes.packed is not None else [False, True]
    found = []
    for experts in kinds:
        name = "mixture of experts" if experts else "dense"
        for packed in rows:
            layout = _layout(sizes, ranks, dtype, spec, experts, packed)
            found.append(Variant(f"{name}, {'packed' if packed else 'padded'} rows", layout))
        found.append(Variant(f"{name}, on-policy", found[-1].layout, on_policy=True))
    return found


def number_of_samples(every: list[Variant], ranks: int) -> int:
    """As many for every rank and micro-batch, and a multiple of 8."""
    layout = every[0].layout
    unit = math.lcm(8, ranks // (layout.tp * layout.pp * layout.cp) * layout.microbatches)
    return -(-SAMPLES // unit) * unit


def _layout(sizes: Sizes, ranks: int, dtype: torch.dtype, spec: str, experts: bool, packed: bool) -> Layout:
    number = math.lcm(EXPERTS, sizes.ep) if experts else 0
    shape = Shape(
        hidden=64,
        heads=math.lcm(8, sizes.tp),
        channels=16,
        ffn=math.lcm(128, sizes.tp, sizes.expert_tensor),
        vocab=math.lcm(64, sizes.tp),
        scale=1 / 3,
    )
    return Layout(
        tp=sizes.tp, pp=sizes.pp, cp=sizes.cp, ep=sizes.ep, etp=sizes.expert_tensor, vpp=sizes.vpp,
        microbatches=max(2, sizes.pp), sequence_parallel=True if experts and sizes.tp > 1 else sizes.sequence_parallel,
        dispatcher=sizes.dispatcher, experts=number, packed=packed, recompute=sizes.recompute,
        distributed_optimizer=ranks > sizes.tp * sizes.pp, overlap=sizes.vpp > 1,
        # Rounding of bf16 would decide between the experts of a token: there it has all of them.
        topk=number if dtype == torch.bfloat16 else 2,
        shape=shape, dtype=dtype, spec=spec,
    )  # fmt: skip
