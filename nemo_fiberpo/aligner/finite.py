"""Gradients and weights that are not finite, detected on all ranks before they do harm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def step(optimizer: Any, where: str) -> float:
    """An optimizer step of NeMo's mcore_distributed_optim; returns the gradient norm before clipping.

    ValueError naming `where`, before a weight or a moment changes, if that norm is not finite. Megatron clips a
    gradient with an infinite norm to zeros and NaN, and its own check looks only for NaN, on one rank.

    SPMD: every rank calls this. One all-reduce per chained optimizer in addition to the step's own.
    """
    mcore = optimizer.mcore_optimizer
    mcore.prepare_grads()  # the step repeats it, with the same result: there is no loss scale
    norm = math.hypot(*(part.get_grad_norm() for part in _optimizers(optimizer)))
    if not math.isfinite(norm):
        raise ValueError(
            f"grad_norm: {norm} in {where}; stopped before the weights changed. The same command resumes from the "
            "newest checkpoint; if this happens again, lower model.optim.lr or the coefficients of the losses"
        )
    optimizer.step(closure=None)
    return norm


def check_weights(model: torch.nn.Module, optimizer: Any, refused: str) -> None:
    """ValueError, beginning with `refused`, unless all weights and all optimizer moments are finite.

    SPMD: every rank calls this, with its own shard. One all-reduce.
    """
    flags = [torch.isfinite(value).logical_not_().sum() for value in _values(model, optimizer)]
    counts = torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.int64)
    total = counts.reshape(1).to(torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    if int(total):
        named = ((name, torch.isfinite(value).logical_not_().sum()) for name, value in model.named_parameters())
        first = next((f"; {name} has {int(number)} on this rank" for name, number in named if int(number)), "")
        raise ValueError(
            f"{refused}: {int(total)} weights of the policy or moments of its optimizer are not finite{first}. Nothing "
            "is written; the newest checkpoint is older"
        )


def _values(model: torch.nn.Module, optimizer: Any) -> Iterator[Tensor]:
    yield from (value.detach() for value in model.parameters())
    for part in _optimizers(optimizer):
        for state in () if part.optimizer is None else part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value) and value.is_floating_point())


def _optimizers(optimizer: Any) -> list[Any]:
    """Megatron's optimizers; the experts have one of their own if they are distributed."""
    mcore = optimizer.mcore_optimizer
    return list(getattr(mcore, "chained_optimizers", [mcore]))
