"""What differs between versions of Megatron-core, found by looking, never by comparing versions."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def schedule_cp_factor(context_parallel_size: int) -> int:
    """What Megatron's schedule multiplies a (loss, data) pair by before the backward pass: the size of the CP group in
    the versions that have `forward_step_calc_loss` or refer to that size in `forward_step`, 1 in the others."""
    if context_parallel_size == 1:
        return 1
    from megatron.core.pipeline_parallel import schedules

    calc_loss = getattr(schedules, "forward_step_calc_loss", None)
    if calc_loss is None:
        refers = "get_context_parallel_world_size" in schedules.forward_step.__code__.co_names
        return context_parallel_size if refers else 1
    # The schedule's own code, run on a loss of 1 in a single micro-batch.
    arguments: dict[str, Any] = {
        "model": None,
        "output_tensor": torch.zeros(()),
        "loss_func": lambda output: (output + 1.0, {}),
        "config": SimpleNamespace(timers=None, calculate_per_token_loss=False),
        "vp_stage": None,
        "collect_non_loss_data": False,
        "num_microbatches": 1,
        "forward_data_store": [],
        "cp_group_size": context_parallel_size,
        "is_last_stage": True,
    }
    known = inspect.signature(calc_loss).parameters
    loss, _ = calc_loss(**{name: value for name, value in arguments.items() if name in known})
    return round(float(loss))


def auxiliary_loss_log() -> dict[str, Any]:
    """Megatron's layer-wise log of auxiliary losses itself, no copy; it moved from `parallel_state` to `moe_utils`, and
    from there into a tracker, whose old getter gives copies."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        return moe_utils.get_moe_metrics_tracker().metrics
    for module in (moe_utils, parallel_state):
        getter = getattr(module, "get_moe_layer_wise_logging_tracker", None)
        if getter is not None:
            return getter()
    raise ImportError(
        "megatron-core has no get_moe_layer_wise_logging_tracker, which pass A needs to leave no state behind"
    )


def fields_of(entry: Any) -> dict[str, Any]:
    """The fields of an entry of that log, to read and to change: it is a dict, or in a tracker an object."""
    return entry if isinstance(entry, dict) else vars(entry)


def log_auxiliary_loss(
    router: Any, name: str, loss: Tensor, group: dist.ProcessGroup | None, group_has_dp: bool = False
) -> None:
    """Add a router's loss to that log. `group_has_dp`: the group that it is reduced over spans data parallelism too."""
    from megatron.core.transformer.moe import moe_utils

    config = router.config
    entry = (name, loss, router.layer_number, config.num_layers + (getattr(config, "mtp_num_layers", None) or 0))
    tracker = getattr(moe_utils, "get_moe_metrics_tracker", None)
    if tracker is not None:
        tracker().record(*entry, reduce_group=group, needs_dp_avg=not group_has_dp)
    else:
        options = {"reduce_group_has_dp": True} if group_has_dp else {}
        moe_utils.save_to_aux_losses_tracker(*entry, reduce_group=group, **options)


def routing_scores(router: Any, logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """(choices, scores) of the tokens that Megatron balances, from the scores alone; None in the versions that balance
    the choices by which tokens are routed."""
    from megatron.core.transformer.moe import moe_utils

    compute = getattr(moe_utils, "compute_routing_scores_for_aux_loss", None)
    if compute is None:
        return None
    chosen, scores = compute(logits, router.topk, router.score_function, fused=router.config.moe_router_fusion)
    return chosen, scores


def tensor_context_group(router: Any) -> dist.ProcessGroup:
    """The ranks that share a router's sequences; some versions give a router its groups."""
    from megatron.core import parallel_state as mpu

    group: dist.ProcessGroup = getattr(router, "tp_cp_group", None) or mpu.get_tensor_and_context_parallel_group()
    return group


def has_compiled_bias(router: Any) -> bool:
    """Whether Megatron adds the experts' bias in a function that it compiles."""
    return hasattr(router, "_apply_expert_bias")
