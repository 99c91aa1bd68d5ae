"""A model under Megatron's own schedule: run it, leave no trace, scale a loss for it, refuse what it must not do.

What differs between versions of megatron-core is found by looking for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_fiberpo.megatron.compat import auxiliary_loss_log, fields_of, schedule_cp_factor
from nemo_fiberpo.megatron.groups import TokenAxes
from nemo_fiberpo.megatron.sequences import Routed


@dataclass(frozen=True)
class Policy:
    """A model under Megatron's schedule.

    model                  the module, or the list of its virtual pipeline chunks, in training mode
    forward_backward_func  what `megatron.core.pipeline_parallel.get_forward_backward_func()` returns
    forward                (micro-batch, module) -> the module's output tensor, for `log_probs` on the last stage
    log_probs              (output, micro-batch) -> [b, s] log-probs of the tokens taken, with gradient; last stage only
    seq_length             of the activations that pipeline stages exchange, as Megatron's schedules want it
    micro_batch_size       likewise
    routed                 micro-batch -> the tokens that routers balance; None: all places of the model's input, right
                           only where nothing is padding and the loss leaves no sequence out
    """

    model: torch.nn.Module | list[torch.nn.Module]
    forward_backward_func: Callable
    forward: Callable[[Any, torch.nn.Module], Tensor]
    log_probs: Callable[[Tensor, Any], Tensor]
    seq_length: int
    micro_batch_size: int
    routed: Callable[[Any], Routed] | None = None

    @property
    def chunks(self) -> list[torch.nn.Module]:
        return self.model if isinstance(self.model, list) else [self.model]

    @property
    def config(self) -> Any:
        from megatron.core.utils import get_model_config

        return get_model_config(self.chunks[0])


_REFUSED = {
    "hidden_dropout": "dropout draws another mask in each pass; set it to 0",
    "attention_dropout": "dropout draws another mask in each pass; set it to 0",
    "moe_input_jitter_eps": "router input jitter draws other noise in each pass; set it to null",
    "moe_router_force_load_balancing": "random routing differs in each pass; set it to false",
    "fp8": "each pass updates the scaling factors that the next one uses; set it to null",
    "moe_expert_capacity_factor": "it drops tokens depending on what shares their micro-batch; set it to null",
    "calculate_per_token_loss": "it divides gradients by a token count beside the objective's own denominators; set it "
    "to false",
}


def refuse_inexact(config: Any) -> None:
    """ValueError naming the first field of a TransformerConfig under which passes A and D would not be the same
    function, or the gradient not that of the global batch."""
    for name, reason in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value is not False and not (name.endswith("dropout") and value == 0):
            raise ValueError(f"{name}: {value} is refused by the exact step: {reason}")
    balancing = getattr(config, "moe_router_load_balancing_type", None)
    if "sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]):
        raise ValueError(
            "moe_router_load_balancing_type: sinkhorn is refused by the exact step: it routes a token by what shares "
            "its micro-batch; set it to aux_loss or none"
        )
    for name in ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"):
        value = getattr(config, name, None)
        if getattr(config, "num_moe_experts", None) and value not in (None, False, "none"):
            raise ValueError(
                f"{name}: {value} is refused by the exact step for a mixture of experts: a graph would go on with the "
                "padding that its routers saw when it was captured; switch CUDA graphs off"
            )


def loss_scale(num_microbatches: int, axes: TokenAxes) -> float:
    """The factor that turns a rank's share of a sum over the global batch into what Megatron must be given.

    Wanted is the gradient of L = sum over shards r and micro-batches m of l_rm. Megatron gives the loss of (r, m) to
    the backward pass as  l_rm * P / M  (M micro-batches; P the CP factor of the versions that have it, else 1), and its
    data-parallel wrapper averages over the D data- and context-parallel ranks, expert parameters too: their buffers sum
    over fewer ranks, but each of these has already seen the tokens of its whole expert-parallel group, and they are
    divided by the same D. Where log-probs were gathered over cp, every rank has the loss of all of them, and its
    backward pass reaches its own tokens once (G = 1), or as often as cp has ranks where the gather adds gradients up
    (G = cp). The result is  grad sum_rm l_rm * P G / (M D),  so each l_rm is multiplied by  M D / (P G).
    Other replicated axes (TP, PP) neither sum nor average the loss. The auxiliary losses of MoE join the graph behind
    this loss, with a scale that Megatron sets for itself, and keep it.
    """
    factor = schedule_cp_factor(axes.axis("cp").size) if any(axis.name == "cp" for axis in axes.axes) else 1
    return num_microbatches * axes.num_averaged / (factor * axes.copies)


def run(policy: Policy, forward_step: Callable, microbatches: Sequence[Any], **options: Any) -> list[Any]:
    """Megatron's schedule over all micro-batches; each virtual chunk walks through them by itself."""
    iterators = [iter(list(enumerate(microbatches))) for _ in policy.chunks]
    return policy.forward_backward_func(
        forward_step_func=forward_step,
        data_iterator=iterators if isinstance(policy.model, list) else iterators[0],
        model=policy.model,
        num_microbatches=len(microbatches),
        seq_length=policy.seq_length,
        micro_batch_size=policy.micro_batch_size,
        **options,
    )


@contextlib.contextmanager
def without_sync_hooks(config: Any) -> Iterator[None]:
    """Run the schedule without the hooks by which gradients are reduced during backward passes.

    Megatron enters `no_sync_func` in a forward-only pass, too, and with pipeline stages never leaves it again.
    """
    hooks = {name: getattr(config, name) for name in ("no_sync_func", "grad_sync_func") if hasattr(config, name)}
    try:
        for name in hooks:
            setattr(config, name, None)
        yield
    finally:
        for name, hook in hooks.items():
            setattr(config, name, hook)


@contextlib.contextmanager
def without_trace(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run the schedule forward only over a model's chunks without a trace.

    Routers count tokens in buffers, and megatron-core 0.11 logs auxiliary losses in any forward pass in training mode.
    """
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    # Megatron's DDP keeps a list called `buffers`, so the method of torch's Module is called by its class.
    buffers = [(buffer, buffer.clone()) for chunk in chunks for buffer in torch.nn.Module.buffers(chunk)]
    log = auxiliary_loss_log() if getattr(config, "num_moe_experts", None) else {}
    logged = {name: (entry, dict(fields_of(entry)), fields_of(entry)["values"].clone()) for name, entry in log.items()}
    try:
        with without_sync_hooks(config):
            yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        log.clear()
        for name, (entry, fields, values) in logged.items():
            fields_of(entry).update(fields)
            fields["values"].copy_(values)
            log[name] = entry
