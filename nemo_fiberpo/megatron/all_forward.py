"""One optimizer step in which all forward passes come before all backward passes, so that none is run twice.

    A  forward pass of every micro-batch, whose autograd graph is kept    -> current log-probs, hence log-ratios
    B  one all-reduce                                                     -> aggregates of the cells
    C  gates, one all-reduce                                              -> coefficients c_j = dJ / d log pi_j
    D  backward pass of every kept graph with -sum_j c_j log pi_j         -> the gradient of -J

With full recomputation of activations a kept graph holds one hidden state per checkpoint, and D computes the rest again
as the backward pass of any schedule does. Without it the activations of all micro-batches are held.

Both A and D are Megatron's schedule. In D a micro-batch's forward pass returns what A has kept, so that gradients are
scaled, reduced and finalised, and the losses of routers scaled, by Megatron's own code. Pipeline stages exchange their
activations a second time; what a stage receives in D is only where its gradient is left for the stage before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.megatron.groups import Reducer
from nemo_fiberpo.megatron.host_copies import saved_on_host
from nemo_fiberpo.megatron.router_losses import balancing_real_tokens
from nemo_fiberpo.megatron.schedule import Policy, loss_scale, refuse_inexact, run, without_sync_hooks
from nemo_fiberpo.megatron.step import StepResult, StepTokens, backward_pass, gated, split_like, told_problem
from nemo_fiberpo.objective import Hierarchy, RatioGating

_REFUSED = {
    "enable_cuda_graph": "a graph has one place for the activations of a micro-batch",
    "external_cuda_graph": "a graph has one place for the activations of a micro-batch",
    "cuda_graph_impl": "a graph has one place for the activations of a micro-batch",
    "cpu_offloading": "Megatron offloads by the order in which its schedule runs backward passes",
    "fine_grained_activation_offloading": "Megatron offloads by the order in which its schedule runs backward passes",
    "defer_embedding_wgrad_compute": "Megatron empties the buffer of deferred gradients before the backward passes",
}
_REFUSED_ON_HOST = {
    "gradient_accumulation_fusion": "weights reach backward passes without `main_grad` with graphs in host memory",
}


def refuse_unkept(config: Any, on_host: bool = False) -> None:
    """ValueError naming the first field of a TransformerConfig under which graphs of several micro-batches cannot be
    kept, or not in host memory."""
    for name, reason in (_REFUSED | _REFUSED_ON_HOST if on_host else _REFUSED).items():
        value = getattr(config, name, None)
        if value not in (None, False, "none"):
            raise ValueError(
                f"{name}: {value} is refused where all forward passes come before all backward passes: {reason}; "
                "switch it off, or use two passes"
            )


def all_forward_step(
    policy: Policy,
    microbatches: Sequence[Any],
    tokens: StepTokens,
    hierarchy: Hierarchy,
    reducer: Reducer,
    *,
    gating: RatioGating | None = None,
    use_min: bool = False,
    extra_loss: Callable[[Tensor, Any], Tensor] | None = None,
    on_host: bool = False,
) -> StepResult:
    """Accumulate the gradient of -J(global batch) (+ extra losses), as `exact_step` does, with one forward pass.

    Arguments, errors and reductions are those of `exact_step`, and `refuse_unkept` raises too. Only what Megatron
    recomputes is computed twice, so `recompute_error` is 0.

    on_host   keep what the backward passes of all micro-batches need in host memory, rather than on the device
    """
    refuse_inexact(policy.config)
    refuse_unkept(policy.config, on_host)
    problem = told_problem(policy, microbatches, tokens)
    kept = [_Kept(batch) for batch in microbatches]
    with balancing_real_tokens(policy) as balanced:
        with saved_on_host(policy.chunks) if on_host else contextlib.nullcontext():
            current = _forward_passes(balanced, kept) if problem is None else []
        result = gated(current, problem, len(microbatches), tokens, hierarchy, reducer, gating, use_min)
        coefficients = split_like(result.coefficients, tokens.old_log_probs)
        extra = backward_pass(
            replace(balanced, forward=lambda one, module: one.again(module), log_probs=lambda output, one: output),
            kept,
            lambda index, log_probs: coefficients[index],
            loss_scale(len(microbatches), reducer.axes),
            None if extra_loss is None else lambda log_probs, one: extra_loss(log_probs, one.batch),
            balanced=False,
        )
    return StepResult(-result.value, result.report, float(extra), 0.0, coefficients)


def _forward_passes(policy: Policy, kept: Sequence[_Kept]) -> list[Tensor]:
    """Pass A: log-probs of every micro-batch on the last stage, an empty list on the others; fills `kept`."""

    def forward_step(data: Iterator[tuple[int, _Kept]], module: torch.nn.Module):
        _, one = next(data)
        output = policy.forward(one.batch, module)
        one.keep(module, output)

        def log_probs_of(output: Tensor, non_loss_data: bool = True) -> Tensor:
            log_probs = policy.log_probs(output, one.batch)
            one.keep(module, log_probs)
            return log_probs.detach()

        return output, log_probs_of

    with without_sync_hooks(policy.config):
        return list(run(policy, forward_step, kept, forward_only=True, collect_non_loss_data=True))


class _Kept:
    """A micro-batch between its forward and its backward pass, which on a rank with virtual stages are several."""

    def __init__(self, batch: Any):
        self.batch = batch
        self._passes: dict[int, tuple[Tensor, Tensor | None]] = {}

    def keep(self, module: torch.nn.Module, output: Tensor) -> None:
        """The output of a module of the policy, or what was computed from it, with its graph."""
        self._passes[id(module)] = output, _received(module)

    def again(self, module: torch.nn.Module) -> Tensor:
        """What was kept. Its backward pass leaves the gradient for the stage before with the tensor that the schedule
        has now received from there."""
        output, before = self._passes.pop(id(module))
        now = _received(module)
        if before is not None:
            before.register_hook(lambda gradient: setattr(now, "grad", gradient))
        return output


def _received(module: torch.nn.Module) -> Tensor | None:
    """What the schedule has given a module as the activations of the stage before; None on the first stage."""
    from megatron.core.utils import get_attr_wrapped_model

    received: Tensor | None = get_attr_wrapped_model(module, "decoder").input_tensor
    return received
