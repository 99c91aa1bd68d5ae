"""How much router probability each partition of experts has at each token, read from Megatron's routers as they run.

    m_{t e} = 1/L sum_{chosen layers} sum_{experts x of e} p_{t x},   p the router's scores before its top-k selection:
    softmax(logits), or sigmoid(logits) / sum sigmoid(logits)

Nothing routes here: the logits are those that `TopKRouter.gating` returns, and the routers' own selection goes on from
them. A bias that balances experts (`moe_router_enable_expert_bias`) moves that selection and is no part of a score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.labelling.expert_partitions import MASS_UNIT, hard_labels, soft_membership
from nemo_fiberpo.megatron.groups import TokenAxes, named_failure
from nemo_fiberpo.megatron.schedule import Policy

__all__ = ["RoutingCapture", "hard_labels", "soft_membership"]

# Float64 logits [..., experts] -> logarithms of scores, up to a constant per token.
_LOG_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits,
    "sigmoid": torch.nn.functional.logsigmoid,
}


@dataclass
class _Record:
    """One micro-batch: the units of mass that this rank's routers gave, [s, b, P]; the layers and chunks it ran."""

    units: Tensor | None = None
    layers: set[int] = field(default_factory=set)
    chunks: set[int] = field(default_factory=set)


class RoutingCapture:
    """Reads the routers of a model while a policy runs.

    Args
        chunks               the modules of this rank's pipeline stage, wrapped or not
        partition_of_expert  int64 [experts], `ExpertPartitions.table`
        layers               "all" MoE layers, or numbers of them, from 1 over all stages as Megatron counts
        axes                 of the job; those of `parallel_state` without it

    Raises ValueError, the same on every rank because it goes by the config alone: for a dense model, layers that do not
    exist or are dense, a partition for too many or too few experts, and a router whose scores are not known.

    SPMD: one per rank, on every rank. Tokens are sharded over dp and cp, and over tp with sequence parallelism; layers
    over pp.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        partition_of_expert: Tensor,
        layers: str | Sequence[int] = "all",
        axes: TokenAxes | None = None,
    ):
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.utils import get_model_config

        self._config = get_model_config(chunks[0])
        self.layers = chosen_layers(self._config, layers)
        self._log_scores = _LOG_SCORES[score_function(self._config)]
        self._member_EP = _one_hot(partition_of_expert, self._config.num_moe_experts)
        self._axes = axes or TokenAxes.from_parallel_state()
        routers = (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter))
        self._routers = [router for router in routers if router.layer_number in self.layers]
        self._device: torch.device | None = None  # a host may move the model before it runs
        self._records: list[_Record] = []
        self._shape: tuple[int, int] = (0, 0)
        self._running: _Record | None = None
        self._num_chunks, self._sequence_parallel = 0, False

    @contextlib.contextmanager
    def watch(self, policy: Policy, microbatches: Sequence[Any]) -> Iterator[Policy]:
        """The same policy, whose first forward pass over each of `microbatches` is read; `masses` has the result.

        Values, autograd graph and state of the model are as without it, and its methods are restored at the end.
        Further passes over a micro-batch are not read, nor is a recomputation of activations in the backward pass. What
        an earlier `watch` has read is gone.

        Memory: 8 bytes per token and partition until `release`, or the next `watch`.
        """
        self._records = [_Record() for _ in microbatches]
        self._device = next((parameter.device for chunk in policy.chunks for parameter in chunk.parameters()), None)
        self._num_chunks, self._sequence_parallel = len(policy.chunks), bool(self._config.sequence_parallel)
        split = self._axes.axis("cp").size * (self._axes.axis("tp").size if self._sequence_parallel else 1)
        self._shape = policy.seq_length // split, policy.micro_batch_size
        # By identity; the caller's list keeps them alive.
        of_batch = {id(batch): record for batch, record in zip(microbatches, self._records, strict=True)}
        for index, batch in enumerate(microbatches):
            self._records[index] = of_batch[id(batch)]

        def forward(batch: Any, module: torch.nn.Module) -> Tensor:
            record = self._running = of_batch.get(id(batch))
            try:
                output = policy.forward(batch, module)
            finally:
                self._running = None
            if record is not None:
                record.chunks.add(id(module))
            return output

        # Attributes of these instances, which stand before the method of their class.
        before = [vars(router).get("gating") for router in self._routers]
        for router in self._routers:
            router.gating = self._reading(router.layer_number, router.gating)
        try:
            yield replace(policy, forward=forward)
        finally:
            for router, own in zip(self._routers, before, strict=True):
                if own is None:
                    del router.gating
                else:
                    router.gating = own

    def masses(self) -> list[Tensor]:
        """The mass of every partition at every token, per micro-batch float64 [r, t, P] in rows.

        The masses at a position are those of the token whose log-prob the position gives: they go with the log-probs.
        Raises ValueError on every rank of the model if a micro-batch did not run within `watch`.

        SPMD: every rank calls this, on every stage, also without a router. Sharded over cp and dp as rows are; summed
        over pp and, with sequence parallelism, gathered over tp, with one collective each per micro-batch. The same
        bits on all ranks of tp and pp, and in whatever way layers were dealt to them.
        """
        for index, record in enumerate(self._records):
            if len(record.chunks) != self._num_chunks:
                raise ValueError(f"routing: micro-batch {index} has not run under `watch`; run a pass over it first")
        return [self._reduced(index, record) for index, record in enumerate(self._records)]

    def release(self) -> None:
        """Let go of what was read: 8 bytes per token and partition."""
        self._records = []

    def _reading(self, layer: int, gating: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def read(*args: Any, **kwargs: Any) -> Tensor:
            logits = gating(*args, **kwargs)
            record = self._running
            if record is not None and layer not in record.layers:
                record.layers.add(layer)
                self._add(record, logits)
            return logits

        return read

    @torch.no_grad()
    def _add(self, record: _Record, logits: Tensor) -> None:
        """Add a layer: logits [s, b, experts] of this rank. Units are whole numbers, so no sum of them rounds."""
        logarithm = self._log_scores(logits.detach().double())
        # A softmax by hand: on a CPU torch's own takes three times as long for rows as short as these.
        scores = (logarithm - logarithm.amax(-1, keepdim=True)).exp_()
        units = scores.mul_(1 / (MASS_UNIT * scores.sum(-1, keepdim=True))).round_()
        if self._member_EP.device != units.device:
            self._member_EP = self._member_EP.to(units.device)
        units = units @ self._member_EP
        record.units = units if record.units is None else record.units.add_(units)

    def _reduced(self, index: int, record: _Record) -> Tensor:
        units = record.units
        if units is None:
            units = torch.zeros(*self._shape, self._member_EP.shape[1], dtype=torch.float64, device=self._device)
        pp, tp = self._axes.axis("pp"), self._axes.axis("tp")
        with named_failure("the exchange of router masses"):
            if pp.size > 1:
                units = units.clone()
                dist.all_reduce(units, group=pp.group)
            if tp.size > 1 and self._sequence_parallel:
                whole = units.new_empty(tp.size * len(units), *units.shape[1:])
                dist.all_gather_into_tensor(whole, units.contiguous(), group=tp.group)
                units = whole
        # Each score is off by half a unit at most. Comparing so, NaN of a token that is not finite passes.
        total, slack = len(self.layers) / MASS_UNIT, len(self.layers) * len(self._member_EP)
        if bool(((units.sum(-1) - total).abs() > slack).any()):
            raise ValueError(
                f"routing: the routers of the layers {list(self.layers)} did not all run in micro-batch {index}; "
                "moe_layer_freq of the config must say which layers of the model have one"
            )
        return units.transpose(0, 1).contiguous() * (MASS_UNIT / len(self.layers))


def chosen_layers(config: Any, layers: str | Sequence[int] = "all") -> tuple[int, ...]:
    """Numbers of the MoE layers that are read, ascending; ValueError for a dense model and a layer without experts.

    Goes by a TransformerConfig's `num_layers`, `num_moe_experts` and `moe_layer_freq`: the same on every stage.
    """
    number, frequency = config.num_layers, getattr(config, "moe_layer_freq", 1)
    pattern = [index % frequency == 0 for index in range(number)] if isinstance(frequency, int) else list(frequency)
    moe = [index for index, experts in enumerate(pattern, start=1) if experts and config.num_moe_experts]
    if not moe:
        raise ValueError(
            "expert_partitions: the model is dense (num_moe_experts is not set, or moe_layer_freq leaves no layer with "
            "experts), so its tokens have no expert partition"
        )
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"expert_partitions.layers: must be all or a list of layer numbers from 1, got {layers!r}")
        return tuple(moe)
    unknown = [layer for layer in layers if not 1 <= layer <= number]
    if unknown:
        raise ValueError(
            f"expert_partitions.layers: there is no layer {unknown[0]}; the MoE layers of this model are {_ranges(moe)}"
        )
    dense = [layer for layer in layers if layer not in moe]
    if dense or not layers:
        what = f"layer {dense[0]} is dense" if dense else "at least one layer is needed"
        raise ValueError(f"expert_partitions.layers: {what}; the MoE layers of this model are {_ranges(moe)}")
    return tuple(sorted(set(layers)))


def score_function(config: Any) -> str:
    """The score function of the config's routers; ValueError if it is none of those known, or not what decides."""
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ValueError(
            "moe_router_load_balancing_type: sinkhorn routes a token by what shares its micro-batch, not by its scores "
            "alone; expert partitions need another one"
        )
    name = str(config.moe_router_score_function)
    if name not in _LOG_SCORES:
        raise ValueError(
            f"moe_router_score_function: {name!r} is not known; expert partitions can be read from "
            f"{' and '.join(_LOG_SCORES)} scores"
        )
    return name


def _one_hot(partition_of_expert: Tensor, experts: int) -> Tensor:
    """Float64 [experts, P], 1 where an expert belongs to a partition."""
    if partition_of_expert.shape != (experts,):
        raise ValueError(
            f"partition_of_expert: must have one entry for each of the model's {experts} experts, got shape "
            f"{tuple(partition_of_expert.shape)}"
        )
    used = partition_of_expert.unique().tolist()
    if used != list(range(len(used))):
        raise ValueError(f"partition_of_expert: partitions must be numbered 0, 1, 2, ... without a gap, got {used}")
    return torch.nn.functional.one_hot(partition_of_expert.long()).double()


def _ranges(numbers: Sequence[int]) -> str:
    """1-4, 6, 8 of [1, 2, 3, 4, 6, 8]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
