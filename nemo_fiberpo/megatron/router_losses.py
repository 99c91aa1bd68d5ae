"""What the routers of a mixture of experts learn beside the objective, from real tokens alone.

Megatron-core balances the experts over every place of a micro-batch. In RL much of it is padding, up to the longest
response: all the same token, it goes to the same few experts, and the router learns to even that out. Here the sums run
over the tokens t of `sequences.Routed`, n of them in a micro-batch, in a row or on all ranks:

    aux_loss          c E sum_e f_e P_e      f_e = 1/(k n) sum_t [t goes to e],  P_e = 1/n sum_t p_te
    seq_aux_loss      the mean of the same over the rows that have such tokens, each with its own n
    global_aux_loss   f_e over all data-parallel ranks and the micro-batches of the step so far (megatron-core 0.16)
    z-loss            c 1/n sum_t logsumexp(logits_t)^2
    expert bias       counts of the tokens that go to each expert

The scale is Megatron's: without padding these are its own losses, which it averages over micro-batches and
data-parallel ranks. A micro-batch counts as one, however many tokens it has; one that has none adds 0. Where a
sequence is split over TP or CP ranks, n is that of the whole, so that the result does not depend on which rank has the
padding. megatron-core 0.16 takes a `padding_mask` with the same scale for aux_loss, but averages the z-loss rank by
rank, gives NaN for a micro-batch without tokens and cannot mask the counts of the bias; 0.11 knows no mask, and in 0.11
a seq_aux_loss over TP and CP ranks counts as often as there are such ranks, which is not taken over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_fiberpo.megatron.compat import has_compiled_bias, log_auxiliary_loss, routing_scores, tensor_context_group
from nemo_fiberpo.megatron.schedule import Policy
from nemo_fiberpo.megatron.sequences import Routed


@dataclass
class _Running:
    """The micro-batch whose forward or backward pass runs."""

    routed: Routed | None = None


@contextlib.contextmanager
def balancing_real_tokens(policy: Policy) -> Iterator[Policy]:
    """The same policy, whose routers balance the tokens of `policy.routed` in every pass that makes a gradient.

    The routers' own losses are off within the block; what tokens are routed to does not change. Recomputation of
    activations in the backward pass sees the micro-batch that it belongs to. Passes without gradient add no loss, log
    or count.

    SPMD: one all-reduce of the tokens per expert over TP x CP per layer and micro-batch, as Megatron's own.
    """
    running, routers = _Running(), _routers(policy)
    if policy.routed is None or not routers:
        yield policy
        return
    routed_of = policy.routed

    def forward(batch: Any, module: torch.nn.Module) -> Tensor:
        running.routed = routed = routed_of(batch)
        output = policy.forward(batch, module)
        if output.requires_grad:
            # The first that a backward pass of this micro-batch through this module does.
            output.register_hook(lambda _: setattr(running, "routed", routed))
        return output

    with contextlib.ExitStack() as replaced:
        for router in routers:
            replaced.enter_context(_replaced(router, _replacements(router, running)))
        yield replace(policy, forward=forward)


@contextlib.contextmanager
def without_router_losses(policy: Policy) -> Iterator[None]:
    """Run the policy so that its routers add no loss to a gradient, log none and count no token."""
    with contextlib.ExitStack() as replaced:
        for router in _routers(policy):
            replaced.enter_context(_replaced(router, _silent(router)))
        yield


def _routers(policy: Policy) -> list[Any]:
    if not getattr(policy.config, "num_moe_experts", None):
        return []
    from megatron.core.transformer.moe.router import TopKRouter

    return [module for chunk in policy.chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


def _replacements(router: Any, running: _Running) -> dict[str, Any]:
    """The attributes of a router whose losses are those of `_Losses`."""
    routing, losses = router.routing, _Losses(router)

    def balanced(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if running.routed is None or not router.training or not torch.is_grad_enabled():
            return routing(logits, *args, **kwargs)
        logits = losses.with_z_loss(logits, running.routed)
        probs, routing_map = routing(logits, *args, **kwargs)
        return losses.with_balance(probs, logits, routing_map, running.routed), routing_map

    return _silent(router) | {"routing": balanced}


def _silent(router: Any) -> dict[str, Any]:
    """The attributes of a router that balances by itself no more; both versions of megatron-core ask for these."""
    off: dict[str, Any] = {"routing_type": "none", "enable_expert_bias": False}
    off["apply_z_loss"] = lambda logits, *_, **__: logits
    if has_compiled_bias(router):  # an attribute that changes would compile it again
        off["_apply_expert_bias"] = lambda *_, **__: None
    return off


@contextlib.contextmanager
def _replaced(router: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Attributes of this instance, which stand before those of its class."""
    before = {name: vars(router)[name] for name in attributes if name in vars(router)}
    try:
        for name, value in attributes.items():
            setattr(router, name, value)
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(router, name, before[name])
            elif name in vars(router):
                delattr(router, name)


class _Losses:
    """The losses of one router, as its config asks for them."""

    def __init__(self, router: Any):
        from megatron.core import parallel_state as mpu

        self._router, self._config = router, router.config
        self._tp_rank, self._tp_size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        self._tp_cp = tensor_context_group(router)
        self._counts_for_bias = bool(router.enable_expert_bias)
        types, coefficients = router.routing_type, self._config.moe_aux_loss_coeff
        listed = types if isinstance(types, list) else [types]
        values = coefficients if isinstance(coefficients, list) else [coefficients] * len(listed)
        of_type = dict(zip(listed, values, strict=True))
        known = {"aux_loss": self._micro_batch, "seq_aux_loss": self._rows, "global_aux_loss": self._global}
        self._balancing = [(of_type[name], loss) for name, loss in known.items() if of_type.get(name)]

    def with_z_loss(self, logits: Tensor, routed: Routed) -> Tensor:
        """logits [s, b, E] of this rank, with the z-loss behind them."""
        coefficient = self._config.moe_z_loss_coeff
        if coefficient is None:
            return logits
        mask, copies = self._own(routed, logits)
        squares = torch.logsumexp(_wide(logits), dim=-1).square()
        loss = torch.where(mask, squares, 0.0).sum() / (routed.per_row.sum() * copies).clamp(min=1)
        self._log("z_loss", loss * dist.get_world_size(self._tp_cp))  # Megatron logs each rank's mean
        return _attached(logits, loss * coefficient)

    def with_balance(self, probs: Tensor, logits: Tensor, routing_map: Tensor, routed: Routed) -> Tensor:
        """probs with the balancing losses behind them; logits [s, b, E] of this rank, routing_map bool [tokens, E] too,
        or that of all TP ranks where the dispatcher gathers them (0.11's alltoall_seq)."""
        mask, copies = self._own(routed, logits)
        if self._counts_for_bias:
            counted = mask if len(routing_map) == mask.numel() else routed.mask.T
            with torch.no_grad():
                self._router.local_tokens_per_expert += (routing_map & counted.reshape(-1, 1)).sum(dim=0)
        if not self._balancing:
            return probs
        scores, chosen = self._scores(logits, routing_map)
        scores, chosen = torch.where(mask[..., None], scores, 0.0), (chosen & mask[..., None]).to(scores.dtype)
        for coefficient, loss in self._balancing:
            probs = _attached(probs, loss(scores, chosen, routed.per_row * copies) * coefficient)
        return probs

    def _own(self, routed: Routed, logits: Tensor) -> tuple[Tensor, int]:
        """The mask as this rank's router sees tokens, [s, b], and on how many TP ranks each token is: sequence
        parallelism splits rows over TP, without it every TP rank has them all."""
        whole, s = routed.mask.T, logits.shape[0]
        if len(whole) == s:
            return whole, self._tp_size
        assert len(whole) == s * self._tp_size, f"rows of {len(whole)} places, of which the router sees {s}"
        return whole[self._tp_rank * s : (self._tp_rank + 1) * s], 1

    def _scores(self, logits: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and choices that Megatron balances, [s, b, E] each: in the versions with a function for it they come
        from the scores alone, in the others the choices are those by which tokens are routed."""
        flat = logits.reshape(-1, logits.shape[-1])
        found = routing_scores(self._router, flat)
        if found is not None:
            chosen, scores = found
        else:
            scores, chosen = torch.softmax(flat, dim=-1, dtype=torch.float32), routing_map
            if len(chosen) != len(flat):
                chosen = chosen.chunk(self._tp_size)[self._tp_rank]
        return _wide(scores.view(logits.shape)), chosen.reshape(logits.shape).bool()

    def _micro_batch(self, scores: Tensor, chosen: Tensor, per_row: Tensor) -> Tensor:
        counts, n = self._summed(chosen.sum(dim=(0, 1)), self._tp_cp), per_row.sum()
        value = self._balance(scores.sum(dim=(0, 1)), n, counts, n)
        self._log("load_balancing_loss", value, self._tp_cp)
        return value

    def _rows(self, scores: Tensor, chosen: Tensor, per_row: Tensor) -> Tensor:
        counts = self._summed(chosen.sum(dim=0), self._tp_cp)
        of_rows = self._balance(scores.sum(dim=0), per_row, counts, per_row)
        value = of_rows.sum() / (per_row > 0).sum().clamp(min=1)
        self._log("seq_load_balancing_loss", value, self._tp_cp)
        return value

    def _global(self, scores: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
        router, group = self._router, self._router.tp_dp_cp_group
        counts = self._summed(chosen.sum(dim=(0, 1)), group)
        router.global_tokens_per_expert += counts
        router.ga_steps += 1
        mean = router.global_tokens_per_expert / router.ga_steps
        value = self._balance(scores.sum(dim=(0, 1)), counts.sum() / router.topk, mean, mean.sum() / router.topk)
        self._log("global_load_balancing_loss", value, group, has_dp=True)
        return value

    def _balance(self, scores: Tensor, n: Tensor, counts: Tensor, counted: Tensor) -> Tensor:
        """E sum_e f_e P_e, this rank's share: scores [..., E] summed over those of the n tokens that it has, counts
        [..., E] over all of the `counted` ones."""
        scale = self._config.num_moe_experts / self._router.topk
        return (scores * counts).sum(dim=-1) * scale / (n.clamp(min=1) * counted.clamp(min=1))

    def _summed(self, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(counts, group=group)
        return counts

    def _log(self, name: str, loss: Tensor, group: dist.ProcessGroup | None = None, has_dp: bool = False) -> None:
        log_auxiliary_loss(self._router, name, loss, group, has_dp)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _attached(output: Tensor, loss: Tensor) -> Tensor:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    return MoEAuxLossAutoScaler.apply(output, loss)
