"""How ranks form groups, and what must divide what, as Megatron-core lays them out (order tp-cp-ep-dp-pp)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; data parallelism is what remains of the ranks. Fields are positive whole numbers.

    etp  tensor parallelism of the experts;  vpp  virtual pipeline stages of a rank
    """

    nodes: int
    devices: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1
    sequence_parallel: bool = False

    @classmethod
    def from_config(cls, model: Mapping[str, Any], trainer: Mapping[str, Any]) -> Layout:
        """From NeMo's sections. Raises ValueError naming the first size that is not a positive whole number."""
        tp = model.get("tensor_model_parallel_size") or 1
        sizes: dict[str, Any] = {
            "trainer.num_nodes": trainer.get("num_nodes", 1),
            "trainer.devices": trainer.get("devices", 1),
            "model.tensor_model_parallel_size": tp,
            "model.pipeline_model_parallel_size": model.get("pipeline_model_parallel_size") or 1,
            "model.context_parallel_size": model.get("context_parallel_size") or 1,
            "model.expert_model_parallel_size": model.get("expert_model_parallel_size") or 1,
            "model.expert_tensor_parallel_size": model.get("expert_tensor_parallel_size") or tp,
            "model.virtual_pipeline_model_parallel_size": model.get("virtual_pipeline_model_parallel_size") or 1,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: must be a whole number of at least 1, got {size!r}")
        nodes, devices, tp, pp, cp, ep, etp, vpp = sizes.values()
        return cls(nodes, devices, tp, pp, cp, ep, etp, vpp, bool(model.get("sequence_parallel", False)))

    @property
    def world(self) -> int:
        return self.nodes * self.devices

    @property
    def whole(self) -> bool:
        """Whether the ranks make groups of these sizes."""
        return not (self.world % (self.tp * self.pp * self.cp) or self.world % (self.etp * self.ep * self.pp))

    @property
    def dp(self) -> int:
        """Data-parallel ranks, context parallelism not counted."""
        return max(1, self.world // (self.tp * self.pp * self.cp))

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts, over which their gradients are averaged and their optimizer is sharded."""
        return max(1, self.world // (self.etp * self.ep * self.pp))

    @property
    def length_multiple(self) -> int:
        """What row lengths are rounded up to: as `sequences.length_multiple`."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    def groups(self) -> dict[str, list[list[int]]]:
        """Ranks of every process group, per axis."""
        dense = (("tensor", self.tp), ("context", self.cp), ("data", self.dp), ("pipeline", self.pp))
        found = {name: along(dense, name) for name, _ in dense}
        if self.ep > 1 or self.etp != self.tp:
            experts = (
                ("expert tensor", self.etp),
                ("expert", self.ep),
                ("expert data", self.expert_dp),
                ("pipeline", self.pp),
            )
            found |= {name: along(experts, name) for name, _ in experts[:3]}
        return found

    def problems(self, shape: ModelShape | None) -> Iterator[str]:
        """A message, naming the field, for everything that does not divide."""
        world, model_ranks = self.world, self.tp * self.pp * self.cp
        product = f"tensor x pipeline x context parallel = {self.tp} x {self.pp} x {self.cp} = {model_ranks}"
        if world % model_ranks:
            yield (
                f"trainer.num_nodes x devices: {self.nodes} x {self.devices} = {world} ranks are not a multiple of "
                f"{product}; take {_multiples(world, model_ranks)} ranks, or other sizes"
            )
        elif world % (self.etp * self.ep * self.pp):
            within = self.dp * self.cp * self.tp // self.etp
            yield (
                f"model.expert_model_parallel_size: {self.ep} does not divide data x context parallel = {within}"
                f"{'' if self.etp == self.tp else ' (x tensor / expert tensor parallel)'}; expert-parallel ranks lie "
                f"inside them; valid are {_divisors(within)}"
            )
        if shape is not None:
            yield from self._of_model(shape)

    def _of_model(self, shape: ModelShape) -> Iterator[str]:
        tp = self.tp
        checks = [
            ("model.tensor_model_parallel_size", tp, shape.heads, "model.num_attention_heads"),
            ("model.tensor_model_parallel_size", tp, shape.groups, "model.num_query_groups"),
            ("model.tensor_model_parallel_size", tp, shape.vocab, "the padded vocabulary"),
        ]
        layers, stages = shape.even(self.pp)
        if stages < 1 or layers < stages:
            yield (
                f"model.num_layers_in_first_pipeline_stage, _last_: leave {layers} layers to {stages} stages of "
                f"model.pipeline_model_parallel_size = {self.pp}; each needs one at least"
            )
        else:
            size, named = stages * self.vpp, "model.num_layers"
            if stages < self.pp:
                named += " - those of the first and last stage"
            name = "model.pipeline_model_parallel_size" + (" - stages given" if stages < self.pp else "")
            name += " x virtual_pipeline_model_parallel_size" if self.vpp > 1 else ""
            checks.append((name, size, layers, named))
        if shape.experts:
            checks += [
                ("model.expert_model_parallel_size", self.ep, shape.experts, "model.num_moe_experts"),
                ("model.expert_tensor_parallel_size", self.etp, shape.expert_ffn, "model.moe_ffn_hidden_size"),
            ]
        else:
            checks.append(("model.tensor_model_parallel_size", tp, shape.ffn, "model.ffn_hidden_size"))
        for name, size, of, meaning in checks:
            if of % size:
                yield f"{name}: {size} does not divide {meaning} = {of}; valid are {_divisors(of)}"
        if self.ep > 1 and not shape.experts:
            yield f"model.expert_model_parallel_size: {self.ep}, but the model has no experts; set it to 1"
        if shape.experts and shape.topk > shape.experts:
            yield f"model.moe_router_topk: {shape.topk} of {shape.experts} experts; at most model.num_moe_experts"

    def warnings(self) -> Iterator[str]:
        """Messages about what works, but slowly."""
        if self.devices % self.tp:
            yield (
                f"model.tensor_model_parallel_size: groups of {self.tp} ranks reach across nodes of {self.devices}; "
                "their all-reduces in every layer then run over the network"
            )
        if self.ep > 1 and self.ep * self.etp > self.devices:
            yield (
                f"model.expert_model_parallel_size: groups of {self.ep * self.etp} ranks reach across nodes of "
                f"{self.devices}; tokens travel to their experts over the network"
            )


def along(axes: tuple[tuple[str, int], ...], name: str) -> list[list[int]]:
    """Groups of ranks along one of `axes`, (name, size) with the fastest first."""
    world = math.prod(size for _, size in axes)
    place = [axis for axis, _ in axes].index(name)
    stride, size = math.prod(size for _, size in axes[:place]), axes[place][1]
    starts = [rank for rank in range(world) if rank // stride % size == 0]
    return [[start + index * stride for index in range(size)] for start in starts]


def _divisors(number: int) -> str:
    found = [divisor for divisor in range(1, min(number, 1024) + 1) if number % divisor == 0]
    return ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")


def _multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)
